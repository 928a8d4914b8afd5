"""``MIMOLSTM``: ``fastseq.nn.LSTM`` whose first layer takes several examples side by side."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastseq import _check, functional
from fastseq.functional import Gates, Weights
from fastseq.nn import _arguments
from fastseq.nn._mimo_fold import MIMOLayer, check_slots
from fastseq.nn.lstm import _DEFAULTS, LSTM, State


class MIMOState(NamedTuple):
    """The state of rows of several examples, and which these are: it fits the next steps of the same rows only."""

    h: Tensor  # [L*D, N, P]
    c: Tensor  # [L*D, N, H]
    index: Tensor  # type: ignore[assignment]  # [M, N], in the place of tuple.index

    def detach(self) -> MIMOState:
        """For truncated backpropagation."""
        return MIMOState(self.h.detach(), self.c.detach(), self.index)


class MIMOLSTM(MIMOLayer, LSTM):
    """An LSTM on M examples side by side. One hidden state serves them all; ``MIMOHead`` reads it for each.

    Three modes, whatever ``self.training`` is (C is ``input_size``; B and T the other way round with batch_first):

    - train, ``lstm(x, index)``: x [T, B, C] of distinct examples, index [M, N] of ``MIMOIndex``: N rows of several
      examples. The input product is that of ``functional.mimo_project``: once for each example, not for each row,
      where that is less work (but of the rows where torch's own LSTM runs, on a GPU).
    - ensemble, ``lstm(x)``: the same x in all slots, with folded weights.
    - multiplex, ``lstm(x, mode="multiplex")``: x [T, B, M, C], another example in each slot.

    Parameters, their draws and the state_dict are those of an LSTM with M*C inputs, slot 0 first.

    Args:
        input_size: channels of one slot. M: slots, >= 2. All others: as in ``fastseq.nn.LSTM``.
    """

    def __init__(self, input_size: int, hidden_size: int, *args: Any, M: int, **options: Any) -> None:
        check_slots("MIMOLSTM", M)
        super().__init__(M * input_size, hidden_size, *args, **options)
        first = self._weight_names[: 2 if self.bidirectional else 1]
        self._set_slots(M, input_size, tuple(names.weight_ih for names in first))
        self.batch_dim = 0 if self.batch_first else 1

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | MIMOState | Tensor | None = None,
        index: Tensor | None = None,
        *,
        mode: str | None = None,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        return_gates: bool = False,
    ) -> tuple[Any, ...]:
        """
        Args:
            input: as said above, or a ``PackedSequence`` of examples [..., C], multiplex [..., M, C].
            hx: train: a ``MIMOState``, with which ``index`` may be left out (a tensor here is taken as the index);
                the other modes: (h_0, c_0), as in ``fastseq.nn.LSTM``.
            lengths: integers, valid steps of each example: [B], multiplex [B, M]. What lies beyond is taken as zeros,
                and a row runs to the longest of its slots.
            reset: bool, of the rows: train [T, N].
            return_gates: as in ``fastseq.nn.LSTM``.

        Returns:
            output and state of the rows, and with ``return_gates`` the gates; the state of the train mode is a
            ``MIMOState``. Packed input gives packed rows.

        Raises:
            ArgumentError: naming the argument.
        """
        if isinstance(hx, Tensor):
            if index is not None:
                raise TypeError("MIMOLSTM: hx must be a MIMOState beside index, got a tensor")
            hx, index = None, hx
        inside = self._told is not None
        if isinstance(hx, MIMOState):
            hx, index = self._state_of(hx, index, mode)
        elif index is not None and hx is not None:
            _check.fail("MIMOLSTM", "hx", "a MIMOState in mode 'train'", type(hx).__name__)
        mode, index = self._mode_of(index, mode)
        if mode == "multiplex" and inside and isinstance(input, PackedSequence):
            examples = torch.arange(_rows(input), device=input.data.device)  # of different lengths, M in each row
            index = examples.view(-1, self.M).T
        if index is not None:
            if mode == "train":
                batch = _rows(input) if isinstance(input, PackedSequence) else input.shape[self.batch_dim]
                index = self._check_index(index, batch)
            found = self._train_rows(input, hx, index, lengths, reset, return_gates)
            h, c = found[1]
            return found if inside else (found[0], MIMOState(h, c, index), *found[2:])
        if mode == "multiplex":
            if isinstance(input, PackedSequence):
                self._check_last(input.data, "M, C", self.M, self.channels)
                input = input._replace(data=input.data.flatten(-2))
            else:
                input, lengths = self._side_by_side(self._slots_of_rows(input), lengths)
        return self._forward(input, hx, self._weights_of(mode), lengths, reset, return_gates)

    def _state_of(self, state: MIMOState, index: Tensor | None, mode: str | None) -> tuple[State, Tensor]:
        """(h, c) and the index of a carried state, which no other may replace."""
        if mode not in (None, "train") or self._told is not None:
            _check.fail("MIMOLSTM", "hx", f"(h_0, c_0) in mode {mode!r}", "a MIMOState")
        if index is not None and index is not state.index and not torch.compiler.is_compiling():
            if index.shape != state.index.shape or not torch.equal(index.to(state.index), state.index):
                _check.fail("MIMOLSTM", "index", "that of the state, whose rows hold these examples", "another one")
        return (state.h, state.c), state.index

    def _weights_of(self, mode: str) -> list[Weights]:
        weights = self._weights()
        for n, name in enumerate(self._folding if mode == "ensemble" else ()):
            weights[n] = weights[n]._replace(weight_ih=self._folded(name))
        return weights

    def _check_input(self, x: Tensor, weights: list[Weights], dims: int) -> None:
        _arguments.check_input(x, weights[0].weight_ih.shape[1], weights[0].weight_ih, dims)  # folded or not

    def _train_rows(
        self,
        input: Tensor | PackedSequence,
        hx: State | None,
        index: Tensor,
        lengths: Tensor | None,
        reset: Any,
        return_gates: bool,
    ) -> tuple[Any, ...]:
        """The train mode; the state as a pair."""
        if isinstance(input, PackedSequence):
            if lengths is not None:
                _check.fail("MIMOLSTM", "lengths", "None for a PackedSequence, which has its own", list(lengths.shape))
            x, lengths = pad_packed_sequence(input, self.batch_first)
            output, state, *gates = self._train_rows(x, hx, index, lengths, reset, return_gates)
            rows = self.slot_lengths(index, lengths).amax(1).cpu()
            packed: list[Any] = [
                _pack(t, rows, self.batch_first) for t in (output, *(t for g in gates for v in g for t in v))
            ]
            kept = [Gates(*packed[n : n + 3]) for n in range(1, len(packed), 3)]
            return (packed[0], state, kept) if return_gates else (packed[0], state)
        weights = self._weights()
        _arguments.check_input(input, self.channels, weights[0].weight_ih, 3)
        x = input.transpose(0, 1) if self.batch_first else input
        if lengths is not None:
            _check_lengths(lengths, *self._sizes(input))
            x = _zero_beyond(x, lengths)
            lengths = self.slot_lengths(index, lengths).amax(1)
        N = index.shape[1]
        if hx is not None:
            hx = _arguments.check_state(hx, "MIMOLSTM")
            self._check_state(hx, x, N)
        if reset is not None:
            reset = self._rows_reset(reset, x.shape[0], N)
        out = self._call(x, hx, weights, index=index, lengths=lengths, reset=reset, return_gates=return_gates)

        def restore(t: Tensor) -> Tensor:
            return t.transpose(0, 1) if self.batch_first else t

        found = restore(out.output), (out.h_n, out.c_n)
        return (*found, [Gates(*map(restore, g)) for g in out.gates]) if return_gates else found

    def _rows_reset(self, reset: Any, T: int, N: int) -> Tensor:
        sizes = (N, T) if self.batch_first else (T, N)
        symbols = "N, T" if self.batch_first else "T, N"
        if not isinstance(reset, Tensor):
            _check.fail("MIMOLSTM", "reset", f"a bool tensor [{symbols}] of the rows", type(reset).__name__)
        _check.shape("MIMOLSTM", "reset", reset, symbols, *sizes)
        _check.dtype("MIMOLSTM", "reset", reset, torch.bool)
        return reset.transpose(0, 1) if self.batch_first else reset

    def _side_by_side(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The input of the multiplex mode as rows of M*C channels, and how long these are."""
        self._check_last(x, "M, C", self.M, self.channels)
        if lengths is None:
            return x.flatten(-2), None
        T, B = self._sizes(x)
        _check.shape("MIMOLSTM", "lengths", lengths, "B, M", B, self.M)
        _check_lengths(lengths.flatten(), T, B * self.M)
        time_first = x.transpose(0, 1) if self.batch_first else x
        x = _zero_beyond(time_first.flatten(1, 2), lengths.flatten()).view(T, B, -1)
        return (x.transpose(0, 1) if self.batch_first else x), lengths.amax(1)

    def _sizes(self, x: Any) -> tuple[int, int]:
        """T and B of a batched input."""
        return (x.shape[1], x.shape[0]) if self.batch_first else (x.shape[0], x.shape[1])

    def slot_lengths(self, index: Tensor | None, lengths: Tensor) -> Tensor:
        """Valid steps of each slot of each row: int64 [N, M] from index [M, N] and lengths [B] of the examples; index
        None: of the ensemble mode, [B, M]."""
        if index is None:
            return lengths.to(torch.int64)[:, None].expand(-1, self.M)
        return functional.mimo_labels(lengths.to(index.device, torch.int64), index)

    def last_of_slots(self, output: Tensor | PackedSequence, slot_lengths: Tensor) -> Tensor:
        """The state at each slot's own end, for ``MIMOHead`` with ``per_slot``.

        Args:
            output: of ``forward``. slot_lengths: [N, M], of ``slot_lengths``.

        Returns:
            [N, M, D*P]: the forward direction after a slot's last valid step, the reverse direction after its last,
            which is step 0; zeros for a slot without valid steps.
        """
        if isinstance(output, PackedSequence):
            output = pad_packed_sequence(output, self.batch_first)[0]
        y = output if self.batch_first else output.transpose(0, 1)
        _check.shape("last_of_slots", "slot_lengths", slot_lengths, "N, M", y.shape[0], self.M)
        ends = slot_lengths.to(y.device, torch.int64)
        at = (ends - 1).clamp_min(0)
        P = self.proj_size or self.hidden_size
        found = y[torch.arange(y.shape[0], device=y.device)[:, None], at]
        if self.bidirectional:
            found = torch.cat([found[..., :P], y[:, :1, P:].expand(-1, self.M, -1)], -1)
        return torch.where((ends > 0)[..., None], found, 0)

    def to_plain(self) -> LSTM:
        """The ensemble mode as a ``fastseq.nn.LSTM`` with folded weights, for deployment and export."""
        sizes = (self.hidden_size, self.num_layers, self.bias, self.batch_first, self.dropout, self.bidirectional)
        weight = self.weight_ih_l0
        plain = LSTM(self.channels, *sizes, self.proj_size, weight.device, weight.dtype, **lstm_options(self))
        state = self.state_dict()
        plain.load_state_dict(state | {name: self._folded(name).detach() for name in self._folding})
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(getattr(self, name).requires_grad)
        return plain.train(self.training)

    def export_state(self, name: str = "lstm") -> dict[str, Any]:
        """Of the folded LSTM; see ``fastseq.export_state``."""
        return self.to_plain().export_state(name)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, M={self.M}"


def lstm_options(module: LSTM) -> dict[str, Any]:
    """The options by name that make an LSTM like this one."""
    return {name: getattr(module, name) for name in _DEFAULTS}


def _zero_beyond(x: Tensor, lengths: Tensor) -> Tensor:
    """Zeros (never products with padding, which may be NaN) beyond each example's own end: x [T, B, C]."""
    step = torch.arange(x.shape[0], device=x.device)
    return torch.where((step[:, None] < lengths.to(x.device))[..., None], x, 0)


def _check_lengths(lengths: Tensor, T: int, B: int) -> None:
    _check.shape("MIMOLSTM", "lengths", lengths, "B", B)
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        _check.fail("MIMOLSTM", "lengths", "integers", lengths.dtype)
    if B and lengths.is_cpu and not torch.compiler.is_compiling():
        least, most = int(lengths.min()), int(lengths.max())
        if least < 0 or most > T:
            _check.fail("MIMOLSTM", "lengths", f"in 0..T = 0..{T}", f"{least}..{most}")


def _rows(packed: PackedSequence) -> int:
    return int(packed.batch_sizes[0]) if packed.sorted_indices is None else packed.sorted_indices.shape[0]


def _pack(t: Tensor, lengths: Tensor, batch_first: bool) -> PackedSequence:
    return pack_padded_sequence(t, lengths, batch_first, enforce_sorted=False)
