"""What a student's step costs when an ensemble teaches, against a plain cross-entropy step.

    python benchmarks/ensemble_targets.py --rounds 7

Three assistants (CNN-8, CNN-6, CNN-4) teach CNN-2 on 32 x 32 images in batches of 128: from labels
alone, from cached targets (their making is told apart), and on-line, the members one by one.
"""

import argparse
import statistics
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
sys.path.insert(0, str(PROJECT / "benchmarks"))

import torch  # noqa: E402
from side_by_side import in_turns, machine, ratios  # noqa: E402

from kd.data import Augment, Images  # noqa: E402
from kd.ensemble import Ensemble  # noqa: E402
from kd.methods import KD  # noqa: E402
from kd.models import PlainCNN, build_model  # noqa: E402
from kd.recipe import Recipe  # noqa: E402
from kd.train import Lesson, Plan  # noqa: E402
from kd.train.loop import Training  # noqa: E402

BAR = 1.05
BATCH = 128


def network(depth: int) -> torch.nn.Module:
    """A plain CNN for 10 classes."""
    return build_model(PlainCNN(depth=depth), channels=3, image_size=32, num_classes=10)


def main() -> None:
    """Time steps in turns, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns that are counted")
    parser.add_argument("--steps", type=int, default=20, help="steps in a turn")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--views", type=int, default=4, help="views in the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num = BATCH * arguments.steps
    images = Images(
        pixels_NHWC=torch.randint(256, (num, 32, 32, 3), dtype=torch.uint8),
        labels_N=torch.arange(num) % 10,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        augment=Augment(shift=4, flip=True),
    )
    ensemble = Ensemble(tuple(network(depth) for depth in (8, 6, 4)), (0.5, 0.3, 0.2))
    cases, trainings = {}, {}
    for name, targets in (("labels", None), ("cached", "cached"), ("on-line", "online")):
        recipe = Recipe(
            epochs=1,
            batch_size=BATCH,
            precision=arguments.precision,
            targets=targets or "auto",
            views=arguments.views if targets == "cached" else None,
            augment=images.augment,
        )
        taught = (KD(), ensemble) if targets else (None, None)
        lesson = Lesson(images, recipe, 0, 10, *taught)
        training = trainings[name] = Training(network(2), lesson, Plan(recipe, arguments.steps))
        training.enter(0)
        cases[name] = lambda training=training: [
            training.step(step) for step in range(arguments.steps)
        ]
    making = Recipe(epochs=1, targets="cached", views=1, precision=arguments.precision)
    cases["making a table of one view"] = lambda: Lesson(images, making, 0, 10, KD(), ensemble)
    seconds = in_turns(cases, arguments.rounds)
    print(f"{machine()}; {arguments.precision}, batch {BATCH}, n = {arguments.rounds}\n")
    print("| targets | CPU ms a step | x labels alone | bar |\n| --- | --- | --- | --- |")
    for name, times in seconds.items():
        bar = BAR if name == "cached" else ""
        each = 1e3 * statistics.median(times) / arguments.steps
        print(f"| {name} | {each:.1f} | {ratios(seconds, name, 'labels')} | {bar} |")


if __name__ == "__main__":
    main()
