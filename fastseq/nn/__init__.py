"""Modules: ``LSTM`` and ``LSTMCell``, drop-in for those of ``torch.nn``."""

try:
    import torch as _torch
except ImportError as error:
    raise ImportError("fastseq.nn needs torch: install it, then fastseq with --no-build-isolation") from error

from fastseq.nn.lstm import LSTM
from fastseq.nn.lstm_cell import LSTMCell

__all__ = ["LSTM", "LSTMCell"]

del _torch
