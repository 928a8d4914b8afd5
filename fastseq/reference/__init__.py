"""The definitions: plain differentiable torch, any dtype, no speed. Everything else is judged by them."""

from fastseq.reference.linear import linear
from fastseq.reference.lstm import gate_noise, lstm, lstm_backward, lstm_gates, packed_index, philox
from fastseq.reference.vq import (
    vq_backward,
    vq_gather,
    vq_nearest,
    vq_quantize,
    vq_rotation,
    vq_scores,
    vq_straight_through,
    vq_sums,
)
from fastseq.reference.vq_codes import vq_pack, vq_unpack
from fastseq.reference.vq_residual import vq_residual, vq_residual_backward

__all__ = [
    "gate_noise",
    "linear",
    "lstm",
    "lstm_backward",
    "lstm_gates",
    "packed_index",
    "philox",
    "vq_backward",
    "vq_gather",
    "vq_nearest",
    "vq_pack",
    "vq_quantize",
    "vq_residual",
    "vq_residual_backward",
    "vq_rotation",
    "vq_scores",
    "vq_straight_through",
    "vq_sums",
    "vq_unpack",
]
