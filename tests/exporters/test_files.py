"""Third parties kept quiet, and nobody else."""

import logging
import os

from kd.exporters.files import ignoring, without_lines, write


def test_an_export_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "model.onnx", []

    def fsync(descriptor, really=os.fsync):
        synced.append((os.fstat(descriptor).st_ino, path.exists()))
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write(path, b"weights")
    assert synced == [(path.stat().st_ino, False)]
    assert path.read_bytes() == b"weights"
    assert list(tmp_path.iterdir()) == [path]


def test_only_the_named_lines_of_native_code_are_dropped(capfd):
    with without_lines("[threadpool.cpp"):
        os.write(2, b"[threadpool.cpp:66] Resetting threadpool\n[program.cpp:1] bad file\n")
    os.write(2, b"[threadpool.cpp:66] later\n")
    said = capfd.readouterr().err.splitlines()
    assert said == ["[program.cpp:1] bad file", "[threadpool.cpp:66] later"]


def test_lines_follow_also_where_the_code_raises(capfd):
    try:
        with without_lines("[a"):
            os.write(2, b"[b] the reason\n")
            raise RuntimeError
    except RuntimeError:
        pass
    assert capfd.readouterr().err == "[b] the reason\n"


def test_of_pytorchs_log_only_the_line_about_torchao_is_dropped(caplog, monkeypatch):
    log = logging.getLogger("torch.utils._pytree")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    monkeypatch.setattr(log, "propagate", False)  # PyTorch keeps some of its log to itself
    with ignoring():
        log.warning("%s is an Enum subclass", "<enum 'KernelPreference'>")
        log.warning("%s is an Enum subclass", "<enum 'Colour'>")
    log.warning("%s again", "KernelPreference")
    assert [record.getMessage() for record in caplog.records] == [
        "<enum 'Colour'> is an Enum subclass",
        "KernelPreference again",
    ]
