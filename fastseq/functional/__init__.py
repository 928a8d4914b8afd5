"""What users call: checks, dtypes and layout around the operators; one file per operator."""

from fastseq.functional._recurrence import Recurrence, RecurrenceOptions
from fastseq.functional.adt import adt_ascend, adt_entropy, adt_noise, adt_sample
from fastseq.functional.ensemble_stats import EnsembleStats, ensemble_stats
from fastseq.functional.lstm import Gates, Result, draw_seed, lstm, lstm_cell, packed_places
from fastseq.functional.lstm_arguments import Factors, State, Weights
from fastseq.functional.lstm_factors import best_factors, dense_weight
from fastseq.functional.lstm_int8 import lstm_int8
from fastseq.functional.lstm_lowrank import lstm_lowrank
from fastseq.functional.lstm_packed import (
    Gate,
    Matrix,
    Packed,
    PackedWeights,
    Part,
    linear_packed,
    lstm_packed,
    pack,
    storage_of,
    stored_as,
    straight_through,
)
from fastseq.functional.mimo import mimo_combine, mimo_gather, mimo_index, mimo_labels, mimo_nll, mimo_project
from fastseq.functional.vq import Nearest, Quantized, vq_nearest, vq_quantize, vq_sums
from fastseq.functional.vq_codes import code_bits, vq_pack, vq_unpack
from fastseq.functional.vq_residual import Residual, vq_residual

__all__ = [
    "EnsembleStats",
    "Factors",
    "Gate",
    "Gates",
    "Matrix",
    "Nearest",
    "Packed",
    "PackedWeights",
    "Part",
    "Quantized",
    "Recurrence",
    "RecurrenceOptions",
    "Residual",
    "Result",
    "State",
    "Weights",
    "adt_ascend",
    "adt_entropy",
    "adt_noise",
    "adt_sample",
    "best_factors",
    "code_bits",
    "dense_weight",
    "draw_seed",
    "ensemble_stats",
    "linear_packed",
    "lstm",
    "lstm_cell",
    "lstm_int8",
    "lstm_lowrank",
    "lstm_packed",
    "mimo_combine",
    "mimo_gather",
    "mimo_index",
    "mimo_labels",
    "mimo_nll",
    "mimo_project",
    "pack",
    "packed_places",
    "storage_of",
    "stored_as",
    "straight_through",
    "vq_nearest",
    "vq_pack",
    "vq_quantize",
    "vq_residual",
    "vq_sums",
    "vq_unpack",
]
