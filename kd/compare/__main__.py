"""`python -m kd.compare FILE`: do what is left of a comparison, then say what came of it."""

import argparse
import json
import os
import sys
from pathlib import Path

from kd import disk, signals
from kd.compare import locks, report, work
from kd.compare.plan import Comparison
from kd.component import ConfigError, Refused


def main(arguments: list[str] | None = None) -> int:
    """Do the units, write the report; 0 when all went well."""
    parser = argparse.ArgumentParser(prog="python -m kd.compare", description=__doc__)
    parser.add_argument("file", type=Path, help="such as params.compare.yaml")
    parser.add_argument("--seeds", type=int, help="how many, where not as many as the file says")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="units at a time (default: cores)"
    )
    parser.add_argument("--into", type=Path, help="a page to put the table into, by its name")
    parser.add_argument("--record", type=Path, help="a folder to write the report to as well")
    parser.add_argument("--list", action="store_true", help="only print the units, as JSON")
    parser.add_argument("--unit", help="only do this one, whose needs are done")
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
        with locks.held(comparison.folder / "run.lock", f"works in {comparison.folder}"):
            work.do_all(comparison, given.processes, lambda line: print(line, flush=True))
            table = report.write(comparison, comparison.folder)
            if given.record:
                report.write(comparison, given.record)
            if given.into:
                report.into(given.into, comparison.about.name, table)
    except (ConfigError, Refused, OSError) as error:
        said = disk.remedy(error) if isinstance(error, OSError) else str(error)
        if said is None:
            raise
        print(f"error: {said}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 1
    except SystemExit:  # SIGTERM or Ctrl-C
        print("stopped; what was done stays, and the next run goes on from there", file=sys.stderr)
        raise
    print(table)
    print(
        f"{comparison.folder}: report.md has this table; the networks of each seed lie beside it"
    )
    return 0


if __name__ == "__main__":
    signals.end_quietly()
    sys.exit(main())
