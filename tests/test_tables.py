import errno
import os

import pytest

from kd.tables import TARGETS, DiskTables


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_full_disk_is_an_error_of_the_table_that_it_stopped(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        DiskTables().table({}, (2, 3, 4), lambda table: None)
    assert [path.suffix for path in TARGETS.iterdir()] == [".lock"]
