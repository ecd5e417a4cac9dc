"""Skips what needs a package that is not installed: `python -m pytest -p tests.core_alone`.

For an environment of the core's dependencies alone, such as that of `make test-oldest`.
"""

import re
from importlib.util import find_spec

import pytest


def missing(error):
    """What to install against this error; None if it does not come of a missing package."""
    while error:
        if isinstance(error, ModuleNotFoundError) and not find_spec(error.name.partition(".")[0]):
            return error.name
        if found := re.search(r"pip install 'kd\[\w+\]'", str(error)):  # kd's own words
            return found[0]
        error = error.__cause__ or error.__context__
    return None


def skipped(report, excinfo):
    if report.failed and (needed := missing(excinfo.value)):
        file = report.nodeid.partition("::")[0]
        report.outcome, report.longrepr = "skipped", (file, 0, f"needs {needed}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    return skipped(report, report.call.excinfo)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    return skipped(report, call.excinfo)
