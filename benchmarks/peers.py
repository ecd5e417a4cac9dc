"""One pass of knowledge distillation, this library's loop and its peers', side by side.

    python benchmarks/peers.py --rounds 5
    PYTHONPATH=... python benchmarks/peers.py --checkout mdistiller=... --checkout repdistiller=...

The same networks, images, batch size and loss (T = 4, alpha = 0.9), one thread, CPU seconds.
"plain loop" is what one writes without a library.  torchdistill is imported, from PYTHONPATH say;
mdistiller (megvii-research on GitHub, needs yacs and tqdm) and RepDistiller (HobbitLong) are no
packages and run from the checkouts named.  A peer that is absent is named and left out.  A further
peer is a function in PEERS (benchmarks/peer_loops.py) that gives back a callable.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
sys.path.insert(0, str(PROJECT / "benchmarks"))

import torch  # noqa: E402
from peer_loops import BATCH, MEAN, PEERS, STD  # noqa: E402
from side_by_side import in_turns, machine, ratios  # noqa: E402
from torch import nn  # noqa: E402

from kd.data import Augment, Images  # noqa: E402
from kd.ensemble import Ensemble  # noqa: E402
from kd.methods import KD  # noqa: E402
from kd.models import CifarResNet, Model, PlainCNN, build_model  # noqa: E402
from kd.recipe import SGD, Recipe  # noqa: E402
from kd.train import fit  # noqa: E402
from kd.train.targets import InMemory  # noqa: E402

CHECKOUTS = ("mdistiller", "repdistiller")
Targets = Literal["cached", "online"]
Precision = Literal["fp32", "bf16"]
PAIRS: dict[str, tuple[Model, Model, int]] = {
    "CNN-10 -> CNN-2": (PlainCNN(depth=10), PlainCNN(depth=2), 2560),
    "ResNet-56 -> ResNet-8": (CifarResNet(depth=56), CifarResNet(depth=8), 1280),
}
BARS = {
    "kd, cached, fp32": 6.0,
    "kd, cached, bf16": 9.0,
    "kd, online, fp32": 1.5,
    "kd, online, bf16": 2.4,
}


class Kept(InMemory):
    """Tables that are made once and then kept, as the ones on disk are."""

    def __init__(self) -> None:
        self.made: dict[str, torch.Tensor] = {}

    def table(self, record, shape, fill):  # type: ignore[no-untyped-def]
        """See `kd.train.targets.Tables`."""
        if str(record) not in self.made:
            self.made[str(record)] = super().table(record, shape, fill)
        return self.made[str(record)]


def ours(
    teacher: nn.Module, student: nn.Module, images: Images, targets: Targets, precision: Precision
) -> Callable[[], object]:
    """fit() for one epoch."""
    tables = Kept()
    recipe = Recipe(
        epochs=1,
        batch_size=BATCH,
        optimizer=SGD(lr=0.05),
        augment=images.augment,
        views=1 if targets == "cached" else None,
        precision=precision,
        targets=targets,
    )
    return lambda: fit(
        student,
        images,
        replace(recipe),
        seed=0,
        num_classes=10,
        method=KD(temperature=4.0, alpha=0.9),
        ensemble=Ensemble((teacher,), (1.0,)),
        tables=tables,
    )


def checkout(text: str) -> tuple[str, str]:
    """NAME=PATH of --checkout, the path made absolute."""
    name, _, path = text.partition("=")
    if name not in CHECKOUTS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(CHECKOUTS)}")
    if not path or not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"{name}: there is no folder {path!r}")
    return name, str(Path(path).resolve())


def main() -> None:
    """Time every pair, and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns that are counted")
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"]
    )
    parser.add_argument("--small", action="store_true", help="a tenth of the images: a trial")
    parser.add_argument(
        "--checkout",
        type=checkout,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help=f"where the sources of {' or '.join(CHECKOUTS)} are; repeat it for both",
    )
    arguments = parser.parse_args()
    # Last, since their top-level modules have names as plain as `models` and `helper`.
    sys.path.extend(path for _, path in arguments.checkout)
    torch.set_num_threads(1)
    print(f"{machine()}; CPU s of one pass, batch {BATCH}, n = {arguments.rounds}\n")
    for name, (teacher, student, num) in PAIRS.items():
        num = num // 10 if arguments.small else num
        report(name, teacher, student, num, arguments)


def report(
    name: str,
    teacher: Model,
    student: Model,
    num: int,
    arguments: argparse.Namespace,
) -> None:
    """The table of one pair of networks."""
    generator = torch.Generator().manual_seed(0)
    images = Images(
        pixels_NHWC=torch.randint(256, (num, 32, 32, 3), dtype=torch.uint8, generator=generator),
        labels_N=torch.arange(num) % 10,
        mean=MEAN,
        std=STD,
        augment=Augment(shift=4, flip=True),
    )

    def network(model: Model) -> nn.Module:
        return build_model(model, channels=3, image_size=32, num_classes=10)

    peers, cases = [], {}
    for peer, make in PEERS.items():
        try:
            cases[peer] = make(network(teacher), network(student), images)
            peers.append(peer)
        except ImportError as error:
            print(f"{peer} is absent: {error}")
    both: tuple[Targets, ...] = ("cached", "online")
    for targets in both:
        for precision in arguments.precisions:
            cases[f"kd, {targets}, {precision}"] = ours(
                network(teacher), network(student), images, targets, precision
            )
    seconds = in_turns(cases, arguments.rounds)
    peers = [peer for peer in peers if peer in seconds]
    best = min(peers, key=lambda peer: statistics.median(seconds[peer]))
    print(f"**{name}**, {num} images\n")
    print(f"| loop | CPU s | {best} / it | bar |\n| --- | --- | --- | --- |")
    for case, times in seconds.items():
        ratio = ratios(seconds, best, case)
        print(f"| {case} | {statistics.median(times):.2f} | {ratio} | {BARS.get(case, '')} |")
    print()


if __name__ == "__main__":
    main()
