"""The definitions: plain differentiable torch, any dtype, no speed. Everything else is judged by them."""

from fastseq.reference.adt import adt_ascend, adt_backward, adt_entropy, adt_noise, adt_sample
from fastseq.reference.compression import integer_rows, integer_values, low_rank, rank_of_energy, rounded
from fastseq.reference.lamb import lamb
from fastseq.reference.lars import lars
from fastseq.reference.linear import linear
from fastseq.reference.lstm import gate_noise, lstm, lstm_backward, lstm_gates, packed_index, philox, unpack
from fastseq.reference.lstm_int8 import int8_product, lstm_int8, quantized
from fastseq.reference.lstm_lowrank import lowrank_product, lstm_lowrank, lstm_lowrank_backward
from fastseq.reference.lstm_mixed import lstm_mixed, lstm_mixed_backward
from fastseq.reference.mimo import (
    ensemble_stats,
    mimo_combine,
    mimo_combine_backward,
    mimo_gather,
    mimo_gather_backward,
    mimo_index,
    mimo_nll,
    mimo_nll_backward,
    mimo_project,
    mimo_project_backward,
    slot_columns,
    softmax_sums,
)
from fastseq.reference.model import run_model
from fastseq.reference.model_matrix import matrix_of, matrix_product
from fastseq.reference.packed import (
    Gate,
    Matrix,
    Part,
    from_nibbles,
    linear_packed,
    lstm_packed,
    matrix_values,
    nibbles,
    part_values,
    storage_of,
    store,
)
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
    "Gate",
    "Matrix",
    "Part",
    "adt_ascend",
    "adt_backward",
    "adt_entropy",
    "adt_noise",
    "adt_sample",
    "ensemble_stats",
    "from_nibbles",
    "gate_noise",
    "int8_product",
    "integer_rows",
    "integer_values",
    "lamb",
    "lars",
    "linear",
    "linear_packed",
    "low_rank",
    "lowrank_product",
    "lstm",
    "lstm_backward",
    "lstm_gates",
    "lstm_int8",
    "lstm_lowrank",
    "lstm_lowrank_backward",
    "lstm_mixed",
    "lstm_mixed_backward",
    "lstm_packed",
    "matrix_of",
    "matrix_product",
    "matrix_values",
    "mimo_combine",
    "mimo_combine_backward",
    "mimo_gather",
    "mimo_gather_backward",
    "mimo_index",
    "mimo_nll",
    "mimo_nll_backward",
    "mimo_project",
    "mimo_project_backward",
    "nibbles",
    "packed_index",
    "part_values",
    "philox",
    "quantized",
    "rank_of_energy",
    "rounded",
    "run_model",
    "slot_columns",
    "softmax_sums",
    "storage_of",
    "store",
    "unpack",
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
