import torch
from torch import Tensor, nn

from kd.models import CustomModel, build_model, count, untouched
from tests.models.toys import Noisy


def test_trying_a_network_leaves_it_as_it_was_built() -> None:
    torch.manual_seed(0)
    built = Noisy(num_classes=2)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    model = CustomModel(path="tests.models.toys:Noisy")
    tried = build_model(model, channels=3, image_size=4, num_classes=2)
    assert torch.equal(torch.rand(3), drawn)
    assert all(torch.equal(a, b) for a, b in zip(
        built.state_dict().values(), tried.state_dict().values(), strict=True))  # fmt: skip
    assert tried.training


def test_modes_are_restored_one_by_one_also_after_an_error() -> None:
    network = Noisy(num_classes=2)
    network.norm.eval()  # frozen by its user
    try:
        with untouched(network):
            network.train()
            network(torch.randn(2, 3, 4, 4))
            raise RuntimeError
    except RuntimeError:
        pass
    assert (network.training, network.norm.training) == (True, False)
    assert network.calls == 0


def test_shared_parameters_count_once_and_work_twice() -> None:
    linear = nn.Linear(12, 12, bias=False)
    network = nn.Sequential(nn.Flatten(), linear, linear)
    counts = count(network, (3, 2, 2))
    assert counts.parameters == 144
    assert counts.multiply_adds == 288


class _Attention(nn.Module):
    """One layer of a transformer over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(2).mT)


def test_attention_is_counted_though_torch_fuses_it() -> None:
    tokens, width = 9, 8
    projections = tokens * 4 * width**2
    attention = 2 * tokens**2 * width
    perceptron = tokens * 2 * width * 16
    counts = count(_Attention(), (8, 3, 3))
    assert counts.multiply_adds == projections + attention + perceptron


def test_a_network_without_parameters_has_none() -> None:
    assert count(nn.Flatten(), (3, 2, 2)).parameters == 0
