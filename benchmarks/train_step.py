"""A training step in each memory format and precision, and how much of the machine it uses.

    python benchmarks/train_step.py --rounds 5 [--compile] [--threads 2]
    python benchmarks/train_step.py --device cuda --compile --steps 50

Steps of fit()'s own loop on labels, 32 x 32 images in batches of 128, against the same step in
plain fp32 with PyTorch's default memory format and optimiser.  "peak" is the share of the fastest
matrix product of the same run (1,024 x 1,024, fp32), counting 6 operations for each multiply-add
of the network.
With --parallel, two networks train in two processes of one thread each, against one after the
other with two threads: how the flow should share out this machine's cores.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
sys.path.insert(0, str(PROJECT / "benchmarks"))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from side_by_side import in_turns, machine, ratios  # noqa: E402

from kd.data import Augment, Images  # noqa: E402
from kd.models import CifarResNet, Model, PlainCNN, build_model, count  # noqa: E402
from kd.recipe import SGD, Recipe  # noqa: E402
from kd.train import Lesson, Plan  # noqa: E402
from kd.train.device import prepare  # noqa: E402
from kd.train.loop import Training  # noqa: E402
from kd.train.speed import finish, let_go  # noqa: E402

MODELS: dict[str, Model] = {
    "CNN-2": PlainCNN(depth=2),
    "CNN-4": PlainCNN(depth=4),
    "CNN-8": PlainCNN(depth=8),
    "CNN-10": PlainCNN(depth=10),
    "ResNet-8": CifarResNet(depth=8),
    "ResNet-20": CifarResNet(depth=20),
    "ResNet-56": CifarResNet(depth=56),
}
BATCH = 128


def prepared(model: Model, recipe: Recipe, device: str) -> Training:
    """A network about to take its first step."""
    torch.manual_seed(0)
    network = build_model(model, channels=3, image_size=32, num_classes=10).to(device)
    images = Images(
        pixels_NHWC=torch.randint(256, (1024, 32, 32, 3), dtype=torch.uint8, device=device),
        labels_N=torch.arange(1024, device=device) % 10,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        augment=Augment(shift=4, flip=True),
    )
    lesson = Lesson(images, recipe, 0, 10, None, None)
    return Training(network, lesson, Plan(recipe, 10**6))


def taken(training: Training, num: int) -> None:
    """Take `num` steps."""
    for step in range(num):
        training.step(step)
    finish(training.watch.losses_S.device)


def main() -> None:
    """Time steps in turns, and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns that are counted")
    parser.add_argument("--steps", type=int, default=5, help="steps in a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="compiled networks too")
    parser.add_argument(
        "--parallel", action="store_true", help="two networks at once, and no more"
    )
    arguments = parser.parse_args()
    prepare(Recipe(device=arguments.device, threads=arguments.threads))
    torch._dynamo.config.fail_on_recompile_limit_hit = (
        True  # or it would time what is not compiled
    )
    print(f"{machine()}; batch {BATCH}, n = {arguments.rounds}\n")
    if arguments.parallel:
        print_parallel(arguments)
        return
    print("| model | step | ms | times plain | images/s | peak |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in arguments.models:
        let_go(torch.device(arguments.device))  # PyTorch compiles only so many forms of one call
        print_formats(name, arguments)


def print_formats(name: str, arguments: argparse.Namespace) -> None:
    """The rows of one model."""
    last = Recipe(epochs=1, batch_size=BATCH)
    half = replace(last, precision="bf16")
    unfused = replace(last, optimizer=SGD(fused=False))
    forms = {
        "plain": replace(unfused, memory_format="contiguous"),
        "channels_last": unfused,
        "channels_last, fused": last,
        "channels_last, fused, bf16": half,
    }
    if arguments.compile:
        forms["channels_last, fused, compiled"] = replace(last, compile=True)
        forms["channels_last, fused, bf16, compiled"] = replace(half, compile=True)
    cases = {}
    for form, recipe in forms.items():
        training = prepared(MODELS[name], recipe, arguments.device)
        cases[form] = partial(taken, training, arguments.steps)
    side = torch.rand(1024, 1024, device=arguments.device)

    def product() -> None:
        for _ in range(8):
            side @ side
        finish(side.device)

    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    seconds = in_turns({**cases, "product": product}, arguments.rounds, clock)
    fastest = 8 * 2 * 1024**3 / min(seconds["product"])
    network = build_model(MODELS[name], channels=3, image_size=32, num_classes=10)
    operations = 6 * count(network, (3, 32, 32)).multiply_adds * BATCH * arguments.steps
    for form in [each for each in cases if each in seconds]:
        median = statistics.median(seconds[form])
        print(
            f"| {name} | {form} | {1e3 * median / arguments.steps:.2f} "
            f"| {ratios(seconds, 'plain', form)} | {BATCH * arguments.steps / median:,.0f} "
            f"| {operations / median / fastest:.0%} |",
            flush=True,
        )


def print_parallel(arguments: argparse.Namespace) -> None:
    """Wall-clock time of two trainings, one after the other and side by side."""
    print("| two of | one after the other, 2 threads: s | at once, 1 thread each: s | ratio |")
    print("| --- | --- | --- | --- |")
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        for name in arguments.models:
            after, at_once = [], []
            for turn in range(arguments.rounds + 1):
                alone = [pool.apply(timed, (name, 2, arguments.steps)) for _ in range(2)]
                both = pool.starmap(timed, [(name, 1, arguments.steps)] * 2, 1)
                if turn:
                    after.append(sum(alone))
                    at_once.append(max(both))
            ratio = ratios({"after": after, "at once": at_once}, "after", "at once")
            medians = statistics.median(after), statistics.median(at_once)
            print(f"| {name} | {medians[0]:.2f} | {medians[1]:.2f} | {ratio} |", flush=True)


def timed(name: str, threads: int, num: int) -> float:
    """Wall-clock seconds of `num` steps in this process, after one that is not counted."""
    torch.set_num_threads(threads)
    recipe = Recipe(epochs=1, batch_size=BATCH)
    training = prepared(MODELS[name], recipe, "cpu")
    taken(training, 1)
    started = time.perf_counter()
    taken(training, num)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
