"""The models that are compared on real data: plain, deep ensemble, MIMO, and MIMO as torch-uncertainty does it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import CannotRun
from benchmarks.mimo_tasks import Data, RowLSTM, Task

R = 4  # batch repetition


class Model(NamedTuple):
    """A network, its loss on a batch, and its logits [B, M, K]."""

    network: nn.Module
    loss: Callable[[Data, torch.Generator], Tensor]
    predict: Callable[[Data], Tensor]


class Kind(NamedTuple):
    """One line of the table; tasks: those it is for, () means all."""

    name: str
    make: Callable[[Task], Model]
    tasks: tuple[str, ...] = ()


class RowMIMO(nn.Module):
    """``RowLSTM`` for M slots; each head reads the state at the end of its own example."""

    def __init__(self, C: int, H: int, K: int, M: int) -> None:
        from fastseq.nn import MIMOLSTM, MIMOHead

        super().__init__()
        self.lstm, self.head = MIMOLSTM(C, H, M=M, batch_first=True), MIMOHead(H, K, M)

    def forward(self, x: Tensor, lengths: Tensor | None, index: Tensor | None = None) -> Tensor:
        y, _ = self.lstm(x, index=index, lengths=lengths)
        if lengths is None:
            return self.head(y[:, -1])
        if index is None:
            return self.head(_last(y, lengths))
        return self.head(self.lstm.last_of_slots(y, self.lstm.slot_lengths(index, lengths)), per_slot=True)


def _last(y: Tensor, lengths: Tensor) -> Tensor:
    return y[torch.arange(len(y)), lengths - 1]


def _plain(task: Task) -> Model:
    network = task.network()

    def logits(data: Data) -> Tensor:
        if data.lengths is None:
            return network(data.x)
        return network.head(_last(network.lstm(data.x, lengths=data.lengths)[0], data.lengths))

    return Model(
        network,
        lambda data, _: F.cross_entropy(logits(data), data.labels),
        lambda data: logits(data)[:, None],
    )


def _mimo(M: int, rho: float) -> Callable[[Task], Model]:
    def make(task: Task) -> Model:
        from fastseq.functional import mimo_nll
        from fastseq.nn import MIMO, MIMOIndex

        plain = task.network()
        if isinstance(plain, RowLSTM):
            network: Any = RowMIMO(plain.lstm.input_size, plain.lstm.hidden_size, task.classes, M)

            def forward(data: Data, index: Tensor | None = None) -> Tensor:
                return network(data.x, data.lengths, index)
        else:
            network = MIMO(plain, M)

            def forward(data: Data, index: Tensor | None = None) -> Tensor:
                return network(data.x, index)

        def loss(data: Data, generator: torch.Generator) -> Tensor:
            index = MIMOIndex(len(data.x), M, R, rho).draw(generator)
            return mimo_nll(forward(data, index), data.labels, index)

        return Model(network, loss, forward)

    return make


def _uncertainty(M: int, rho: float) -> Callable[[Task], Model]:
    """Batches as torch-uncertainty formats them, examples slot by slot; its loss, a mean over slots; the network tiles
    its input when it does not train."""

    def make(task: Task) -> Model:
        format_batch = _batch_format()(M, rho, R)
        network: Any = task.network()
        first, last = network[0], network[-1]
        network[0] = nn.Conv2d(
            M * first.in_channels, first.out_channels, first.kernel_size, first.stride, first.padding
        )
        network[-1] = nn.Linear(last.in_features, M * last.out_features)

        def logits(x: Tensor) -> Tensor:
            """[M * B, C, H, W] -> [B, M, K]."""
            rows = x.unflatten(0, (M, -1)).transpose(0, 1).flatten(1, 2)
            return network(rows).unflatten(1, (M, -1))

        def loss(data: Data, _: torch.Generator) -> Tensor:
            x, labels = format_batch((data.x, data.labels))
            return F.cross_entropy(logits(x).transpose(0, 1).flatten(0, 1), labels)

        return Model(network, loss, lambda data: logits(data.x.repeat(M, 1, 1, 1)))

    return make


def _batch_format() -> Any:
    """``MIMOBatchFormat``. torchvision built for CUDA cannot describe its operators to a torch without it; nothing here
    uses them."""
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    try:
        from torch_uncertainty.transforms import MIMOBatchFormat
    except ImportError as error:
        raise CannotRun(f"needs torch-uncertainty ({error})") from None
    return MIMOBatchFormat


KINDS = (
    Kind("plain", _plain),
    Kind("ensemble", _plain),
    *(Kind(f"MIMO M={M} rho={rho:g}", _mimo(M, rho)) for M in (2, 3) for rho in (0.0, 0.5)),
    Kind("torch-uncertainty M=3 rho=0", _uncertainty(3, 0.0), ("mnist cnn",)),
)
