"""The kernels on numpy arrays, without torch; shapes and meaning stand in ``fastseq.reference``.

Arrays must be C-contiguous, of one type (float32 or float64); nothing is converted or copied silently.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]  # float32 or float64, the same in all of one call
Index: TypeAlias = NDArray[np.int64]
Rows: TypeAlias = NDArray[np.int32]
Indices: TypeAlias = NDArray[np.int16] | NDArray[np.int32] | NDArray[np.int64]  # as wide as ``bits`` says
Mask: TypeAlias = NDArray[np.bool_]

def isa() -> str: ...
def isas() -> list[str]: ...
def philox(counter: NDArray[np.uint32], key: int) -> NDArray[np.uint32]: ...
def gemm(
    a: Array,
    b: Array,
    bias: Array | None = None,
    transpose_a: bool = False,
    transpose_b: bool = False,
    *,
    threads: int = 1,
) -> Array: ...
def lstm_noise(
    seed: int,
    T: int,
    B: int,
    H: int,
    rows: Index | None = None,
    row_offset: int = 0,
    stream: int = 0,
    noise_probability: float = 1.0,
    *,
    threads: int = 1,
) -> NDArray[np.float32]: ...
def lstm_forward(
    x_gates: Array,
    weight_hh: Array,
    h0: Array,
    c0: Array,
    weight_hr: Array | None = None,
    lengths: Index | None = None,
    batch_sizes: Index | None = None,
    reset: Mask | None = None,
    h_start: Array | None = None,
    c_start: Array | None = None,
    seed: int | None = None,
    rows: Index | None = None,
    row_offset: int = 0,
    stream: int = 0,
    noise_probability: float = 1.0,
    tau: float = 1.0,
    hard: bool = False,
    reverse: bool = False,
    save: int = 0,
    *,
    threads: int = 1,
) -> tuple[Array, Array, Array, Array, Array]: ...
def lstm_gates(
    x_gates: Array,
    h: Array,
    c: Array,
    weight_hh: Array,
    h0: Array,
    c0: Array,
    weight_hr: Array | None = None,
    lengths: Index | None = None,
    batch_sizes: Index | None = None,
    reset: Mask | None = None,
    h_start: Array | None = None,
    c_start: Array | None = None,
    seed: int | None = None,
    rows: Index | None = None,
    row_offset: int = 0,
    stream: int = 0,
    noise_probability: float = 1.0,
    tau: float = 1.0,
    hard: bool = False,
    reverse: bool = False,
    *,
    threads: int = 1,
) -> Array: ...
def lstm_backward(
    dh: Array | None,
    dc: Array | None,
    dgates: Array | None,
    dh_n: Array | None,
    dc_n: Array | None,
    gates: Array,
    h: Array,
    c: Array,
    weight_hh: Array,
    h0: Array,
    c0: Array,
    weight_hr: Array | None = None,
    lengths: Index | None = None,
    batch_sizes: Index | None = None,
    reset: Mask | None = None,
    h_start: Array | None = None,
    c_start: Array | None = None,
    tau: float = 1.0,
    hard: bool = False,
    reverse: bool = False,
    weights: bool = True,
    *,
    threads: int = 1,
) -> tuple[Array, Array, Array, Array, Array, Array, Array]: ...
def lstm_lowrank_forward(
    x_gates: Array,
    up: Array,
    down: Array,
    h0: Array,
    c0: Array,
    lengths: Index | None = None,
    batch_sizes: Index | None = None,
    reset: Mask | None = None,
    h_start: Array | None = None,
    c_start: Array | None = None,
    seed: int | None = None,
    rows: Index | None = None,
    row_offset: int = 0,
    stream: int = 0,
    noise_probability: float = 1.0,
    tau: float = 1.0,
    hard: bool = False,
    reverse: bool = False,
    save: int = 0,
    *,
    threads: int = 1,
) -> tuple[Array, Array, Array, Array, Array]: ...
def lstm_lowrank_backward(
    dh: Array | None,
    dc: Array | None,
    dgates: Array | None,
    dh_n: Array | None,
    dc_n: Array | None,
    gates: Array,
    h: Array,
    c: Array,
    up: Array,
    down: Array,
    h0: Array,
    c0: Array,
    lengths: Index | None = None,
    batch_sizes: Index | None = None,
    reset: Mask | None = None,
    h_start: Array | None = None,
    c_start: Array | None = None,
    tau: float = 1.0,
    hard: bool = False,
    reverse: bool = False,
    weights: bool = True,
    *,
    threads: int = 1,
) -> tuple[Array, Array, Array, Array, Array, Array, Array]: ...
def lstm_mixed_forward(
    x_gates: Array,
    weight_hh: Array | None,
    up: Array,
    down: Array,
    rank_i: int,
    rank_f: int,
    rank_g: int,
    rank_o: int,
    h0: Array,
    c0: Array,
    lengths: Index | None = None,
    batch_sizes: Index | None = None,
    reset: Mask | None = None,
    h_start: Array | None = None,
    c_start: Array | None = None,
    seed: int | None = None,
    rows: Index | None = None,
    row_offset: int = 0,
    stream: int = 0,
    noise_probability: float = 1.0,
    tau: float = 1.0,
    hard: bool = False,
    reverse: bool = False,
    save: int = 0,
    *,
    threads: int = 1,
) -> tuple[Array, Array, Array, Array, Array]: ...
def lstm_mixed_backward(
    dh: Array | None,
    dc: Array | None,
    dgates: Array | None,
    dh_n: Array | None,
    dc_n: Array | None,
    gates: Array,
    h: Array,
    c: Array,
    weight_hh: Array | None,
    up: Array,
    down: Array,
    rank_i: int,
    rank_f: int,
    rank_g: int,
    rank_o: int,
    h0: Array,
    c0: Array,
    lengths: Index | None = None,
    batch_sizes: Index | None = None,
    reset: Mask | None = None,
    h_start: Array | None = None,
    c_start: Array | None = None,
    tau: float = 1.0,
    hard: bool = False,
    reverse: bool = False,
    weights: bool = True,
    *,
    threads: int = 1,
) -> tuple[Array, Array, Array, Array, Array, Array, Array, Array]: ...
def vq_nearest(
    x: Array,
    codebook: Array,
    mask: Mask | None = None,
    dot: bool = False,
    best: int = 1,
    bits: int = 64,
    distance: bool = False,
    score: bool = False,
    screen: int = 2,
    *,
    threads: int = 1,
) -> tuple[Indices, Array, Array]: ...
def vq_screen_opened(x: Array, codebook: Array, dot: bool = False, *, threads: int = 1) -> tuple[int, int]: ...
def vq_quantize(
    x: Array,
    codebook: Array,
    mask: Mask | None = None,
    dot: bool = False,
    sums: bool = False,
    *,
    threads: int = 1,
) -> tuple[Array, Index, Array, Array, Array]: ...
def vq_sums(x: Array, index: Index, K: int, *, threads: int = 1) -> tuple[Array, Array]: ...
def mimo_gather(
    x: Array, index: Rows, labels: Array | None = None, *, threads: int = 1
) -> tuple[Array, Array]: ...  # of any type
def mimo_gather_backward(d: Array, index: Rows, B: int, *, threads: int = 1) -> Array: ...
def mimo_combine(parts: Array, index: Rows, bias: Array | None = None, *, threads: int = 1) -> Array: ...
def mimo_combine_backward(d: Array, index: Rows, B: int, *, threads: int = 1) -> Array: ...
def mimo_project(x: Array, weight: Array, bias: Array | None, index: Rows, *, threads: int = 1) -> Array: ...
def mimo_project_backward(
    d: Array,
    x: Array,
    weight: Array,
    index: Rows,
    needs_x: bool = True,
    needs_weight: bool = True,
    needs_bias: bool = True,
    *,
    threads: int = 1,
) -> tuple[Array, Array, Array]: ...
def vq_residual(
    x: Array,
    codebooks: Sequence[Array],
    mask: Mask | None = None,
    levels: Index | None = None,
    sums: bool = False,
    *,
    threads: int = 1,
) -> tuple[Array, Index, Array, Array, Array]: ...
def vq_pack(index: Index, bits: int) -> NDArray[np.uint8]: ...
def vq_unpack(packed: NDArray[np.uint8], bits: int, count: int) -> Index: ...
def mimo_nll(
    logits: Array, labels: Index, smoothing: float = 0.0, ignore: int = -100, *, threads: int = 1
) -> tuple[Array, Array, Array, Array]: ...
def mimo_nll_backward(
    dloss: Array | None,
    dnll: Array | None,
    logits: Array,
    labels: Index,
    top: Array,
    logsum: Array,
    smoothing: float = 0.0,
    ignore: int = -100,
    *,
    threads: int = 1,
) -> Array: ...
def adt_noise(like: Array, seed: int, samples: int, step: int = 0, *, threads: int = 1) -> Array: ...
def adt_sample(
    x: Array,
    mu: Array,
    rho: Array,
    seed: int,
    eps: Array,
    samples: int,
    step: int = 0,
    low: float = ...,
    high: float = ...,
    *,
    threads: int = 1,
) -> Array: ...
def adt_backward(
    g: Array,
    x: Array,
    mu: Array,
    rho: Array,
    seed: int,
    eps: Array,
    weight: Array,
    step: int = 0,
    low: float = ...,
    high: float = ...,
    *,
    threads: int = 1,
) -> Array: ...
def adt_ascend(
    g: Array,
    x: Array,
    mu: Array,
    rho: Array,
    seed: int,
    eps: Array,
    weight: Array,
    totals: Array | None,
    step: int,
    rate: float,
    low: float = ...,
    high: float = ...,
    *,
    threads: int = 1,
) -> tuple[Array, Array, Array]: ...
def ensemble_stats(
    logits: Array,
    labels: Index | None = None,
    bins: int = 15,
    ignore: int = -100,
    probability: bool = True,
    *,
    threads: int = 1,
) -> tuple[Array, Index, Array, Index, Array, Array, Array, NDArray[np.float64], NDArray[np.float64]]: ...

class Codebook:
    """Codes [G, K, D] that stay prepared for lookups of few rows. The array must not change as long as this is used."""

    def __init__(self, codebook: Array, dot: bool = False) -> None: ...
    def nearest(
        self, x: Array, best: int = 1, bits: int = 64, distance: bool = False, *, threads: int = 1
    ) -> tuple[Indices, Array]: ...

# Models without torch; see ``fastseq.deploy``.

class ModelError(ValueError): ...
class FileError(OSError): ...

# What these do is in the compiled module, for help().

class Stream:
    def step(self, x: NDArray[Any], *, threads: int = 1) -> NDArray[Any]: ...
    def reset(self) -> None: ...
    def save(self) -> NDArray[np.float32]: ...
    def load(self, state: NDArray[np.float32]) -> None: ...

class Model:
    description: str
    looks_ahead: str
    state_size: int
    input_size: int
    output_size: int
    input_is_index: bool
    output_is_index: bool
    @staticmethod
    def load(path: str) -> Model: ...
    @staticmethod
    def parse(bytes: bytes) -> Model: ...
    def run(
        self,
        x: NDArray[Any],
        lengths: Index | None = None,
        state: NDArray[np.float32] | None = None,
        *,
        threads: int = 1,
    ) -> tuple[NDArray[Any], NDArray[np.float32] | None]: ...
    def stream(self) -> Stream: ...
    def step_batch(self, streams: Sequence[Stream], x: NDArray[Any], *, threads: int = 1) -> NDArray[Any]: ...

# Packed matrices; see ``csrc/core/matrix.h``.

def pack_matrix(
    rows: Sequence[NDArray[Any]],
    rows_scale: Sequence[NDArray[np.float32]],
    group: Sequence[int],
    down: Sequence[NDArray[Any]],
    down_scale: Sequence[NDArray[np.float32]],
    down_group: Sequence[int],
    K: int,
    bounded: bool,
) -> NDArray[np.uint8]: ...
def linear_packed(
    x: NDArray[np.float32],
    weight: NDArray[np.uint8],
    bias: NDArray[np.float32] | None = None,
    *,
    threads: int = 1,
) -> NDArray[np.float32]: ...
def lstm_packed(
    x: NDArray[np.float32],
    weight_hh: NDArray[np.uint8],
    h0: NDArray[np.float32],
    c0: NDArray[np.float32],
    weight_ih: NDArray[np.uint8] | None = None,
    bias: NDArray[np.float32] | None = None,
    weight_hr: NDArray[np.uint8] | None = None,
    lengths: Index | None = None,
    batch_sizes: Index | None = None,
    reset: Mask | None = None,
    h_start: NDArray[np.float32] | None = None,
    c_start: NDArray[np.float32] | None = None,
    tau: float = 1.0,
    hard: bool = False,
    reverse: bool = False,
    save: int = 0,
    *,
    threads: int = 1,
) -> tuple[NDArray[np.float32], ...]: ...
