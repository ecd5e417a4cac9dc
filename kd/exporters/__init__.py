"""Exporters: write the trained student to one file that a phone's runtime loads.

Each format is one module here and one member of the union `Exporter`.  Use them through
`export_and_check`, which publishes a file only after running it and comparing its outputs with
the network's.  Packages that a format needs besides torch are imported inside its functions.
"""

from kd.exporters.coreml import CoreML
from kd.exporters.executorch import ExecuTorch
from kd.exporters.files import Runner
from kd.exporters.format import Tolerance
from kd.exporters.int8 import Int8
from kd.exporters.latency import latency
from kd.exporters.litert import LiteRT
from kd.exporters.onnx import Onnx
from kd.exporters.parity import ExportRefused, Parity, export_and_check
from kd.exporters.trained import Trained

Exporter = ExecuTorch | Onnx | CoreML | LiteRT

__all__ = [
    "CoreML",
    "ExecuTorch",
    "ExportRefused",
    "Exporter",
    "Int8",
    "LiteRT",
    "Onnx",
    "Parity",
    "Runner",
    "Tolerance",
    "Trained",
    "export_and_check",
    "latency",
]
