"""latency() counts what it says it counts, side by side."""

import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from kd.exporters import Onnx, Trained, latency

IMAGE_1CHW = torch.zeros(1, 1, 8, 8)


class Sleeping:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.calls = 0

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        self.calls += 1
        time.sleep(self.seconds)
        return images_BCHW


def test_median_and_tail_are_those_of_the_calls() -> None:
    found = latency({"fast": Sleeping(0.001), "slow": Sleeping(0.02)}, IMAGE_1CHW, seconds=0.3)
    assert 1.0 <= found["fast"]["median_ms"] < 20.0 <= found["slow"]["median_ms"] < 1000.0
    assert all(figures["median_ms"] <= figures["p90_ms"] for figures in found.values())
    assert found["fast"]["n"] == found["slow"]["n"] >= 15
    assert found["fast"]["threads"] == found["fast"]["batch_size"] == 1


def test_slow_candidates_get_three_turns_whatever_the_time() -> None:
    slow = Sleeping(0.001)
    assert latency({"slow": slow}, IMAGE_1CHW, seconds=0.0)["slow"]["n"] == 15
    assert slow.calls == 5 + 3 * 6  # warm-up, then turns of one uncounted and five counted


class Spy(nn.Module):
    """Notes the conditions that it is called in, also when a copy of it is."""

    seen: ClassVar[set[tuple[bool, bool, int]]] = set()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self.seen.add((self.training, torch.is_inference_mode_enabled(), torch.get_num_threads()))
        return images_BCHW


def test_eager_is_measured_in_eval_mode_without_autograd_with_the_threads_asked_for() -> None:
    spy, before = Spy().train(), torch.get_num_threads()
    latency({"eager": spy}, IMAGE_1CHW, threads=2, seconds=0.0)
    assert Spy.seen == {(False, True, 2)}
    assert spy.training
    assert torch.get_num_threads() == before


def test_loaded_files_are_measured_beside_eager_with_the_same_threads(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    trained = Trained(
        module=module, image_size=8, class_names=("a", "b", "c"), mean=(0.5,), std=(0.25,)
    )
    files = {}
    for pictures in (False, True):
        exporter, path = Onnx(picture_input=pictures), tmp_path / f"{pictures}.onnx"
        exporter.export(trained, path)
        files[f"pictures {pictures}"] = exporter.load(path)
    found = latency({"eager": module, **files}, IMAGE_1CHW, seconds=0.05)
    assert found.keys() == {"eager", "pictures False", "pictures True"}
    assert all(figures["median_ms"] > 0 for figures in found.values())
    with pytest.raises(ValueError, match="was loaded with 1 threads, not 2"):
        latency(files, IMAGE_1CHW, threads=2)
