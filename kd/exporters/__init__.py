"""Exporters: the trained student as one file that a phone's runtime loads.

Each format is one file here and one word in `Exporter`.  `export_and_check` is the way to use
them: it publishes a file only after its own runtime has shown that it computes what the network
computes.  What a format needs beyond torch is imported inside its functions.
"""

from kd.exporters.executorch import ExecuTorch
from kd.exporters.files import Runner
from kd.exporters.latency import latency
from kd.exporters.onnx import Onnx
from kd.exporters.parity import ExportRefused, Parity, Tolerance, export_and_check

Exporter = ExecuTorch | Onnx

__all__ = [
    "ExecuTorch",
    "ExportRefused",
    "Exporter",
    "Onnx",
    "Parity",
    "Runner",
    "Tolerance",
    "export_and_check",
    "latency",
]
