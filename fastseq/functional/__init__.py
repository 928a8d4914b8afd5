"""What users call: checks, dtypes and layout around the operators; one file per operator."""

from fastseq.functional.lstm import Gates, Result, State, Weights, draw_seed, lstm, lstm_cell, packed_places
from fastseq.functional.vq import Nearest, Quantized, vq_nearest, vq_quantize, vq_sums

__all__ = [
    "Gates",
    "Nearest",
    "Quantized",
    "Result",
    "State",
    "Weights",
    "draw_seed",
    "lstm",
    "lstm_cell",
    "packed_places",
    "vq_nearest",
    "vq_quantize",
    "vq_sums",
]
