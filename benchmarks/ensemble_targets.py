"""What a student's step costs when an ensemble teaches, against a plain cross-entropy step.

    python benchmarks/ensemble_targets.py --rounds 7
    python benchmarks/ensemble_targets.py --members 8 8 8 [--device cuda]

Three assistants (CNN-8, CNN-6, CNN-4) teach CNN-2 on 32 x 32 images in batches of 128: from labels
alone, from cached targets (their making is told apart), and on-line, the members one by one, with
their batch norms folded, as they are asked, and as they were trained; members of one architecture
are also asked all at once.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
sys.path.insert(0, str(PROJECT / "benchmarks"))

import torch  # noqa: E402
from side_by_side import Case, in_turns, machine, ratios  # noqa: E402

from kd.data import Augment, Images  # noqa: E402
from kd.ensemble import Ensemble  # noqa: E402
from kd.methods import KD  # noqa: E402
from kd.models import PlainCNN, build_model  # noqa: E402
from kd.recipe import Recipe  # noqa: E402
from kd.train import Lesson, Plan  # noqa: E402
from kd.train.device import prepare  # noqa: E402
from kd.train.folding import folded  # noqa: E402
from kd.train.loop import Training  # noqa: E402
from kd.train.speed import finish  # noqa: E402

BAR = 1.05
BATCH = 128


def network(depth: Any) -> torch.nn.Module:
    """A plain CNN for 10 classes."""
    return build_model(PlainCNN(depth=depth), channels=3, image_size=32, num_classes=10)


def as_it_is(network: torch.nn.Module, images_B: torch.Tensor) -> torch.nn.Module:
    """In the place of `folded`."""
    return network


def main() -> None:
    """Time steps in turns, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns that are counted")
    parser.add_argument("--steps", type=int, default=20, help="steps in a turn")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--views", type=int, default=4, help="views in the tables")
    parser.add_argument("--members", type=int, nargs="+", default=[8, 6, 4], help="their depths")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    device = prepare(Recipe(device=arguments.device, precision=arguments.precision))
    num = BATCH * arguments.steps
    clock = time.process_time if device == "cpu" else time.perf_counter
    images = Images(
        pixels_NHWC=torch.randint(256, (num, 32, 32, 3), dtype=torch.uint8, device=device),
        labels_N=torch.arange(num, device=device) % 10,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        augment=Augment(shift=4, flip=True),
    )
    members = tuple(network(depth) for depth in arguments.members)
    ensemble = Ensemble(members, (1 / len(members),) * len(members))
    forms: dict[str, Any] = {
        "labels": None,
        "cached": "cached",
        "on-line": "online",
        "on-line, unfolded": "online",
    }
    if len(set(arguments.members)) == 1 < len(members):
        forms["on-line, all at once"] = "stacked"
    cases: dict[str, Case] = {}
    for name, targets in forms.items():
        recipe = Recipe(
            epochs=1,
            batch_size=BATCH,
            precision=arguments.precision,
            targets=targets or "auto",
            views=arguments.views if targets == "cached" else None,
            augment=images.augment,
        )
        taught = (KD(), ensemble) if targets else (None, None)
        with mock.patch("kd.train.targets.folded", as_it_is if "unfolded" in name else folded):
            lesson = Lesson(images, recipe, 0, 10, *taught)
        plan = Plan(recipe, arguments.steps)
        training = Training(network(2).to(device), lesson, plan)

        def steps(training: Training = training) -> None:
            for step in range(arguments.steps):
                training.step(step)
            finish(training.watch.losses_S.device)

        cases[name] = steps
    making = Recipe(epochs=1, targets="cached", views=1, precision=arguments.precision)
    cases["making a table of one view"] = partial(Lesson, images, making, 0, 10, KD(), ensemble)
    seconds = in_turns(cases, arguments.rounds, clock)
    depths = " ".join(f"CNN-{depth}" for depth in arguments.members)
    print(f"{machine()}; {arguments.precision}, batch {BATCH}, n = {arguments.rounds}; {depths}\n")
    unit = "CPU ms" if device == "cpu" else "ms"
    print(f"| targets | {unit} a step | x labels alone | bar |\n| --- | --- | --- | --- |")
    for name, times in seconds.items():
        bar = BAR if name == "cached" else ""
        each = 1e3 * statistics.median(times) / arguments.steps
        print(f"| {name} | {each:.2f} | {ratios(seconds, name, 'labels')} | {bar} |")


if __name__ == "__main__":
    main()
