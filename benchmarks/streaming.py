"""Images held on the device against images read from disk as batches need them: a step's time.

    python benchmarks/streaming.py --rounds 5 [--device cuda --batch 256 --side 224 --images 8192]

The same steps of ResNet-20 on labels; the file was just written, so it lies in the system's cache:
what is measured is looking images up on the host and bringing them to the device, not the disk.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
sys.path.insert(0, str(PROJECT / "benchmarks"))

import torch  # noqa: E402
from side_by_side import in_turns, machine, ratios  # noqa: E402

from kd.data import Augment, Images  # noqa: E402
from kd.models import CifarResNet, build_model  # noqa: E402
from kd.recipe import Recipe  # noqa: E402
from kd.train import Lesson, Plan  # noqa: E402
from kd.train.device import prepare  # noqa: E402
from kd.train.loop import Training  # noqa: E402
from kd.train.speed import finish  # noqa: E402


def steps_of(images: Images, recipe: Recipe, num: int) -> Callable[[], None]:
    """`num` steps, always the same ones."""
    side = images.image_shape[1]
    network = build_model(CifarResNet(depth=20), channels=3, image_size=side, num_classes=10)
    lesson = Lesson(images, recipe, 0, 10, None, None)
    training = Training(network.to(images.labels_N.device), lesson, Plan(recipe, num))

    def steps() -> None:
        for step in range(num):
            training.step(step)
        finish(images.labels_N.device)

    return steps


def main() -> None:
    """Time steps in turns, by the clock, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns that are counted")
    parser.add_argument("--steps", type=int, default=8, help="steps in a turn")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    augment = Augment(shift=4, flip=True)
    recipe = Recipe(
        epochs=1,
        batch_size=arguments.batch,
        augment=augment,
        precision=arguments.precision,
        device=arguments.device,
    )
    device = prepare(recipe)
    shape = (arguments.images, arguments.side, arguments.side, 3)
    labels_N = torch.arange(arguments.images, device=device) % 10
    with tempfile.TemporaryDirectory() as folder:
        numel = arguments.images * arguments.side**2 * 3
        file = str(Path(folder) / "images")
        mapped = torch.from_file(file, shared=True, size=numel, dtype=torch.uint8).view(shape)
        mapped.random_(256)
        streamed = Images(
            pixels_NHWC=mapped,
            labels_N=labels_N,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            augment=augment,
        )
        held = dataclasses.replace(streamed, pixels_NHWC=mapped.clone().to(device))
        cases = {
            "held on the device": steps_of(held, recipe, arguments.steps),
            "read from disk": steps_of(streamed, recipe, arguments.steps),
        }
        seconds = in_turns(cases, arguments.rounds, time.perf_counter)
    print(f"{machine()}; batch {arguments.batch} of {arguments.side} x {arguments.side}, ", end="")
    print(f"{arguments.precision}, n = {arguments.rounds}\n")
    print("| images | ms a step | x held |\n| --- | --- | --- |")
    for name, times in seconds.items():
        each = 1e3 * statistics.median(times) / arguments.steps
        print(f"| {name} | {each:.1f} | {ratios(seconds, name, 'held on the device')} |")


if __name__ == "__main__":
    main()
