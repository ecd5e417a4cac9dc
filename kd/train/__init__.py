"""fit(), the only training loop, and its parts."""

from kd.train.lesson import Lesson, mixed
from kd.train.loop import LossWatch, NonFiniteLoss, TeacherChanged, fit
from kd.train.plan import Batch, Plan, batch_of, steps_in_epoch
from kd.train.state import Checkpoint, Epoch, Stopped
from kd.train.targets import Tables

__all__ = [
    "Batch",
    "Checkpoint",
    "Epoch",
    "Lesson",
    "LossWatch",
    "NonFiniteLoss",
    "Plan",
    "Stopped",
    "Tables",
    "TeacherChanged",
    "batch_of",
    "fit",
    "mixed",
    "steps_in_epoch",
]
