"""Who is champion: a new student takes over if it beats the current one by more than noise.

    kd promote

The student stage and `kd promote` both decide it here.  A student is identified by the SHA-256 of
its weights: once registered it keeps its version, and the same two students on the same images
get the same decision.  So every step is idempotent, and the next call completes what a crash left
half done.

Both networks predict the current validation images, and are compared in pairs by McNemar's exact
test.  If these are not the images that the champion was chosen on, it may have learned from some
of them: it is registered with a hash of each image that it has seen, and those are left out.  If
the two cannot be compared, the champion stays until `kd promote --replace`.  It also stays if the
student was champion before: a comparison must not undo a rollback, done by moving the alias back.

N samples, H W image, channels last.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd import artifacts, bench, manifest
from kd.bundle import checksums
from kd.component import ConfigError
from kd.data import Images
from kd.evaluate import correct, discordant, mcnemar, predict
from kd.manifest import Manifest
from kd.tracking import Run, TrackingError, Version

REGISTERED_NAME = "kd-student"
LEVEL = 0.05
"""A student that is no better than the champion replaces it in at most this share of cases."""
STUDENT = artifacts.ROOT / "student"
EXPORTS = artifacts.ROOT / "exports"
SEEN = "seen.npy"
"""Beside a registered student: a hash of each image that it learned from."""
BOTH_WAYS = ("ptq_val_accuracy", "qat_val_accuracy")
"""In parity.json if int8 was tried by calibration alone and by fine-tuning."""
REMEDY = "to replace it, run `kd promote --replace`"
BEFORE = "it was champion before, and only `kd promote --replace` makes it so again"
"""Ends each decision on a former champion, which `was_champion` recognises by it."""
TRIES = 10
"""How often to decide again if another student becomes champion meanwhile."""


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison."""

    decision: str
    """A sentence; begins with "champion", "challenger" or "not compared"."""
    wins: bool


def promote(run: Run, *, compare: bool = True) -> str:
    """Register the student in artifacts/student with its exports, and decide who is champion.

    Args:
        run: The student's own.
        compare: False makes it champion without a comparison.

    Returns:
        The decision.

    Raises:
        TrackingError: MLflow does not answer, or the champion keeps changing.
        ArtifactError: there is no student, or it cannot be run here.
    """
    described = manifest.read(STUDENT)
    challenger = run.registered(REGISTERED_NAME, described.sha256)
    if challenger is None:
        register(run)
        challenger = run.registered(REGISTERED_NAME, described.sha256)
        assert challenger  # `register` would have raised
    complete(run, challenger)
    for _ in range(TRIES):
        champion = run.champion(REGISTERED_NAME)
        found = judge(
            challenger, champion, lambda it: run.fetch(it.uri, run.scratch()), compare=compare
        )
        if run.promote(REGISTERED_NAME, challenger, champion, found.decision, found.wins):
            return f"version {challenger.number}: {found.decision or 'champion already'}"
    raise TrackingError("the registry", f"the champion changed {TRIES} times meanwhile")


def register(run: Run) -> None:
    """Log the student as a model, and as a version in the registry."""
    val = Images.load(artifacts.DATA, "val")
    folder = run.scratch()
    np.save(folder / SEEN, seen())
    run.log_model(
        STUDENT,
        registered_name=REGISTERED_NAME,
        val_accuracy=artifacts.read_json(STUDENT / "metrics.json")["val_accuracy"],
        val_hash=artifacts.data_record()["splits"]["val"]["sha256"],
        example=val.pixels_NHWC[:2].numpy(),
        beside=[folder / SEEN],
    )


def complete(run: Run, version: Version) -> None:
    """Log the student's exports that its version does not point at, say after a crash."""
    for folder in sorted(path.parent for path in EXPORTS.glob(f"*/{checksums.SUMS}")):
        made_from = manifest.read(folder, "student.json").sha256
        sha256 = artifacts.read_json(folder / "parity.json")["sha256"]
        known = version.tags.get(f"kd.export.{folder.name}.sha256")
        if made_from == version.sha256 and known != sha256:
            log_export(run, folder)


def log_export(run: Run, folder: Path) -> dict[str, float]:
    """Log a bundle's export; return the figures that exports are compared by."""
    parity = artifacts.read_json(folder / "parity.json")
    figures = {
        "val_accuracy": parity["val_accuracy"],
        "size_mb": parity["size_bytes"] / 1e6,
        "parity_max_abs": parity["max_abs"],
        "parity_mean_abs": parity["mean_abs"],
        "parity_top1_agreement": parity["top1_agreement"],
        **{key: parity[key] for key in BOTH_WAYS if key in parity},
        **bench.recorded(folder),
    }
    run.log_export(
        folder,
        registered_name=REGISTERED_NAME,
        metrics=figures,
        val_hash=artifacts.data_record()["splits"]["val"]["sha256"],
        example=Images.load(artifacts.DATA, "val").pixels_NHWC[:2].numpy(),
    )
    return figures


def judge(
    challenger: Version,
    champion: Version | None,
    fetch: Callable[[Version], Path],
    *,
    compare: bool = True,
) -> Verdict:
    """Whether the student in artifacts/student replaces the champion.

    Args:
        challenger: Its version in the registry.
        champion: The one to beat; None if there is none.
        fetch: Downloads the champion's files; called only if needed.
        compare: False lets it replace the champion in any case.

    Raises:
        ConfigError: the challenger itself cannot be run.
    """
    if champion is None:
        return Verdict("champion: the first of its name", True)
    if champion.number == challenger.number:
        known = challenger.decision.startswith("champion")
        return Verdict("" if known else "champion: named so by hand, or before a crash", False)
    if not compare:
        decision = f"champion: replaces version {champion.number} without a comparison, as told"
        return Verdict(decision, True)
    found = tried(champion, fetch)
    return no_more(found) if was_champion(challenger) else found


def tried(champion: Version, fetch: Callable[[Version], Path]) -> Verdict:
    """Compare the student in artifacts/student on the validation images; see `judge`."""
    ours, student = manifest.load(STUDENT)  # its own errors are not the champion's
    try:
        folder = fetch(champion)
        theirs, holder = manifest.load(folder)
        fits(student, holder)
    except TrackingError:
        raise
    except (ConfigError, ValueError) as error:
        return Verdict(
            f"not compared: version {champion.number} cannot be run on these images ({error}); "
            f"{REMEDY}",
            False,
        )
    val = Images.load(artifacts.DATA, "val")
    new_N = correct(predict(ours, val), val.labels_N)
    old_N = correct(predict(theirs, replace(val, mean=holder.mean, std=holder.std)), val.labels_N)
    fresh_N = unseen(val, folder / SEEN)
    return compared(new_N[fresh_N], old_N[fresh_N], champion.number, len(val))


def was_champion(version: Version) -> bool:
    """Whether a version is or was champion, by the last decision on it."""
    return version.decision.startswith("champion") or version.decision.endswith(BEFORE)


def no_more(found: Verdict) -> Verdict:
    """The verdict on a former champion: it cannot win by a comparison again."""
    decision = found.decision
    if found.wins:
        decision = decision.replace("champion", "challenger", 1)
    return Verdict(f"{decision}; {BEFORE}", False)


def compared(new_N: Tensor, old_N: Tensor, champion: str, num_val: int) -> Verdict:
    """The verdict on two students by what each gets right.

    Args:
        new_N: Which images the challenger gets right.
        old_N: The same for the champion.
        champion: Its version.
        num_val: How many validation images there are, with those that it has learned from.
    """
    if not len(new_N):
        return Verdict(
            f"not compared: version {champion} has learned from every validation image; {REMEDY}",
            False,
        )
    gained, lost = discordant(new_N, old_N)
    p = mcnemar(gained, lost)
    wins = p <= LEVEL
    accuracies = [f"{each_N.double().mean().item():.4f}" for each_N in (new_N, old_N)]
    on = f"{len(new_N)}" if len(new_N) == num_val else f"those {len(new_N)} of {num_val}"
    unknown = "" if len(new_N) == num_val else " that it has not learned from"
    decision = (
        f"{'champion' if wins else 'challenger'}: accuracy {accuracies[0]} against "
        f"{accuracies[1]} of version {champion} on {on} validation images{unknown}; "
        f"it alone is right on {gained}, the champion alone on {lost}, "
        f"p = {p:.3g} ({LEVEL} or less is needed)"
    )
    return Verdict(decision, wins)


def fits(student: Manifest, holder: Manifest) -> None:
    """Check that the champion has the same classes and images.

    Raises:
        ValueError: says what differs.
    """
    for what in ("class_names", "channels", "image_size"):
        old, new = getattr(holder, what), getattr(student, what)
        if old != new:
            raise ValueError(f"its {what} is {old}, not {new}")


def seen() -> NDArray[np.uint64]:
    """A hash of each image of train and pool, sorted."""
    return np.unique(hashes(Images.load(artifacts.DATA, ("train", "pool"))))


def unseen(val: Images, path: Path) -> Tensor:
    """Which validation images have no hash in a file; all if there is no file."""
    if not path.exists():
        return torch.ones(len(val), dtype=torch.bool)
    return torch.from_numpy(~np.isin(hashes(val), np.load(path)))


def hashes(images: Images) -> NDArray[np.uint64]:
    """64 bits for each image: the chance of a collision among a million is 3e-8."""
    parts = (images.pixels_NHWC, *images.beyond_NHWC)
    rows = (row.numpy().tobytes() for pixels_NHWC in parts for row in pixels_NHWC)
    short = (hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    return np.array([int.from_bytes(each, "little") for each in short], np.uint64)
