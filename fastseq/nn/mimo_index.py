"""``MIMOIndex``: which examples lie in one row, drawn anew for each batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import _check, functional
from fastseq.nn._mimo_fold import check_slots


class MIMOIndex:
    """Draws the rows of a batch: which example lies in which slot (MIMO, Havasi et al., ICLR 2021).

    Args:
        batch: distinct examples of a batch, >= 1.
        M: slots, >= 2.
        R: batch repetition, >= 1: each example lies R times in every slot, so a batch has R * batch rows.
        rho: input repetition, in [0, 1]: the share of rows that hold one example in all slots.
    """

    def __init__(self, batch: int, M: int, R: int = 1, rho: float = 0.0) -> None:
        for name, value in (("batch", batch), ("R", R)):
            _check_count(name, value)
        check_slots("MIMOIndex", M)
        _check.probability("MIMOIndex", "rho", rho)
        self.batch, self.M, self.R, self.rho = batch, M, R, rho

    @property
    def rows(self) -> int:
        """Of a full batch, batch * R."""
        return self.batch * self.R

    def draw(
        self,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        *,
        batch: int | None = None,
        lengths: Tensor | None = None,
        buckets: int | None = None,
    ) -> Tensor:
        """
        Args:
            generator: of the CPU, where indices are drawn; None means torch's default.
            device: of the result; None means the CPU.
            batch: examples of this batch where they are fewer, such as the last one's.
            lengths: integers [batch], with ``buckets``: examples are sorted by length and split into that many parts
                of equal number, and the examples of a row come from one part, so that little of a row is padding.
                ``rho`` is then rounded in each part.
            buckets: 1 .. batch // 2.

        Returns:
            int32 [M, batch * R]. Every example lies exactly R times in every slot.

        Raises:
            ArgumentError: naming the argument.
        """
        f = "MIMOIndex.draw"
        if generator is not None and generator.device.type != "cpu":
            _check.fail(f, "generator", "one of the CPU", f"one of {generator.device}")
        B = self.batch if batch is None else batch
        _check_count("batch", B)
        if self.batch < B:
            _check.fail(f, "batch", f"at most that of the index, {self.batch}", B)
        if (lengths is None) != (buckets is None):
            _check.fail(f, "buckets" if buckets is None else "lengths", "given, as both or none are", None)
        if lengths is None or buckets is None:
            return functional.mimo_index(B, self.M, self.R, self.rho, generator).to(device)
        _check.shape(f, "lengths", lengths, "batch", B)
        if isinstance(buckets, bool) or not isinstance(buckets, int) or not 1 <= buckets <= max(1, B // 2):
            _check.fail(f, "buckets", f"an integer in 1 .. batch // 2 = {max(1, B // 2)}", repr(buckets))
        return self._bucketed(lengths.cpu(), buckets, generator).to(device)

    def _bucketed(self, lengths: Tensor, buckets: int, generator: torch.Generator | None) -> Tensor:
        B = lengths.shape[0]
        shuffled = torch.randperm(B, generator=generator)  # examples of one length lie in any part
        order = shuffled[lengths[shuffled].argsort(stable=True)].to(torch.int32)
        parts = [
            part[functional.mimo_index(part.shape[0], self.M, self.R, self.rho, generator).long()]
            for part in order.tensor_split(buckets)
        ]
        rows = torch.cat(parts, 1)
        return rows[:, torch.randperm(rows.shape[1], generator=generator)].contiguous()

    def __repr__(self) -> str:
        return f"MIMOIndex(batch={self.batch}, M={self.M}, R={self.R}, rho={self.rho})"


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _check.fail("MIMOIndex", name, "an integer >= 1", repr(value))
