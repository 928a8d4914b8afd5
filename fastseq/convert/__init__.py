"""Trained models of other libraries as the layers and tensors of a deployed model, and back to ONNX. Without torch."""

from fastseq.convert.checkpoint import from_checkpoint
from fastseq.convert.onnx_read import ConversionError, from_onnx
from fastseq.convert.onnx_write import to_onnx
from fastseq.convert.storage import stored

__all__ = ["ConversionError", "from_checkpoint", "from_onnx", "stored", "to_onnx"]
