"""Images: where they come from, how they are split and stored, and how they are batched.

record = prepare(Digits(), Splits(), image_size=16, channels=1, seed=0, folder=folder)
images = Images.load(folder, ("train", "pool"), augment=Augment(shift=2))
order_N = order_for(seed, epoch, len(images))
views_N = images.augment.views_for(seed, epoch, len(images))
batch = images.batch(order_N[:128], views_N[order_N[:128]])
"""

from kd.data.augment import Augment, key, order_for
from kd.data.copies import copy_warnings
from kd.data.custom import CustomDataset
from kd.data.digits import Digits
from kd.data.image_folder import ImageFolder
from kd.data.images import Images, sent
from kd.data.prepare import dark_warnings, prepare
from kd.data.raw import UNLABELLED, Raw
from kd.data.splits import Splits
from kd.data.torchvision_sets import Cifar10, Cifar100, FashionMnist

Dataset = Digits | Cifar10 | Cifar100 | FashionMnist | ImageFolder | CustomDataset

__all__ = [
    "UNLABELLED",
    "Augment",
    "Cifar10",
    "Cifar100",
    "CustomDataset",
    "Dataset",
    "Digits",
    "FashionMnist",
    "ImageFolder",
    "Images",
    "Raw",
    "Splits",
    "copy_warnings",
    "dark_warnings",
    "key",
    "order_for",
    "prepare",
    "sent",
]
