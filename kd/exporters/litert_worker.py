"""Runs LiteRT's converter in a separate environment; started by litert.py.

    python -P litert_worker.py FOLDER

Its packages need other versions than ours (docs/decisions/0009-litert-s-converter-apart.md), so it
imports nothing of `kd`, and the two processes exchange files:

    program.pt2      in: the graph, by torch.export.save; its output is a dict with one key
    calibration.npy  in, for int8: images as the graph takes them, one after another
    model.tflite     out
    refused.txt      out if the conversion failed: the converter's error
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch


def main(folder: Path) -> None:
    """Convert the graph in the folder."""
    program = torch.export.load(folder / "program.pt2")
    calibration = folder / "calibration.npy"
    images = np.load(calibration) if calibration.exists() else None
    # Imported outside the try: a failed import must not be blamed on the network.
    import ai_edge_quantizer  # noqa: F401
    import litert_torch  # noqa: F401

    try:
        data = converted(program)
        if images is not None:
            data = quantised(data, images)
    except Exception as error:  # the converter raises its own types
        (folder / "refused.txt").write_text(f"{type(error).__name__}: {error}", "utf-8")
        raise
    (folder / "model.tflite").write_bytes(data)


FLOAT = ("INPUT", "OUTPUT", "SUB", "SOFTMAX")
"""Operators kept in floating point: those of preprocessing and softmax, rare inside a network."""


class Called(torch.nn.Module):
    """Wraps a graph to give its input a name."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.network = program.module()  # named `graph` it would hide GraphModule.graph

    def forward(self, image: torch.Tensor) -> Any:
        """The graph's output, a dict with one key."""
        return self.network(image)


def converted(program: torch.export.ExportedProgram) -> bytes:
    """Convert the graph to a flatbuffer whose input is named `image`."""
    import litert_torch

    (image,), _ = program.example_inputs
    model = litert_torch.convert(Called(program), sample_kwargs={"image": image})
    return bytes(model.model_content())


def quantised(data: bytes, images: Any) -> bytes:
    """Quantise the flatbuffer's weights and activations to int8, except for the FLOAT ops."""
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
