import pytest

from kd.component import ConfigError
from kd.data import CustomDataset


def test_args_reach_the_users_object() -> None:
    raw = CustomDataset(path="tests.data.toys:Stripes", args={"num": 12}).read()
    assert len(raw.labels_N) == 12


@pytest.mark.parametrize(
    ("path", "args", "message"),
    [
        ("tests.data.toys", {}, "package.module:Name"),
        ("tests.data.nowhere:X", {}, "cannot import"),
        ("tests.data.toys:X", {}, "has no 'X'"),
        ("tests.data.toys:Stripes", {"size": 1}, "cannot be called with"),
        ("tests.data.toys:Unreadable", {}, r"Unreadable has no method read\(\)"),
        (
            "tests.data.toys:Failing",
            {},
            r"read\(\) raised OSError in .*toys\.py, line \d+: disk on",
        ),
        ("tests.data.toys:Wrong", {}, r"read\(\) returned a int"),
    ],
)
def test_what_is_no_data_set_is_refused(path: str, args: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CustomDataset(path=path, args=args).read()
