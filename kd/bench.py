"""Measure an exported file here: time by batch and threads, memory, size.

    kd bench FILE [--batch 1 8] [--threads 1 2] [--seconds 1]

Times on a desktop only rank files; measure a phone's on the phone.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from torch import nn

from kd import artifacts
from kd.bundle import checksums
from kd.component import ConfigError, reason
from kd.disk import digest, num_bytes
from kd.exporters import Exporter, Runner, latency

RUNTIMES = {
    ".onnx": "onnxruntime",
    ".pte": "executorch.runtime",
    ".tflite": "ai_edge_litert.interpreter",
}
"""Imported before memory is measured: the runtime in a phone's app has another size anyway."""
ELSEWHERE = {".mlpackage": "runs only on Apple devices: measure it there, with Xcode"}
"""Formats whose runtime is on no machine that runs this code."""
RECORDED: dict[str, Any] = {"batches": (1, 8), "threads": (1,), "seconds": 0.25}
"""Settings for a bundle's benchmark.json; the stage that writes it has one thread."""


def load(path: Path, threads: int = 1) -> Runner:
    """Load the file in its runtime, and run it once.

    Raises:
        ConfigError: the file does not exist, has no known format, is damaged or takes no images,
            or its runtime is not installed.
    """
    formats = {cls.suffix: cls for cls in get_args(Exporter)}
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    if path.suffix in ELSEWHERE:
        raise ConfigError(f"{path} {ELSEWHERE[path.suffix]}")
    if path.suffix not in formats:
        known = ", ".join(formats)
        raise ConfigError(f"{path} is not an exported file (known: {known})")
    runner: Runner = formats[path.suffix]().load(path, threads)
    try:
        runner(runner.blank(1))
    except Exception as error:  # each runtime has its own
        raise ConfigError(f"{path} is not an image classifier ({reason(error)})") from error
    return runner


def measure(
    path: Path,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    seconds: float = 1.0,
    eager: nn.Module | None = None,
) -> dict[str, Any]:
    """Measure what benchmark.json records.

    Args:
        path: The exported file.
        batches: Images per call.
        threads: Threads of the runtime, and of eager.
        seconds: How long each row is measured.
        eager: The network that was exported, measured alternately with it on the same input.

    Returns:
        file, sha256, size_bytes, rows (batch, threads, median_ms, p90_ms, n; with eager also
        eager_median_ms and eager_p90_ms) and, on Linux, peak_mb (of a process that runs the file
        once) and own_mb (its growth since before it loaded the file).

    Raises:
        ConfigError: as `load`.
    """
    rows = []
    for count in threads:
        runner = load(path, count)
        for batch in batches:
            candidates = {"": runner} | ({"eager_": eager} if eager is not None else {})
            found = latency(candidates, runner.blank(batch), count, seconds)
            times = {
                f"{who}{key}": found[who][key] for who in found for key in ("median_ms", "p90_ms")
            }
            rows.append({"batch": batch, "threads": count, **times, "n": int(found[""]["n"])})
    return {
        "file": path.name,
        "sha256": digest(path),
        "size_bytes": num_bytes(path),
        "rows": rows,
        **memory(path),
    }


def record(path: Path, eager: nn.Module) -> dict[str, float]:
    """Write benchmark.json beside an export; return the figures that exports are compared by.

    Does nothing if the runtime is not here.
    """
    if path.suffix in ELSEWHERE:
        return {}
    found = measure(path, **RECORDED, eager=eager)
    artifacts.write_json(path.with_name(checksums.BENCHMARK), found)
    return recorded(path.parent)


def recorded(folder: Path) -> dict[str, float]:
    """The figures that exports are compared by, from a bundle's benchmark.json."""
    path = folder / checksums.BENCHMARK
    if not path.exists():
        return {}
    found = artifacts.read_json(path)
    figures = {"latency_ms": found["rows"][0]["median_ms"], "memory_mb": found.get("own_mb")}
    return {name: figure for name, figure in figures.items() if figure is not None}


def memory(path: Path) -> dict[str, float]:
    """Memory of a fresh process that loads the file and runs it; empty if not on Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    package_root = str(Path(__file__).resolve().parents[1])
    places = [package_root, os.environ.get("PYTHONPATH")]  # where clusters keep their packages
    done = subprocess.run(
        [sys.executable, "-P", "-m", "kd.bench", str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2]  # of a traceback, the error
        raise ConfigError(f"{path} could not be run in a separate process: {said}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory_here(path: Path) -> dict[str, float]:
    """This process's peak, and how much of it loading and running the file added."""
    importlib.import_module(RUNTIMES[path.suffix])
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    load(path)
    peak = _status("VmHWM")
    return {"peak_mb": round(peak, 1), "own_mb": round(peak - before, 1)}


def table(found: dict[str, Any]) -> str:
    """The measurements as text for a terminal."""
    columns = list(found["rows"][0])
    rows = [[_cell(row[key]) for key in columns] for row in found["rows"]]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in [columns, *rows]
    ]
    told = f"{found['file']}: {found['size_bytes']:,} bytes, SHA-256 {found['sha256'][:16]}..."
    if "peak_mb" in found:
        told += (
            f"\nmemory: {found['own_mb']} MB for the file, "
            f"in a process that peaked at {found['peak_mb']} MB with Python and the runtime"
        )
    return "\n".join([told, "", *lines])


def surroundings(path: Path) -> str:
    """Say whether the file is in a bundle, after verifying that bundle's checksums.

    Raises:
        ArtifactError: a file of the bundle is missing, altered or foreign.
    """
    if not (path.parent / checksums.SUMS).exists():
        return "alone: no labels, preprocessing or checksums beside it"
    return f"in a whole bundle: {', '.join(checksums.check(path.parent))}"


def _cell(value: float) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _status(key: str) -> float:
    """A field of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


if __name__ == "__main__":
    print(json.dumps(memory_here(Path(sys.argv[1]))))
