"""Networks: images in, logits out.

A model is built by `build_model(PlainCNN(depth=2), channels=1, image_size=16, num_classes=10)`;
torch.manual_seed before fixes its weights.
"""

from kd.models.cifar_resnet import CifarResNet
from kd.models.custom import CustomModel
from kd.models.plain_cnn import PlainCNN
from kd.models.probe import Counts, build_model, count, untouched
from kd.models.torchvision_model import TorchvisionModel

Model = PlainCNN | CifarResNet | TorchvisionModel | CustomModel

__all__ = [
    "CifarResNet",
    "Counts",
    "CustomModel",
    "Model",
    "PlainCNN",
    "TorchvisionModel",
    "build_model",
    "count",
    "untouched",
]
