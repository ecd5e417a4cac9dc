"""Components, and the user's own code, named by its import path."""

from typing import Literal

import pytest

from kd.component import ConfigError, component, load_object, require
from kd.weightings import DifferentialEvolution


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("class Net(:\n    pass\n", r"SyntaxError in .*own\.py, line 1: invalid syntax\)$"),
        ("\nwidth = wide\n", r"NameError in .*own\.py, line 2: name 'wide' is not defined\)$"),
        (
            "import kd_tests_nowhere\n",
            r"ModuleNotFoundError in .*own\.py, line 1: No module named 'kd_tests_nowhere'\)$",
        ),
        (
            "from torch import nn\n\nLINEAR = nn.Linear('8', 8)\n",
            r"TypeError in .*own\.py, line 3: ",
        ),
    ],
    ids=["syntax", "name", "import", "library"],
)
def test_whatever_importing_raises_names_the_path_the_error_and_the_users_line(
    tmp_path, monkeypatch, code, said
):
    (tmp_path / "kd_tests_own.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    refused = r"^path 'kd_tests_own:Net': cannot import kd_tests_own \(" + said
    with pytest.raises(ConfigError, match=refused):
        load_object("kd_tests_own:Net")


def test_a_module_that_is_nowhere_is_looked_for_in_the_folder_one_runs_from():
    with pytest.raises(ConfigError, match="run from the folder that holds it, or install it"):
        load_object("kd_tests_nowhere.models:Net")


def test_a_value_that_a_literal_does_not_name_is_refused_wherever_it_is_given():
    @component
    class Plain:
        kind: Literal["plain"] = "plain"
        level: Literal[1, 2] = 1

    @component
    class Heir(Plain):
        kind: Literal["heir"] = "heir"
        far: float = 0.0

        def __post_init__(self):
            require(self.far >= 0, "far", self.far, "at least 0")

    assert Heir(level=2).level == 2
    for wrong in ({"level": 3}, {"kind": "plain"}, {"far": -1.0}):
        (field,) = wrong
        with pytest.raises(ConfigError, match=rf"^{field} is .*; it must be"):
            Heir(**wrong)
    with pytest.raises(ConfigError, match="objective is 'acuracy'; it must be one of 'nll', "):
        DifferentialEvolution(objective="acuracy")
