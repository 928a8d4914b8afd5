"""Trained models of other libraries as the layers and tensors of a deployed model, and back to ONNX. Without torch."""

from fastseq.convert.adaptdl import from_adaptdl
from fastseq.convert.checkpoint import from_checkpoint
from fastseq.convert.g2_lstm import from_g2_lstm
from fastseq.convert.official import Official
from fastseq.convert.onnx_read import ConversionError, from_onnx
from fastseq.convert.onnx_write import to_onnx
from fastseq.convert.storage import stored
from fastseq.convert.torch_uncertainty import from_torch_uncertainty

__all__ = [
    "ConversionError",
    "Official",
    "from_adaptdl",
    "from_checkpoint",
    "from_g2_lstm",
    "from_onnx",
    "from_torch_uncertainty",
    "stored",
    "to_onnx",
]
