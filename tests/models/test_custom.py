import pytest

from kd.component import ConfigError
from kd.models import CustomModel, build_model


def _build(name: str, **args: object) -> object:
    model = CustomModel(path=f"tests.models.toys:{name}", args=args)
    return build_model(model, channels=3, image_size=8, num_classes=2)


def test_a_users_model_is_told_what_it_names() -> None:
    network = _build("Tiny", width=6)
    assert (network.conv.in_channels, network.linear.out_features) == (3, 2)
    assert network.conv.out_channels == 6
    assert _build("from_keywords").conv.out_channels == 8


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("nobody", {}, "has no 'nobody'"),
        ("Tiny", {"depth": 3}, "cannot be called with"),
        ("NOT_A_FUNCTION", {}, "names a int"),
        ("no_module", {}, "returned a int"),
        ("seven_classes", {}, r"returns \(2, 7\) in training mode"),
        ("WithAuxiliary", {}, "returns tuple in training mode"),
        ("Squeezing", {}, r"returns \(2,\) in evaluation mode; one image and 2 classes need one"),
        ("Tiny", {"channels": 1}, "cannot take images of 3 x 8 x 8"),
    ],
)
def test_what_is_no_model_for_these_images_is_refused(
    name: str, args: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _build(name, **args)
