"""Where a network trains, and what of PyTorch is set for a whole process before it does."""

import os

import torch

from kd.component import ConfigError
from kd.recipe import Recipe
from kd.train import ranks

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
"""What `recipe.memory_format` names."""


def prepare(recipe: Recipe) -> str:
    """Set threads, determinism and the arithmetic of fp32 in this process.

    Returns:
        Where to train: "cpu" or "cuda".

    Raises:
        ConfigError: the recipe wants devices, or arithmetic, that are not here.
    """
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(recipe.deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    device = chosen(recipe)
    if device == "cuda":
        if ranks.launched():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # PyTorch lets convolutions round to TF32 unasked, which would make fp32 mean one thing on
        # a CPU and another on a GPU.
        tf32 = recipe.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = not recipe.deterministic
        if recipe.deterministic:  # read when cuBLAS starts; old ones sum in any order without it
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    elif recipe.precision == "tf32":
        raise ConfigError("recipe.precision is 'tf32', which GPUs alone have: set it to fp32")
    return device


def chosen(recipe: Recipe) -> str:
    """Where to train: "cpu" or "cuda".

    Raises:
        ConfigError: there is no GPU, or there are too few.
    """
    has_gpu = torch.cuda.is_available()
    if recipe.device == "cuda" and not has_gpu:
        raise ConfigError("recipe.device is 'cuda', but there is no GPU here: set it to auto")
    if recipe.device == "cpu" or not has_gpu:
        return "cpu"
    visible = torch.cuda.device_count()
    if recipe.devices > visible:
        raise ConfigError(
            f"recipe.devices is {recipe.devices}, but only {visible} GPU(s) can be seen here: "
            "lower it, or, where the flow runs the stage, set its `meta: {gpu: ...}` in dvc.yaml "
            f"to {recipe.devices}"
        )
    return "cuda"


def reseed(device: torch.device, seed: int) -> None:
    """As torch.manual_seed, for the generators that training on `device` draws from.

    Called at each step: 1 us, where torch.manual_seed takes a hundred on a machine without a GPU.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
