"""LiteRT's converter, in an environment of its own: the other half of litert.py.

    python -P litert_worker.py FOLDER

Its packages want other versions than ours (docs/decisions/0009-litert-s-converter-apart.md), so it
imports nothing of `kd`, and files go between the two:

    program.pt2      in: the graph, by torch.export.save; its output is a table with one name
    calibration.npy  in, for int8: images as the graph takes them, one after another
    model.tflite     out
    refused.txt      out instead of it: what the converter has against the network
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch


def main(folder: Path) -> None:
    """Convert what is in the folder."""
    program = torch.export.load(folder / "program.pt2")
    calibration = folder / "calibration.npy"
    images = np.load(calibration) if calibration.exists() else None
    # Imported before anything is tried: that it cannot be is no fault of the network.
    import ai_edge_quantizer  # noqa: F401
    import litert_torch  # noqa: F401

    try:
        data = converted(program)
        if images is not None:
            data = quantised(data, images)
    except Exception as error:  # the converter has its own
        (folder / "refused.txt").write_text(f"{type(error).__name__}: {error}", "utf-8")
        raise
    (folder / "model.tflite").write_bytes(data)


FLOAT = ("INPUT", "OUTPUT", "SUB", "SOFTMAX")
"""Operators that stay in floating point: those of the ends that networks seldom have inside."""


class Called(torch.nn.Module):
    """A graph whose input has a name."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.network = program.module()  # "graph" would hide a GraphModule's own

    def forward(self, image: torch.Tensor) -> Any:
        """The graph's output, a table with one name."""
        return self.network(image)


def converted(program: torch.export.ExportedProgram) -> bytes:
    """The graph as a flatbuffer, its input called `image`."""
    import litert_torch

    (image,), _ = program.example_inputs
    model = litert_torch.convert(Called(program), sample_kwargs={"image": image})
    return bytes(model.model_content())


def quantised(data: bytes, images: Any) -> bytes:
    """The flatbuffer with int8 weights and activations, but for its ends."""
    from ai_edge_quantizer import qtyping, quantizer, recipe

    maker = quantizer.Quantizer(bytearray(data), recipe.static_wi8_ai8())
    for name in FLOAT:
        maker.update_quantization_recipe(
            regex=".*",
            operation_name=qtyping.TFLOperationName[name],
            algorithm_key=quantizer.AlgorithmName.NO_QUANTIZE,
        )
    given = {"serving_default": [{"image": image[None]} for image in images]}
    ranges = maker.calibrate(given, num_threads=1)
    made = maker.quantize(ranges, enable_progress_report=False)
    return bytes(made.quantized_model)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
