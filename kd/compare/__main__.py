"""`python -m kd.compare FILE`: run a comparison's unfinished units, then write its report."""

import argparse
import json
import os
import sys
from pathlib import Path

from kd import disk, signals
from kd.compare import locks, work
from kd.compare.plan import Comparison
from kd.component import ConfigError, Refused, missing_package


def main(arguments: list[str] | None = None) -> int:
    """Run the units and write the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kd.compare", description=__doc__)
    parser.add_argument("file", type=Path, help="such as params.compare.yaml")
    parser.add_argument("--seeds", type=int, help="number of seeds, instead of the file's")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="units at a time (default: cores)"
    )
    parser.add_argument("--into", type=Path, help="a page whose table of this name to replace")
    parser.add_argument("--record", type=Path, help="a folder to write the report to as well")
    parser.add_argument("--list", action="store_true", help="only print unfinished units, as JSON")
    parser.add_argument("--unit", help="only run this unit, whose dependencies are done")
    given = parser.parse_args(arguments)
    try:
        comparison = Comparison(given.file, given.seeds)
        if given.list:
            units = comparison.units.values()
            print(json.dumps({u.id: [*u.needs] for u in units if not comparison.is_done(u)}))
            return 0
        if given.unit:
            work.do(comparison, comparison.units[given.unit])
            return 0
        from kd.compare import report  # needs SciPy, of an extra; units do not

        with locks.held(comparison.folder / "run.lock", f"works in {comparison.folder}"):
            work.do_all(comparison, given.processes, lambda line: print(line, flush=True))
            table = report.write(comparison, comparison.folder)
            if given.record:
                report.write(comparison, given.record)
            if given.into:
                report.into(given.into, comparison.about.name, table)
    except (ConfigError, Refused) as error:
        return refused(error, str(error))
    except OSError as error:
        return refused(error, disk.remedy(error))
    except ModuleNotFoundError as error:
        return refused(error, missing_package(error))
    except SystemExit:  # SIGTERM or Ctrl-C
        print("stopped; finished work is kept, and the next run resumes from it", file=sys.stderr)
        raise
    print(table)
    print(f"{comparison.folder}: report.md has this table; each seed's networks are next to it")
    return 0


def refused(error: Exception, reason: str | None) -> int:
    """Print why this process exits with 1; raise the error again if nothing better can be said."""
    if reason is None:
        raise error
    print(f"error: {reason}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
    return 1


if __name__ == "__main__":
    signals.end_quietly()
    sys.exit(main())
