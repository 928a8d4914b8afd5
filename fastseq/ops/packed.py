"""``fastseq::pack_matrix``, ``linear_packed`` and ``lstm_packed_forward`` for torch: ``fastseq.reference.packed``.

Only the compiled core has them, and none has a gradient. What ``pack_matrix`` returns are bytes, the same on every
instruction set; the others take them together with the size that they do not show, N. ``pack_matrix`` takes parts by
gate as ``csrc/core/matrix.h`` has them: tensors without elements stand for scales and lower factors that are not there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.ops._library import core_alone, fake, library, register
from fastseq.ops.lstm import fake_forward
from fastseq.reference import Matrix

library.define(
    "pack_matrix(Tensor[] rows, Tensor[] rows_scale, int[] group, Tensor[] down, Tensor[] down_scale, "
    "int[] down_group, int K, bool bounded) -> Tensor"
)
library.define("linear_packed(Tensor x, Tensor weight, Tensor? bias, int N) -> Tensor")
library.define(
    "lstm_packed_forward(Tensor x, Tensor weight_hh, Tensor h0, Tensor c0, Tensor? weight_ih, Tensor? bias, "
    "Tensor? weight_hr, Tensor? lengths, Tensor? batch_sizes, Tensor? reset, Tensor? h_start, Tensor? c_start, "
    "float tau, bool hard, bool reverse, int save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@fake("pack_matrix")
def _(rows: list[Tensor], *args: Any) -> Tensor:
    return rows[0].new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


@fake("linear_packed")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, N: int) -> Tensor:
    return x.new_empty(x.shape[0], N)


@fake("lstm_packed_forward")
def _(x: Tensor, weight_hh: Tensor, h0: Tensor, c0: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return fake_forward(x, weight_hh, h0, c0, *args)


BACKENDS = {op: core_alone(op) for op in ("pack_matrix", "linear_packed", "lstm_packed_forward")}
for _op in BACKENDS:
    register(_op, BACKENDS[_op])


def pack(matrix: Matrix, K: int, bounded: bool = False) -> Tensor:
    """The bytes of a matrix [N, K] on the CPU; ``bounded``: for inputs within -1 .. 1."""
    none = torch.zeros(0)

    def of(parts: Any) -> tuple[list[Tensor], list[Tensor], list[int]]:
        values = [none if p is None else _kept(p.values) for p in parts]
        scales = [none if p is None or p.scale is None else p.scale.detach().contiguous() for p in parts]
        return values, scales, [0 if p is None else p.group for p in parts]

    rows, down = of([gate.rows for gate in matrix]), of([gate.down for gate in matrix])
    packed: Tensor = torch.ops.fastseq.pack_matrix.default(*rows, *down, K, bounded)
    return packed


def _kept(values: Tensor) -> Tensor:
    """In a dtype that can be packed."""
    values = values.detach()
    return (values.float() if values.dtype in (torch.float16, torch.float64) else values).contiguous()
