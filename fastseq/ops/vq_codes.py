"""``fastseq::vq_pack`` and ``fastseq::vq_unpack`` for torch. Meaning and shapes: ``fastseq.reference.vq_codes``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq import reference
from fastseq.ops._library import backends, fake, library, register

library.define("vq_pack(Tensor index, int bits) -> Tensor")
library.define("vq_unpack(Tensor packed, int bits, int count) -> Tensor")


@fake("vq_pack")
def _(index: Tensor, bits: int) -> Tensor:
    return index.new_empty(index.shape[0], (index.shape[1] * bits + 7) // 8, dtype=torch.uint8)


@fake("vq_unpack")
def _(packed: Tensor, bits: int, count: int) -> Tensor:
    return packed.new_empty(packed.shape[0], count, dtype=torch.int64)


BACKENDS = {
    "vq_pack": backends("vq_pack", reference.vq_pack, "vq_codes"),
    "vq_unpack": backends("vq_unpack", reference.vq_unpack, "vq_codes"),
}
for _op in BACKENDS:
    register(_op, BACKENDS[_op])
