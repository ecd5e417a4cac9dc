"""When and where the stages of dvc.yaml run: a thin layer of Prefect over DVC."""

import sys
from importlib.util import find_spec

from kd.component import to_install


def need(extra: str, *packages: str) -> None:
    """End `python -m flows...` in one line if one of these packages is not installed."""
    missing = [each for each in packages if find_spec(each) is None]
    if missing and sys.argv[0] == "-m":  # which it is until Python has found the module
        sys.exit(f"error: {to_install(missing[0], extra)}")


need("pipeline", "dvc", "filelock", "prefect", "psutil", "rich")
