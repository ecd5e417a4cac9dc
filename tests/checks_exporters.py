"""What every exporter must do with every network.

One line runs it all on a format or a network of your own:

    check_exporter(MyFormat(), my_network, images_NCHW, tmp_path)

The network may be untrained, but let its batch norms see data first (`settled`): the logits of a
network that shrinks its input to nothing agree whatever the export does.

Shapes: N samples, C classes, H W image.
"""

import copy
import hashlib
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.component import ConfigError
from kd.exporters import Parity, Runner, export_and_check


@dataclass(frozen=True)
class Exported:
    """One network in one format, and what it was made from."""

    exporter: Any
    module: nn.Module
    images_NCHW: Tensor
    labels_N: Tensor
    eager_NC: Tensor
    state_before: dict[str, Tensor]
    folder: Path
    parity: Parity

    @property
    def path(self) -> Path:
        return self.folder / self.parity.file

    def load(self) -> Runner:
        return self.exporter.load(self.path)


def settled(module: nn.Module, images_NCHW: Tensor) -> nn.Module:
    """Give the batch norms the images' statistics, and leave the network in training mode."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = (
                None  # the plain average: torchvision's 0.01 would take hundreds of calls
            )
    with torch.no_grad():
        module.train()(images_NCHW)
    return module


def channels_last(images_NCHW: Tensor) -> Tensor:
    """The same images as kd.data gives them.

    Grey ones are contiguous in both formats to torch, which leaves them alone when asked for
    either; to a runtime that reads the strides they are not the same.
    """
    images_NHWC = images_NCHW.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    images = images_NHWC.permute(0, 3, 1, 2)
    assert images.stride()[1] == 1
    return images


def exported(exporter: Any, module: nn.Module, images_NCHW: Tensor, folder: Path) -> Exported:
    with torch.inference_mode():
        eager_NC = copy.deepcopy(module).eval()(images_NCHW).clone()
    assert eager_NC.std(0).max() > 1e-3, "the network must tell images apart"
    labels_N = eager_NC.argmax(1)
    labels_N[::4] = (labels_N[::4] + 1) % eager_NC.shape[1]  # so that it errs now and then
    state_before = {name: value.clone() for name, value in module.state_dict().items()}
    batches = torch.split(channels_last(images_NCHW), 5)
    parity = export_and_check(exporter, module, images_NCHW, batches, labels_N, folder)
    return Exported(
        exporter, module, images_NCHW, labels_N, eager_NC, state_before, folder, parity
    )


def check_exporter(exporter: Any, module: nn.Module, images_NCHW: Tensor, folder: Path) -> None:
    """Run the whole battery on one format and one network."""
    made = exported(exporter, module, images_NCHW, folder)
    for check in CHECKS:
        check(made)


def check_that_one_file_is_published_and_is_the_recorded_one(made: Exported) -> None:
    assert [path.name for path in made.folder.iterdir()] == [f"model{made.exporter.suffix}"]
    data = made.path.read_bytes()
    assert made.parity.size_bytes == len(data)
    assert made.parity.sha256 == hashlib.sha256(data).hexdigest()


def check_that_the_record_says_what_the_file_computes(made: Exported) -> None:
    logits_NC, parity = made.load()(made.images_NCHW), made.parity
    difference_NC = (logits_NC.double() - made.eager_NC.double()).abs()
    # eager may add up in another order for another batch size, hence the small allowance
    assert parity.max_abs == pytest.approx(difference_NC.max().item(), abs=1e-5)
    assert parity.mean_abs == pytest.approx(difference_NC.mean().item(), abs=1e-5)
    assert parity.mean_abs <= parity.max_abs <= 1e-4 * parity.eager_max_abs_logit
    assert parity.num_images == len(made.images_NCHW)
    assert parity.top1_agreement == 1.0
    wrong = len(made.labels_N[::4])
    assert parity.val_accuracy == parity.eager_val_accuracy == 1 - wrong / parity.num_images


def check_that_the_record_is_flat_and_survives_json(made: Exported) -> None:
    record = made.parity.record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert "contents" not in record
    figures = {"max_abs", "mean_abs", "top1_agreement", "val_accuracy", "eager_val_accuracy"}
    assert figures | {"num_images", "size_bytes", "sha256", "inputs", "outputs"} <= record.keys()


def check_that_inputs_and_outputs_have_names(made: Exported) -> None:
    contents = made.exporter.inspect(made.path)
    assert contents["inputs"]["images"][1:] == list(made.images_NCHW.shape[1:])
    assert contents["outputs"]["logits"][1:] == [made.eager_NC.shape[1]]


def check_that_any_batch_gives_each_image_its_own_logits(made: Exported) -> None:
    runner = made.load()
    for images_BCHW, expected_BC in [
        (made.images_NCHW[:1], made.eager_NC[:1]),
        (made.images_NCHW[:3], made.eager_NC[:3]),
        (made.images_NCHW.flip(0), made.eager_NC.flip(0)),
    ]:
        torch.testing.assert_close(runner(images_BCHW), expected_BC, rtol=1e-4, atol=1e-4)


def check_that_the_memory_format_of_the_images_does_not_matter(made: Exported) -> None:
    runner, images_NCHW = made.load(), made.images_NCHW
    expected_NC = runner(images_NCHW)
    assert torch.equal(runner(channels_last(images_NCHW)), expected_NC)
    strided_NCHW = images_NCHW.repeat_interleave(2, dim=3)[..., ::2]
    assert torch.equal(runner(strided_NCHW), expected_NC)


def check_that_earlier_logits_are_not_overwritten_by_later_ones(made: Exported) -> None:
    runner = made.load()
    first = runner(made.images_NCHW[:1])
    kept = first.clone()
    runner(made.images_NCHW[1:2])
    assert torch.equal(first, kept)


def check_that_threads_do_not_change_the_logits(made: Exported) -> None:
    runners = [made.exporter.load(made.path, threads=threads) for threads in (1, 2, 1)]
    assert [runner.threads for runner in runners] == [1, 2, 1]
    for runner in runners * 3:  # by turns: a runtime may keep one pool for all that is loaded
        torch.testing.assert_close(runner(made.images_NCHW), made.eager_NC, rtol=1e-4, atol=1e-4)


def check_that_images_of_another_shape_or_type_are_refused(made: Exported) -> None:
    runner = made.load()
    for wrong in (
        made.images_NCHW[..., :-1],
        made.images_NCHW[0],
        made.images_NCHW.double(),
        made.images_NCHW.to(torch.uint8),
    ):
        with pytest.raises(ValueError, match="the file takes float32 of shape"):
            runner(wrong)


def check_that_exporting_again_gives_the_same_bytes(made: Exported) -> None:
    again = made.folder / "again" / "named_differently"
    again.parent.mkdir()
    made.exporter.export(made.module, channels_last(made.images_NCHW.flip(0)), again)
    assert again.read_bytes() == made.path.read_bytes()
    again.unlink()
    again.parent.rmdir()


def check_that_the_file_tells_nothing_of_this_machine(made: Exported) -> None:
    data = made.path.read_bytes()
    here = [Path.cwd(), Path.home(), made.folder, Path(__file__).parent]
    for path in [*map(str, here), sysconfig.get_path("purelib"), __name__]:
        assert path.encode() not in data


def check_that_the_network_is_left_as_it_was(made: Exported) -> None:
    state = made.module.state_dict()
    assert state.keys() == made.state_before.keys()
    assert all(torch.equal(value, made.state_before[name]) for name, value in state.items())
    assert all(module.training for module in made.module.modules())
    assert all(parameter.requires_grad for parameter in made.module.parameters())


def check_that_damaged_and_foreign_files_are_named(made: Exported) -> None:
    data = made.path.read_bytes()
    broken = made.folder / f"broken{made.exporter.suffix}"
    for content in (b"", b"not a model " * 1000, data[: len(data) // 2]):
        broken.write_bytes(content)
        for read in (made.exporter.load, made.exporter.inspect):
            with pytest.raises(ConfigError, match=broken.name):
                read(broken)
    broken.unlink()
    with pytest.raises(FileNotFoundError):
        made.exporter.load(broken)


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_that_")]
