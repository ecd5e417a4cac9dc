"""Trained: what is exported fits together, and normalises as the training did."""

import numpy as np
import pytest
import torch
from torch import nn

from kd.component import ConfigError
from kd.data import Images
from kd.exporters import Trained
from kd.exporters.trained import evenly

PICTURES_NHWC = torch.randint(
    0, 256, (7, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
GIVEN = {
    "module": nn.Sequential(nn.Flatten(), nn.Linear(192, 2)),
    "image_size": 8,
    "class_names": ("cat", "dog"),
    "mean": (0.481, 0.457, 0.408),
    "std": (0.269, 0.261, 0.276),
}


def test_pictures_are_normalised_to_the_bit_as_in_training() -> None:
    mean, std = GIVEN["mean"], GIVEN["std"]
    images = Images(
        pixels_NHWC=PICTURES_NHWC, labels_N=torch.zeros(7, dtype=torch.int64), mean=mean, std=std
    )
    normalised = Trained(**GIVEN).normalise(PICTURES_NHWC)
    assert torch.equal(normalised, images.batch(torch.arange(7)))
    assert normalised.stride() == images.batch(torch.arange(7)).stride()


def test_a_served_network_goes_from_pictures_to_probabilities() -> None:
    trained = Trained(**GIVEN)
    weight, bias = (
        each.detach().numpy().astype(np.float64) for each in trained.module.parameters()
    )
    expected = []
    for picture_HWC in PICTURES_NHWC.numpy().astype(np.float64):
        image_CHW = ((picture_HWC / 255 - GIVEN["mean"]) / GIVEN["std"]).transpose(2, 0, 1)
        logits_C = weight @ image_CHW.reshape(-1) + bias
        expected.append(np.exp(logits_C) / np.exp(logits_C).sum())
    found_NC = trained.served(picture_input=True)(PICTURES_NHWC)
    np.testing.assert_allclose(found_NC.detach().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("names", [("cat",), ("cat", "dog", "cow")])
def test_class_names_of_another_number_than_logits_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"gives \(1, 2\).*there are {len(names)} class names"):
        Trained(**{**GIVEN, "class_names": names})


@pytest.mark.parametrize(
    "wrong",
    [PICTURES_NHWC[..., :1], PICTURES_NHWC[:, :4], PICTURES_NHWC.float(), PICTURES_NHWC[:0]],
    ids=["channels", "size", "type", "none"],
)
def test_calibration_pictures_that_do_not_fit_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"calibration pictures are .* needs torch.uint8"):
        Trained(**GIVEN, calibration_NHWC=wrong)


def test_calibration_is_spread_over_the_training_data() -> None:
    assert evenly(7, 3).tolist() == [0, 2, 4]
    assert evenly(3, 7).tolist() == [0, 1, 2]
    trained = Trained(**GIVEN, calibration_NHWC=PICTURES_NHWC)
    assert torch.equal(trained.calibration(3, picture_input=True), PICTURES_NHWC[[0, 2, 4]])
