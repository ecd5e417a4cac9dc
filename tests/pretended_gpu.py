"""A GPU that is not there: its tensors say "cuda", and the CPU computes with them.

It refuses a tensor of the host among its own, as a GPU does, and knows what makes the host wait;
its numbers are a CPU's.  What it cannot show: speed, memory, bf16 (autocast does
nothing here), compiled networks, and whether a GPU has a kernel for all that is asked of it.

    python -m pytest -p tests.pretended_gpu tests/train/test_devices.py
    python -m tests.pretended_gpu STAGE [NAME]     # `python -m kd` where there is a GPU
    python -m tests.pretended_gpu benchmarks/grouped.py --device cuda     # any script

For processes of their own: PyTorch has one more kind of device once this is imported.
"""

import runpy
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")

SHOWN = torch.device("cuda:0")
INSIDE = torch.device("pretended:0")
"""Its name inside PyTorch, which asks the driver about whatever is called cuda."""
TELLS = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2"}
"""Operations whose result, or whose result's shape, the host wants to know."""
PLACED = {"_to_copy", "copy_", "index", "index_put_"}
"""Operations that take tensors of both devices; indices of the host make it wait."""


class Far(Tensor):
    """A tensor on the GPU; `near` holds its numbers."""

    device = property(lambda self: SHOWN)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near):
        made = Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=INSIDE,
        )
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})

    # Where a tensor has these two, nn.Module.to puts a new one in its place.
    def __tensor_flatten__(self):
        return ["near"], None

    @staticmethod
    def __tensor_unflatten__(parts, *_):
        return Far(parts["near"])

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = Far(self.near.clone()).requires_grad_(self.requires_grad)
            memo[id(self)]._is_param = getattr(self, "_is_param", False)
        return memo[id(self)]

    def untyped_storage(self):
        return self.near.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError("a GPU's tensor is no array: call .cpu() first")


def computed(func, args, kwargs):
    """What an operation gives, on the device on which it would be."""
    name = func.overloadpacket.__name__
    if name == "is_pinned":
        return False
    given = tree_leaves((args, kwargs))
    tensors = [each for each in given if isinstance(each, Tensor)]
    far = [each for each in tensors if isinstance(each, Far)]
    devices = [each for each in given if isinstance(each, torch.device)]
    to_far = devices[-1].type != "cpu" if devices else bool(far)
    host = [each for each in tensors if not isinstance(each, Far)]
    if far and name not in PLACED and any(each.dim() for each in host):  # numbers may be sent
        raise RuntimeError(f"{name}: a tensor of the host among a GPU's")
    if Gpu.waiting_is_an_error and waits(name, args, kwargs, far, host, to_far):
        raise RuntimeError(f"{name}: the host waits for the GPU")
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    made = func(*tree_map(near, args), **tree_map(near, kwargs))
    if name == "copy_":
        return args[0]
    changed = {id(near(each)): each for each in tensors}

    def placed(value):
        if not isinstance(value, Tensor):
            return value
        return changed.get(id(value), Far(value) if to_far else value)

    return tree_map(placed, made)


def waits(name, args, kwargs, far, host, to_far):
    """Whether the host has to wait until the GPU has done what it was told before."""
    if name in ("_to_copy", "copy_"):
        crosses = bool(host) if to_far else bool(far)
        return crosses and not (kwargs.get("non_blocking") or args[2:3] == (True,))
    if name in ("index", "index_put_"):
        return bool(far) and any(
            not isinstance(each, Far) or each.dtype == torch.bool
            for each in args[1]
            if each is not None
        )
    return bool(far) and name in TELLS


def near(value):
    """What the CPU computes with in the place of an argument."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.near if isinstance(value, Far) else value


class Made(TorchDispatchMode):
    """Sees the operations that make tensors of nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class Named(TorchFunctionMode):
    """Calls the device by its name inside PyTorch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(inside, args), tree_map(inside, kwargs or {})
        if func is Tensor.cuda:
            return args[0].to(INSIDE)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == INSIDE:
            return func(*args, **kwargs | {"device": "cpu"}).to(INSIDE)  # these ask no mode
        return func(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})


def inside(value):
    """A device by its name inside PyTorch; anything else as it is."""
    if isinstance(value, str | torch.device) and str(value).partition(":")[0] == "cuda":
        return INSIDE
    return value


class Autocast(torch.autocast):
    """Does nothing for the GPU."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


class Gpu:
    """What is said to the GPU."""

    waiting_is_an_error = False

    @classmethod
    def set_sync_debug_mode(cls, mode):
        cls.waiting_is_an_error = mode == "error"


PATCHES = {
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.get_device_name": lambda device=None: "pretended",
    "torch.cuda.manual_seed": lambda seed: None,  # it draws from the CPU's generator
    "torch.cuda.synchronize": lambda device=None: None,
    "torch.cuda.empty_cache": lambda: None,
    "torch.cuda.memory_reserved": lambda device=None: 0,
    "torch.cuda.memory_allocated": lambda device=None: 0,
    "torch.cuda.mem_get_info": lambda device=None: (2**37, 2**37),
    "torch.cuda.set_sync_debug_mode": Gpu.set_sync_debug_mode,
    "torch.cuda.is_current_stream_capturing": lambda: False,  # what AdamW of PyTorch 2.11 asks
    "torch.autocast": Autocast,
    # In inference mode, vmap could wrap none of its tensors.
    "torch.inference_mode": lambda mode=True: torch.no_grad() if mode else nullcontext(),
    "torch.Tensor.pin_memory": lambda tensor: tensor,
}


@contextmanager
def gpu():
    """While the block runs, there is a GPU."""
    with ExitStack() as stack:
        for name, value in PATCHES.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(Named())
        stack.enter_context(Made())
        yield


def pytest_load_initial_conftests():
    """Tests are collected where there is a GPU."""
    torch.cuda.is_available = PATCHES["torch.cuda.is_available"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup():
    with gpu():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    with gpu():
        return (yield)


if __name__ == "__main__":
    from kd.__main__ import main

    with gpu():
        if sys.argv[1].endswith(".py"):
            del sys.argv[0]
            ended = 0
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            ended = main()
    sys.exit(ended)
