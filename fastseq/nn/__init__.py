"""Modules: drop-ins for the LSTMs of ``torch.nn`` and the layers of vector-quantize-pytorch, recipes, and MIMO."""

try:
    import torch as _torch
except ImportError as error:
    raise ImportError("fastseq.nn needs torch: install it, then fastseq with --no-build-isolation") from error

from fastseq.nn._mimo_fold import fold, unfold
from fastseq.nn.codebook_optim import codebook_parameter_groups, reset_codebook_moments
from fastseq.nn.compressed_lstm import CompressedLSTM
from fastseq.nn.factorized_residual_vq import FactorizedResidualVQ
from fastseq.nn.fsq import FSQ
from fastseq.nn.grouped_residual_vq import GroupedResidualVQ
from fastseq.nn.kmeans import kmeans
from fastseq.nn.lstm import LSTM
from fastseq.nn.lstm_cell import LSTMCell
from fastseq.nn.mimo import MIMO, MIMOReport
from fastseq.nn.mimo_index import MIMOIndex
from fastseq.nn.mimo_layers import MIMOConv1d, MIMOConv2d, MIMOEmbedding, MIMOHead, MIMOLinear
from fastseq.nn.mimo_lstm import MIMOLSTM, MIMOState
from fastseq.nn.reinit import AfterWarmup, Reinit, Spaced, attach, next_epoch
from fastseq.nn.reservoir import Reservoir
from fastseq.nn.residual_vq import ResidualVQ
from fastseq.nn.row_quantizer import LossBreakdown
from fastseq.nn.sharded_codebook import ShardedCodebook
from fastseq.nn.sim_vq import SimVQ
from fastseq.nn.split_residual_vq import SplitResidualVQ
from fastseq.nn.stored_matrix import StoredMatrix
from fastseq.nn.usage import CodebookUsage, Usage, bits_per_dimension
from fastseq.nn.vector_quantize import VectorQuantize
from fastseq.nn.vq_loading import load_codebooks

__all__ = [
    "FSQ",
    "LSTM",
    "MIMO",
    "MIMOConv1d",
    "MIMOConv2d",
    "MIMOEmbedding",
    "MIMOHead",
    "MIMOIndex",
    "MIMOLSTM",
    "MIMOLinear",
    "MIMOReport",
    "MIMOState",
    "AfterWarmup",
    "CodebookUsage",
    "CompressedLSTM",
    "FactorizedResidualVQ",
    "GroupedResidualVQ",
    "LSTMCell",
    "LossBreakdown",
    "Reinit",
    "Reservoir",
    "ResidualVQ",
    "ShardedCodebook",
    "SimVQ",
    "Spaced",
    "SplitResidualVQ",
    "StoredMatrix",
    "Usage",
    "VectorQuantize",
    "attach",
    "bits_per_dimension",
    "codebook_parameter_groups",
    "fold",
    "kmeans",
    "load_codebooks",
    "next_epoch",
    "reset_codebook_moments",
    "unfold",
]

del _torch
