"""The definitions: plain differentiable torch, any dtype, no speed. Everything else is judged by them."""

from fastseq.reference.linear import linear
from fastseq.reference.lstm import gate_noise, lstm, lstm_backward, lstm_gates, packed_index, philox

__all__ = ["gate_noise", "linear", "lstm", "lstm_backward", "lstm_gates", "packed_index", "philox"]
