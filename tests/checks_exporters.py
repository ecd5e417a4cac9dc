"""What every exporter must do with every network.

One line runs it all on a format or a network of your own:

    check_exporter(MyFormat(), my_network, pictures_NHWC, tmp_path)

The network may be untrained, but let its batch norms see data first (`settled`): the logits of a
network that shrinks its input to nothing agree whatever the export does.  Untrained networks have
no margins either, so give a format that quantises a tolerance such as LOOSE.

Shapes: N samples, C classes, H W image.
"""

import json
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.component import ConfigError
from kd.disk import digest, files_of, remove
from kd.exporters import Parity, Runner, Tolerance, Trained, export_and_check

LOOSE = Tolerance(relative=1.0, top1_agreement=0.5, accuracy_points=50.0, sqnr_db=12.0)


@dataclass(frozen=True)
class Exported:
    """One network in one format, and what it was made from."""

    exporter: Any
    trained: Trained
    pictures_NHWC: Tensor
    labels_N: Tensor
    eager_NC: Tensor
    state_before: Mapping[str, Tensor]
    folder: Path
    parity: Parity

    @property
    def path(self) -> Path:
        return self.folder / self.parity.file

    @property
    def inputs(self) -> Tensor:
        return self.trained.inputs(self.pictures_NHWC, self.exporter.picture_input)

    def load(self, threads: int = 1) -> Runner:
        return self.exporter.load(self.path, threads)


def need(exporter: Any) -> None:
    """Skip where LiteRT's other environment, of 7 GB, is absent: `make litert` creates it."""
    if exporter.kind == "litert":
        try:
            exporter.check()
        except ConfigError as error:
            pytest.skip(str(error))


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


def trained_on(module: nn.Module, pictures_NHWC: Tensor) -> Trained:
    """`module` with the pictures' own statistics, settled on them."""
    pixels_NHWC = pictures_NHWC / 255
    bare = Trained(
        module=module,
        image_size=pictures_NHWC.shape[1],
        class_names=tuple(f"class {index}" for index in range(10)),
        mean=tuple(pixels_NHWC.mean((0, 1, 2)).tolist()),
        std=tuple(pixels_NHWC.std((0, 1, 2)).tolist()),
        calibration_NHWC=pictures_NHWC,
        metadata={"student": "abc"},
    )
    settled(module, bare.normalise(pictures_NHWC))
    return bare


def exported(exporter: Any, trained: Trained, pictures_NHWC: Tensor, folder: Path) -> Exported:
    need(exporter)
    with torch.inference_mode():
        eager = trained.served(exporter.picture_input)
        eager_NC = eager(trained.inputs(pictures_NHWC, exporter.picture_input)).clone()
    assert eager_NC.std(0).max() > 1e-3, "the network must tell images apart"
    labels_N = eager_NC.argmax(1)
    labels_N[::4] = (labels_N[::4] + 1) % eager_NC.shape[1]  # so that it errs now and then
    state = trained.module.state_dict()
    state_before = {name: value.clone() for name, value in state.items()}
    parity = export_and_check(exporter, trained, pictures_NHWC, labels_N, folder)
    return Exported(
        exporter, trained, pictures_NHWC, labels_N, eager_NC, state_before, folder, parity
    )


def check_exporter(
    exporter: Any, module: nn.Module, pictures_NHWC: Tensor, folder: Path
) -> Exported:
    """Run the whole battery on one format and one network of ten classes."""
    made = exported(exporter, trained_on(module, pictures_NHWC), pictures_NHWC, folder)
    for check in CHECKS:
        try:
            check(made)
        except AssertionError as error:
            wanted = check.__name__.removeprefix("check_that_").replace("_", " ")
            raise AssertionError(f"it must hold that {wanted} ({error})") from error
    return made


def check_that_one_file_is_published_and_is_the_recorded_one(made: Exported) -> None:
    assert [path.name for path in made.folder.iterdir()] == [f"model{made.exporter.suffix}"]
    assert made.parity.size_bytes == sum(len(each.read_bytes()) for each in files_of(made.path))
    assert made.parity.sha256 == digest(made.path)


def check_that_the_record_says_what_the_file_computes(made: Exported) -> None:
    outputs_NC, parity = made.load()(made.inputs), made.parity
    eager_NC = made.eager_NC.double()
    difference_NC = (outputs_NC.double() - eager_NC).abs()
    # eager may add up in another order for another batch size, hence the small allowance
    assert parity.max_abs == pytest.approx(difference_NC.max().item(), abs=1e-5)
    assert parity.mean_abs == pytest.approx(difference_NC.mean().item(), abs=1e-5)
    power = eager_NC.square().mean().item() / difference_NC.square().mean().item()
    assert parity.sqnr_db is not None
    if made.exporter.precision == "fp32":
        assert parity.mean_abs <= parity.max_abs <= 1e-4 * max(1, parity.eager_max_abs_logit)
        assert parity.top1_agreement == 1.0
        assert parity.sqnr_db > 80
    else:
        assert power == pytest.approx(10 ** (parity.sqnr_db / 10), rel=0.01)
    top1_N = outputs_NC.argmax(1)
    agree_N, right_N = top1_N == eager_NC.argmax(1), top1_N == made.labels_N
    assert parity.num_images == len(made.pictures_NHWC)
    assert parity.top1_agreement == pytest.approx(agree_N.float().mean().item())
    assert parity.val_accuracy == pytest.approx(right_N.float().mean().item())
    assert parity.eager_val_accuracy == 1 - len(made.labels_N[::4]) / parity.num_images


def check_that_the_record_is_flat_and_survives_json(made: Exported) -> None:
    record = made.parity.record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert "contents" not in record
    figures = {"max_abs", "mean_abs", "top1_agreement", "val_accuracy", "eager_val_accuracy"}
    about = {"kind", "precision", "picture_input", "runtime", "labels", "metadata", "sqnr_db"}
    assert figures | about <= record.keys(), f"it lacks {(figures | about) - record.keys()}"
    assert {"num_images", "size_bytes", "sha256", "inputs", "outputs"} <= record.keys()


def check_that_inputs_and_outputs_have_names(made: Exported) -> None:
    contents = made.exporter.inspect(made.path)
    assert contents["inputs"]["image"][1:] == list(made.inputs.shape[1:])
    output = "probabilities" if made.exporter.picture_input else "logits"
    assert contents["outputs"][output][1:] == [made.eager_NC.shape[1]]


def check_that_the_file_knows_its_labels_and_where_it_comes_from(made: Exported) -> None:
    contents = made.exporter.inspect(made.path)
    assert contents["labels"] == list(made.trained.class_names)
    assert contents["metadata"]["student"] == "abc"
    assert json.loads(contents["metadata"]["mean"]) == list(made.trained.mean)


def check_that_probabilities_are_probabilities(made: Exported) -> None:
    if made.exporter.picture_input:
        outputs_NC = made.load()(made.inputs)
        assert outputs_NC.min() >= 0
        torch.testing.assert_close(
            outputs_NC.sum(1), torch.ones(len(outputs_NC)), atol=5e-3, rtol=0
        )


def assert_same(made: Exported, outputs_NC: Tensor, expected_NC: Tensor) -> None:
    """Equal but for the order of sums, which a half-precision program rounds up or down."""
    in_half = made.exporter.kind == "coreml" and made.exporter.precision != "fp32"
    close = 2e-3 if in_half else 1e-4
    torch.testing.assert_close(outputs_NC, expected_NC, rtol=close, atol=close)


def check_that_any_batch_gives_each_image_its_own_outputs(made: Exported) -> None:
    runner, images = made.load(), made.inputs
    all_NC = runner(images)
    for some_images, expected_BC in [
        (images[:1], all_NC[:1]),
        (images[:3], all_NC[:3]),
        (images.flip(0), all_NC.flip(0)),
    ]:
        assert_same(made, runner(some_images), expected_BC)


def check_that_the_memory_format_of_the_images_does_not_matter(made: Exported) -> None:
    runner, images = made.load(), made.inputs
    expected_NC = runner(images.contiguous())
    if not made.exporter.picture_input:
        assert torch.equal(runner(channels_last(images)), expected_NC)
    assert torch.equal(runner(images.repeat_interleave(2, dim=2)[:, :, ::2]), expected_NC)


def check_that_earlier_outputs_are_not_overwritten_by_later_ones(made: Exported) -> None:
    runner = made.load()
    first = runner(made.inputs[:1])
    kept = first.clone()
    runner(made.inputs[1:2])
    assert torch.equal(first, kept)


def check_that_threads_do_not_change_the_outputs(made: Exported) -> None:
    runners = [made.load(threads) for threads in (1, 2, 1)]
    assert [runner.threads for runner in runners] == [1, 2, 1]
    images, expected_NC = made.inputs, made.load()(made.inputs)
    for runner in runners * 3:  # by turns: a runtime may keep one pool for all that is loaded
        assert_same(made, runner(images), expected_NC)


def check_that_images_of_another_shape_or_type_are_refused(made: Exported) -> None:
    runner, images = made.load(), made.inputs
    other = torch.float32 if images.dtype == torch.uint8 else torch.uint8
    for wrong in (images[..., :0], images[0], images.double(), images.to(other)):
        with pytest.raises(ValueError, match="the file takes"):
            runner(wrong)
    assert runner(runner.blank(2)).shape == (2, made.eager_NC.shape[1])


def check_that_exporting_again_gives_the_same_bytes(made: Exported) -> None:
    again = made.folder / "again" / f"named_differently{made.exporter.suffix}"
    again.parent.mkdir()
    made.exporter.export(made.trained, again)
    assert digest(again) == made.parity.sha256
    remove(again.parent)


def check_that_the_file_tells_nothing_of_this_machine(made: Exported) -> None:
    here = [Path.cwd(), Path.home(), made.folder, Path(__file__).parent]
    for file in files_of(made.path):
        for path in [*map(str, here), sysconfig.get_path("purelib"), __name__]:
            assert path.encode() not in file.read_bytes()


def check_that_the_network_is_left_as_it_was(made: Exported) -> None:
    module = made.trained.module
    state = module.state_dict()
    assert state.keys() == made.state_before.keys()
    assert all(torch.equal(value, made.state_before[name]) for name, value in state.items())
    assert all(module.training for module in module.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())


def check_that_damaged_and_foreign_files_are_named(made: Exported) -> None:
    broken = made.folder / f"broken{made.exporter.suffix}"
    data = made.path.read_bytes() if made.path.is_file() else b""
    for content in (b"", b"not a model " * 1000, b"\xff" * 1000, data[: len(data) // 2]):
        broken.write_bytes(content)
        for read in (made.exporter.load, made.exporter.inspect):
            with pytest.raises(ConfigError, match=broken.name):
                read(broken)
    broken.unlink()
    for read in (made.exporter.load, made.exporter.inspect):
        with pytest.raises(FileNotFoundError):
            read(broken)


def check_that_int8_without_calibration_pictures_is_refused(made: Exported) -> None:
    if made.exporter.precision == "int8" and made.exporter.int8:
        bare, path = replace(made.trained, calibration_NHWC=None), made.folder / "none"
        with pytest.raises(ConfigError, match="needs calibration pictures"):
            made.exporter.export(bare, path)
        assert not path.exists()


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_that_")]
