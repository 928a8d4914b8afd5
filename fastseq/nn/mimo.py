"""``MIMO``: a network of one example and one answer, made one of M examples and M answers."""

from __future__ import annotations

import copy
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastseq import _check, functional
from fastseq.functional import EnsembleStats
from fastseq.nn import _mimo_parts as parts
from fastseq.nn._mimo_fold import MODES, Call, MIMOLayer, calls, check_slots, fold, unfold
from fastseq.nn.mimo_layers import MIMOEmbedding, MIMOHead, MIMOLinear

_logger = logging.getLogger("fastseq")


class MIMOReport(NamedTuple):
    """What ``MIMO`` did to a network."""

    first: str  # name of the first layer
    head: str  # name of the head
    was: tuple[str, str]  # what both were
    now: tuple[str, str]  # what they are
    weights: str
    parameters: tuple[int, int]  # of the network, before and after

    def __str__(self) -> str:
        before, after = self.parameters
        return (
            f"{self.first}: {self.was[0]} -> {self.now[0]}; {self.head}: {self.was[1]} -> {self.now[1]}; "
            f"{'fresh weights' if self.weights == 'fresh' else 'weights copied'}; "
            f"parameters {before:,} -> {after:,} ({after / before - 1:+.2%})"
        )


class MIMO(nn.Module):
    """An ensemble of M subnetworks inside one network (Havasi et al., ICLR 2021), made from any network.

    The first layer is replaced by one that takes M examples side by side, the head by M heads. What lies before the
    first layer sees single examples, what lies behind it rows, of which the train mode has more (R for each example).

    - train, ``model(x, index)``: x of B distinct examples, index [M, R*B] of ``MIMOIndex``.
    - ensemble, ``model(x)``: the same input in all slots; ``stats`` averages the probabilities.
    - multiplex, ``model(x, mode="multiplex")``: M different examples in a row, behind the dimension of the examples:
      x [rows, M, ...]. M answers for the price of one.

    All give logits [rows, M, K], and taggers [rows, T, M, K] or as their network lays them out. The modes do not depend
    on ``self.training``. Several threads may call one model at a time.

    Args:
        backbone: any module whose head's output is what it returns. Activation checkpointing inside it may not hold the
            first layer, which is told the index in the thread and for the time of the forward only.
        M: slots, >= 2.
        first, head: names of the layers, such as "encoder.conv1". First: ``nn.Linear``, ``Conv1d``, ``Conv2d``,
            ``Embedding``, ``LSTM`` or ``fastseq.nn.LSTM``; head: ``nn.Linear``. None: they are found, by the order of
            calls where there is an ``example``, else by the order of registration, and refused where that is unsure.
        example: an input of the backbone, or a tuple of its arguments; it is run once without gradients, in evaluation
            mode.
        weights: "fresh": both layers are drawn anew. "copy": each slot has the first layer's weights / M, each head
            those of the head, so that the ensemble starts as the network was; what is frozen stays so.
        inplace: change ``backbone`` itself; else a deep copy of it is changed.
        batch_dim: dimension of the examples in x and in the labels; None: 1 where the first layer is an LSTM that takes
            time first, else 0. An LSTM as first layer finds them in its own input by its own batch_first.

    Attributes:
        backbone: the network, changed. report: ``MIMOReport`` of what was done, also logged.

    Raises:
        ArgumentError: naming the layers, and what to do.
    """

    def __init__(
        self,
        backbone: nn.Module,
        M: int,
        first: str | None = None,
        head: str | None = None,
        example: Any = None,
        *,
        weights: str = "fresh",
        inplace: bool = False,
        batch_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_slots("MIMO", M)
        _check.one_of("MIMO", "weights", weights, ("fresh", "copy"))
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"MIMO: backbone should be of type nn.Module, got: {type(backbone).__name__}")
        first_name, head_name = parts.find(backbone, first, head, example)
        before = sum(p.numel() for p in backbone.parameters())
        self.backbone = backbone if inplace else copy.deepcopy(backbone)
        old = self.backbone.get_submodule(first_name), self.backbone.get_submodule(head_name)
        new = parts.first_layer(old[0], M, weights == "copy"), parts.head_layer(old[1], M, weights == "copy")
        if batch_dim is None:
            parts.check_time_first(self.backbone, first_name)
        elif isinstance(new[0], (MIMOLinear, MIMOEmbedding)):  # all others know where their examples are
            new[0].batch_dim = batch_dim
        for name, layer in zip((first_name, head_name), new, strict=True):
            self.backbone.set_submodule(name, layer)
        self.M, self.K, self.batch_dim = M, new[1].K, new[0].batch_dim if batch_dim is None else batch_dim
        after = sum(p.numel() for p in self.backbone.parameters())
        was, now = (tuple(f"{type(m).__name__}({m.extra_repr()})" for m in pair) for pair in (old, new))
        self.report = MIMOReport(first_name, head_name, was, now, weights, (before, after))  # type: ignore[arg-type]
        if example is not None:
            self._try(*(example if isinstance(example, tuple) else (example,)))
        _logger.info("MIMO of %d slots: %s", M, self.report)

    def _try(self, x: Any, *args: Any) -> None:
        """One forward with more rows than examples, which a network may not be made for."""
        if not isinstance(x, Tensor) or x.dim() <= self.batch_dim or not x.shape[self.batch_dim]:
            return
        B = x.shape[self.batch_dim]
        index = functional.mimo_index(B, self.M, 2, generator=torch.Generator().manual_seed(0)).to(x.device)
        try:
            with parts.evaluating(self):
                out = self(x, index, *args)
        except Exception as error:
            want = f"a network that takes {B} examples before its first layer {self.report.first} and {2 * B} behind it"
            got = f"{type(error).__name__}: {error} (examples counted along batch_dim = {self.batch_dim})"
            raise _check.ArgumentError(f"MIMO: backbone must be {want}, got {got}") from error
        at = self.batch_dim if out.dim() - 2 > self.batch_dim else 0
        if out.shape[at] != 2 * B:
            want = f"a network of {2 * B} rows of logits along {at}, with batch_dim = {self.batch_dim}"
            _check.fail("MIMO", "backbone", want, list(out.shape))

    @property
    def first(self) -> MIMOLayer:
        """The first layer."""
        return self.backbone.get_submodule(self.report.first)  # type: ignore[return-value]

    @property
    def head(self) -> MIMOHead:
        """The heads."""
        return self.backbone.get_submodule(self.report.head)  # type: ignore[return-value]

    def forward(
        self, x: Any, index: Tensor | None = None, *args: Any, mode: str | None = None, **options: Any
    ) -> Tensor:
        """
        Args:
            x: input of the backbone; multiplex: with a dimension of M examples behind that of the rows.
            index: int32 or int64 [M, R*B], in the train mode only.
            args, options: handed to the backbone as they are.

        Returns:
            Logits [rows, M, K], with what further dimensions the head's input has before M.

        Raises:
            ArgumentError: where the backbone returns something else than its head does, and from the layers.
        """
        if mode is None:
            mode = "ensemble" if index is None else "train"
        _check.one_of("MIMO", "mode", mode, MODES)
        if (index is not None) != (mode == "train"):
            got = "None" if index is None else "an index"
            _check.fail("MIMO", "index", f"{'an index' if index is None else 'None'} in mode {mode!r}", got)
        if mode != "ensemble" and self._is_compressed:
            _check.fail("MIMO", "mode", "'ensemble', since the first layer has no weights of each slot", repr(mode))
        if mode == "multiplex":
            b = self.batch_dim
            if not isinstance(x, Tensor) or x.dim() <= b + 1 or x.shape[b + 1] != self.M:
                shape: Any = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
                _check.fail("MIMO", "x", f"a tensor with M = {self.M} examples along {b + 1}", shape)
            x = x.flatten(b, b + 1)
        before = getattr(calls, "now", None)
        calls.now = call = Call(self.first, self.head, mode, index)
        try:
            out = self.backbone(x, *args, **options)
        finally:
            calls.now = before
        if call.returned is None or out is not call.returned:
            parts.explain_output(self.report.head, out, call.returned)
        return call.returned

    def loss(self, logits: Tensor, labels: Tensor, index: Tensor | None = None, **options: Any) -> Tensor:
        """``fastseq.functional.mimo_nll``: the sum over slots of the mean cross-entropy.

        Args:
            logits: of ``forward``.
            labels: with ``index``: those of the examples, [B], taggers [B, T] as their input; without: of the slots,
                [rows, M], or one for all slots of a row, [rows].
            options: of ``mimo_nll``.
        """
        if index is not None:
            b = self.batch_dim if labels.dim() > self.batch_dim else 0
            labels = functional.mimo_labels(labels.movedim(b, 0), index).movedim(1, -1).movedim(0, b)
        elif labels.dim() == logits.dim() - 2:
            labels = labels[..., None].expand(*labels.shape, self.M)
        return functional.mimo_nll(logits, labels, **options)

    def stats(self, logits: Tensor, labels: Tensor | None = None, **options: Any) -> EnsembleStats:
        """``fastseq.functional.ensemble_stats`` of the ensemble mode's logits [rows, ..., M, K] and labels [rows, ...],
        further dimensions flattened into rows."""
        if logits.dim() < 3:
            _check.fail("MIMO", "logits", "[rows, ..., M, K] of the ensemble mode", list(logits.shape))
        return functional.ensemble_stats(logits.flatten(0, -3), None if labels is None else labels.flatten(), **options)

    def fold(self) -> MIMO:
        """``fastseq.nn.fold`` of this model."""
        self._refuse_compressed("fold")
        fold(self)
        return self

    def unfold(self) -> MIMO:
        """``fastseq.nn.unfold`` of this model."""
        self._refuse_compressed("unfold")
        unfold(self)
        return self

    def to_plain(self) -> nn.Module:
        """The ensemble mode as a copy of the backbone with plain layers, folded weights and one head of M*K, which
        returns [rows, M, K]: for deployment and export."""
        self._refuse_compressed("to_plain")
        plain = copy.deepcopy(self.backbone)
        plain.set_submodule(self.report.first, self.first.to_plain())
        plain.set_submodule(self.report.head, self.head.to_plain())
        return plain

    @property
    def _is_compressed(self) -> bool:
        return not isinstance(self.first, MIMOLayer)

    def _refuse_compressed(self, method: str) -> None:
        if self._is_compressed:
            why = f"this model was compressed as folded, its first layer is a {type(self.first).__name__}"
            raise _check.ArgumentError(f"MIMO: {method}() needs the weights of each slot: {why}")

    def extra_repr(self) -> str:
        return f"M={self.M}, K={self.K}, {self.report}"
