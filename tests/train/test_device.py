"""What a process is set to before it trains."""

import pytest
import torch

from kd.component import ConfigError
from kd.train.device import prepare, reseed
from tests.learners import recipe


@pytest.fixture(autouse=True)
def as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", [True, False])
def test_threads_and_determinism_are_the_recipes(deterministic):
    assert prepare(recipe(device="cpu", threads=2, deterministic=deterministic)) == "cpu"
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled() == deterministic


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"device": "cuda"},
            r"recipe\.device is 'cuda', but there is no GPU here: set it to auto",
        ),
        ({"precision": "tf32"}, r"recipe\.precision is 'tf32', which needs a GPU"),
    ],
)
def test_what_a_machine_without_a_gpu_cannot_do_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        prepare(recipe(**changes))


def test_a_seed_gives_the_numbers_that_torch_manual_seed_gives():
    torch.manual_seed(7)
    wanted = torch.rand(5)
    reseed(torch.device("cpu"), 7)
    assert torch.rand(5).equal(wanted)
