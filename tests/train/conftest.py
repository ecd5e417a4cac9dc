"""Each device that is here, made ready as a stage makes it."""

from collections.abc import Iterator

import pytest
import torch

from kd.recipe import Recipe
from kd.train.device import prepare

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
NO_MEMORY = pytest.mark.skipif(not torch.cuda.device_count(), reason="no GPU but a pretended one")


@pytest.fixture(autouse=True)
def as_in_a_stage() -> Iterator[None]:
    """fp32 is fp32 on a GPU, too, whichever test comes first; PyTorch repeats what it can."""
    if torch.cuda.is_available():
        prepare(Recipe(device="cuda"))
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def device(request: pytest.FixtureRequest) -> str:
    """cpu and, where there is one, cuda; PyTorch warns of what it cannot repeat to the bit."""
    prepare(Recipe(device=request.param))
    return request.param
