"""The peers' training loops, each built into a callable that trains a student for one pass.

All do the same work: the networks and images they are given, batches of 128 pictures (PIL images,
torchvision's random crop and flip, a DataLoader in this process), T = 4, 0.1 of the labels' loss
and 0.9 of the teacher's, SGD with Nesterov's momentum, the teacher in evaluation mode.  What a
peer's own loop measures beside (accuracies, meters) is its own and stays.  None of their code is
here: it is imported, and an ImportError says that it is absent.
"""

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from kd.data import Images

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
BATCH = 128
TEMPERATURE, HARD, SOFT = 4, 0.1, 0.9
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


class Pictures(Dataset[tuple[Tensor, int]]):
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

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class Instances(Pictures):
    """Pictures with their index, as mdistiller's and RepDistiller's CIFAR100Instance give them."""

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:  # type: ignore[override]
        return *super().__getitem__(index), index


class Paired(nn.Module):
    """A network in the form of a peer's own, which give features too: KD looks at none."""

    def __init__(self, network: nn.Module, pair: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.network = network
        self.pair = pair

    def forward(self, images: Tensor, **_asked: object) -> object:
        """The pair of logits and no features, in the peer's order."""
        return self.pair(self.network(images))


@contextmanager
def without_cuda() -> Iterator[None]:
    """Keep code written for a GPU on the CPU: it sees no GPU, and .cuda() does nothing."""
    with (
        mock.patch.object(Tensor, "cuda", lambda tensor, **_: tensor),
        mock.patch.object(torch.cuda, "is_available", return_value=False),
    ):
        yield


def plain_loop(teacher: nn.Module, student: nn.Module, images: Images) -> Callable[[], object]:
    """What one writes without a library."""
    loader = DataLoader(Pictures(images), BATCH, shuffle=True)
    optimizer = torch.optim.SGD(student.parameters(), **SGD)
    teacher.eval()

    def one_pass() -> None:
        student.train()
        for pictures, labels in loader:
            with torch.no_grad():
                soft = F.softmax(teacher(pictures) / TEMPERATURE, dim=1)
            logits = student(pictures)
            divergence = F.kl_div(
                F.log_softmax(logits / TEMPERATURE, 1), soft, reduction="batchmean"
            )
            loss = SOFT * TEMPERATURE**2 * divergence + HARD * F.cross_entropy(logits, labels)
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
    # The box (1.1.5) leaves the teacher's mode to its caller.  In training mode the batch norms
    # would take each batch's statistics and drift, which is other work than the other loops'.
    teacher.eval()
    kd_loss = {
        "key": "KDLoss",
        "kwargs": {
            "student_module_path": ".",
            "student_module_io": "output",
            "teacher_module_path": ".",
            "teacher_module_io": "output",
            "temperature": TEMPERATURE,
            "alpha": HARD,
            "beta": SOFT,
            "reduction": "batchmean",
        },
    }
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
        "optimizer": {"key": "SGD", "kwargs": dict(SGD)},
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


@without_cuda()
def mdistiller_loop(
    teacher: nn.Module, student: nn.Module, images: Images
) -> Callable[[], object]:
    """Its KD distiller, and each batch through its trainer's train_iter, as in its train_epoch.

    Of train_epoch the progress bar is left out, and what follows the pass: validation, logs and
    checkpoints.
    """
    # The trainer opens a TensorBoard log, which only train_epoch writes to.
    no_log = SimpleNamespace(SummaryWriter=lambda _path: None)
    sys.modules.setdefault("tensorboardX", no_log)  # type: ignore[arg-type]
    from mdistiller.distillers import distiller_dict
    from mdistiller.engine import trainer_dict
    from mdistiller.engine.cfg import CFG
    from mdistiller.engine.utils import AverageMeter

    config = CFG.clone()
    config.KD.TEMPERATURE = TEMPERATURE
    config.KD.LOSS.CE_WEIGHT, config.KD.LOSS.KD_WEIGHT = HARD, SOFT
    config.SOLVER.LR, config.SOLVER.MOMENTUM = SGD["lr"], SGD["momentum"]
    config.SOLVER.WEIGHT_DECAY = SGD["weight_decay"]
    config.LOG.PREFIX = "."  # a folder that exists: it would make one for its logs
    pair = [Paired(network, lambda logits: (logits, {})) for network in (student, teacher)]
    distiller = nn.DataParallel(distiller_dict["KD"](*pair, config))  # a pass-through on a CPU
    loader = DataLoader(Instances(images), BATCH, shuffle=True)
    trainer = trainer_dict["base"]("", distiller, loader, None, config)
    trainer.optimizer.param_groups[0]["nesterov"] = SGD["nesterov"]  # its config knows none

    @without_cuda()
    def one_pass() -> None:
        names = ("training_time", "data_time", "losses", "top1", "top5")
        meters = {name: AverageMeter() for name in names}
        distiller.train()
        for batch in trainer.train_loader:
            trainer.train_iter(batch, 1, meters)

    return one_pass


def repdistiller_loop(
    teacher: nn.Module, student: nn.Module, images: Images
) -> Callable[[], object]:
    """Its train_distill with its KD loss, set up as in its train_student.py."""
    from distiller_zoo import DistillKL
    from helper.loops import train_distill

    options = SimpleNamespace(distill="kd", gamma=HARD, alpha=SOFT, beta=0, print_freq=100)
    pair = [Paired(network, lambda logits: ([], logits)) for network in (student, teacher)]
    divergence = DistillKL(TEMPERATURE)
    criteria = nn.ModuleList([nn.CrossEntropyLoss(), divergence, divergence])
    loader = DataLoader(Instances(images), BATCH, shuffle=True)
    optimizer = torch.optim.SGD(student.parameters(), **SGD)

    @without_cuda()
    def one_pass() -> None:
        with redirect_stdout(io.StringIO()):  # it prints its progress between our tables
            train_distill(1, loader, nn.ModuleList(pair), criteria, optimizer, options)

    return one_pass


PEERS = {
    "plain loop": plain_loop,
    "torchdistill": torchdistill_loop,
    "mdistiller": mdistiller_loop,
    "RepDistiller": repdistiller_loop,
}
