"""Choose the device for training, and configure PyTorch for the whole process."""

import os

import torch

from kd.component import ConfigError
from kd.recipe import Recipe
from kd.train import ranks

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
"""The values of `recipe.memory_format`."""


def prepare(recipe: Recipe) -> str:
    """Set threads, determinism and the precision of fp32 operations in this process.

    Returns:
        The device to train on: "cpu" or "cuda".

    Raises:
        ConfigError: this machine lacks the devices or the precision that the recipe asks for.
    """
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(recipe.deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    device = chosen(recipe)
    if device == "cuda":
        if ranks.launched():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # By default PyTorch runs fp32 convolutions in TF32, so fp32 would mean one thing on a
        # CPU and another on a GPU.
        tf32 = recipe.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = not recipe.deterministic
        if recipe.deterministic:  # read when cuBLAS starts; older ones vary without it
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    elif recipe.precision == "tf32":
        raise ConfigError("recipe.precision is 'tf32', which needs a GPU: set it to fp32")
    return device


def chosen(recipe: Recipe) -> str:
    """The device to train on: "cpu" or "cuda".

    Raises:
        ConfigError: the recipe asks for a GPU and there is none, or for more than there are.
    """
    has_gpu = torch.cuda.is_available()
    if recipe.device == "cuda" and not has_gpu:
        raise ConfigError("recipe.device is 'cuda', but there is no GPU here: set it to auto")
    if recipe.device == "cpu" or not has_gpu:
        return "cpu"
    visible = torch.cuda.device_count()
    if recipe.devices > visible:
        raise ConfigError(
            f"recipe.devices is {recipe.devices}, but only {visible} GPU(s) are visible here: "
            "lower it, or, where the flow runs the stage, set its `meta: {gpu: ...}` in dvc.yaml "
            f"to {recipe.devices}"
        )
    return "cuda"


def reseed(device: torch.device, seed: int) -> None:
    """Like torch.manual_seed, but only for the generators that training on `device` uses.

    Called at each step: takes 1 us; torch.manual_seed takes 100 us on a machine without a GPU.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
