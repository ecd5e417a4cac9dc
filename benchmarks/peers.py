"""One pass of knowledge distillation, this library's loop and its peers', side by side.

    python benchmarks/peers.py --rounds 5
    PYTHONPATH=... python benchmarks/peers.py       # with torchdistill, where it is installed

The same networks, images, batch size and loss (T = 4, alpha = 0.9), one thread, CPU seconds.
"plain loop" is what one writes without a library: PIL images, torchvision's random crop and flip,
a DataLoader, teacher under no_grad, one optimiser step a batch.  torchdistill runs through its
own boxes, as its examples do.  A further peer is a function in PEERS that gives back a callable.
"""

import argparse
import logging
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
sys.path.insert(0, str(PROJECT / "benchmarks"))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from side_by_side import in_turns, machine, ratios  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset, RandomSampler  # noqa: E402
from torchvision import transforms  # noqa: E402

from kd.data import Augment, Images  # noqa: E402
from kd.ensemble import Ensemble  # noqa: E402
from kd.methods import KD  # noqa: E402
from kd.models import CifarResNet, PlainCNN, build_model  # noqa: E402
from kd.recipe import SGD, Recipe  # noqa: E402
from kd.train import fit  # noqa: E402
from kd.train.targets import InMemory  # noqa: E402

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
BATCH = 128
PAIRS = {
    "CNN-10 -> CNN-2": (PlainCNN(depth=10), PlainCNN(depth=2), 2560),
    "ResNet-56 -> ResNet-8": (CifarResNet(depth=56), CifarResNet(depth=8), 1280),
}
BARS = {("cached", "fp32"): 6.0, ("cached", "bf16"): 9.0, ("online", "fp32"): 1.5} | {
    ("online", "bf16"): 2.4
}


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """Images and labels as torchvision's data sets give them: one PIL image at a time."""

    def __init__(self, images: Images) -> None:
        self.pixels = images.pixels_NHWC.numpy()
        self.labels = images.labels_N.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


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
    teacher: nn.Module, student: nn.Module, images: Images, targets: str, precision: str
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


def plain_loop(teacher: nn.Module, student: nn.Module, images: Images) -> Callable[[], object]:
    """What one writes without a library."""
    loader = DataLoader(Pictures(images), BATCH, shuffle=True)
    optimizer = torch.optim.SGD(
        student.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    teacher.eval()

    def one_pass() -> None:
        student.train()
        for pictures, labels in loader:
            with torch.no_grad():
                soft = F.softmax(teacher(pictures) / 4.0, dim=1)
            logits = student(pictures)
            divergence = F.kl_div(F.log_softmax(logits / 4.0, 1), soft, reduction="batchmean")
            loss = 0.9 * 16 * divergence + 0.1 * F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return one_pass


def torchdistill_loop(
    teacher: nn.Module, student: nn.Module, images: Images
) -> Callable[[], object]:
    """Its distillation box with its KD loss, as in its CIFAR examples."""
    from torchdistill.core.distillation import get_distillation_box

    logging.getLogger("torchdistill").setLevel(logging.WARNING)
    kd_loss = {
        "key": "KDLoss",
        "kwargs": {
            "student_module_path": ".",
            "student_module_io": "output",
            "teacher_module_path": ".",
            "teacher_module_io": "output",
            "temperature": 4.0,
            "alpha": 0.1,
            "reduction": "batchmean",
        },
    }
    sgd = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    loader = {
        "dataset_id": "train",
        "sampler": {"class_or_func": RandomSampler},
        "kwargs": {"batch_size": BATCH, "num_workers": 0},
    }
    plain = {"forward_proc": "forward_batch_only", "wrapper": None}
    config = {
        "num_epochs": 1,
        "train_data_loader": loader,
        "val_data_loader": loader,
        "teacher": {**plain, "requires_grad": False},
        "student": {**plain, "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": sgd},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": kd_loss, "weight": 1.0}}},
        },
    }
    box = get_distillation_box(
        teacher, student, {"train": Pictures(images)}, config, torch.device("cpu"), None, False, 1
    )

    def one_pass() -> None:
        box.pre_epoch_process(epoch=0)
        for pictures, labels, supplement in box.train_data_loader:
            box.pre_forward_process()
            loss = box.forward_process(pictures, labels, supplement)
            box.post_forward_process(loss=loss)
        box.post_epoch_process()

    return one_pass


PEERS = {"plain loop": plain_loop, "torchdistill": torchdistill_loop}


def main() -> None:
    """Time every pair, and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns that are counted")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--small", action="store_true", help="a tenth of the images: a trial")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}; CPU s of one pass, batch {BATCH}, n = {arguments.rounds}\n")
    for name, (teacher, student, num) in PAIRS.items():
        num = num // 10 if arguments.small else num
        report(name, teacher, student, num, arguments)


def report(
    name: str,
    teacher: PlainCNN | CifarResNet,
    student: PlainCNN | CifarResNet,
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

    def network(model: PlainCNN | CifarResNet) -> nn.Module:
        return build_model(model, channels=3, image_size=32, num_classes=10)

    peers, cases = [], {}
    for peer, make in PEERS.items():
        try:
            cases[peer] = make(network(teacher), network(student), images)
            peers.append(peer)
        except ImportError as error:
            print(f"{peer} is absent: {error}")
    for targets in ("cached", "online"):
        for precision in arguments.precisions:
            cases[f"kd, {targets}, {precision}"] = ours(
                network(teacher), network(student), images, targets, precision
            )
    seconds = in_turns(cases, arguments.rounds)
    best = min(peers, key=lambda peer: statistics.median(seconds[peer]))
    print(f"**{name}**, {num} images\n")
    print(f"| loop | CPU s | {best} / it | bar |\n| --- | --- | --- | --- |")
    for case, times in seconds.items():
        bar = BARS.get(tuple(case.split(", ")[1:]), "")  # type: ignore[call-overload]
        ratio = ratios(seconds, best, case)
        print(f"| {case} | {statistics.median(times):.2f} | {ratio} | {bar} |")
    print()


if __name__ == "__main__":
    main()
