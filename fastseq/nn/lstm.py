"""``LSTM``: the parameters and the call of ``torch.nn.LSTM``, with binary gates and more as options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from fastseq import _check, functional
from fastseq.functional import Factors, Gates, Weights
from fastseq.nn import _arguments, _lstm_rank
from fastseq.nn._exporting import plain_lstm_state
from fastseq.nn.gates import GATE_DEFAULTS, GateOptions

State = tuple[Tensor, Tensor]

_DEFAULTS: dict[str, Any] = {
    **GATE_DEFAULTS,
    "weight_dropout": 0.0,
    "variational_dropout": 0.0,
    "forget_bias": None,
    "learnable_state": False,
    "recompute": False,
    "rank": None,
}


class _Names(NamedTuple):
    """Names of the parameters of one layer and direction, in the order of ``Weights``."""

    weight_ih: str
    weight_hh: str | None
    bias_ih: str | None
    bias_hh: str | None
    weight_hr: str | None
    h_start: str | None
    c_start: str | None
    weight_hh_up: str | None
    weight_hh_down: str | None


class LSTM(GateOptions, nn.RNNBase):
    """A drop-in for ``torch.nn.LSTM``: same arguments, parameters, state_dict, initial draws and results.

    Not supported, and refused with a message: ``torch.jit.script``, forward-mode differentiation (jvp) and complex
    dtypes; ``torch.func.vmap`` works, one call per element. On the CPU bfloat16 and float16 are computed in float32.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype:
            as in ``torch.nn.LSTM``.
        gates: of the input and forget gates. "sigmoid": as in ``torch.nn.LSTM``. "binary" (G2-LSTM, Li et al., ICML
            2018, equation 8): while training ``sigmoid((a + B * (log U - log(1 - U))) / tau)`` with U uniform and B ~
            Bernoulli(noise_probability), fresh for each step, row and unit; ``sigmoid(a)`` at evaluation. "sharpened"
            (the paper's baseline): ``sigmoid(a / tau)`` always.
        tau: temperature, > 0; None means 0.9 for "binary" and 0.2 for "sharpened".
        noise_probability: in [0, 1]. 1.0 is the paper's equation, 0.2 what its authors' code used.
        hard_eval: "binary" gates are 1 where a > 0, else 0, at evaluation.
        weight_dropout: probability of dropping each element of weight_hh while training, one mask per forward
            (DropConnect, Merity et al., ICLR 2018).
        variational_dropout: probability of dropout between layers with one mask per sequence (Gal and Ghahramani,
            NIPS 2016); not together with ``dropout``.
        forget_bias: initial bias of the forget gates, in sum over both biases; None leaves them as drawn.
        learnable_state: start states are parameters ``h_start_l0``, ``c_start_l0``, ..., zeros at first; used where no
            hx is given and after each reset.
        recompute: hold only h and c for backward and rebuild the gates there with one product.
        rank: keep the recurrent matrix of each gate as a product of two factors of this rank, and train these; or a
            rank for each gate named, {"i": 16, "f": 16}, the other gates full. ``weight_hh_up_l0`` [H, R] and
            ``weight_hh_down_l0`` [R, H] hold the factors of one gate after the other (R is the sum of ranks), and
            ``weight_hh_l0`` [D*H, H] only the D full gates, if there are any. The factors are never multiplied
            together, but on a GPU where some gates are full or ranks differ much. Dense weights load as their best
            factors (truncated SVD), with the relative error logged; ``dense_state_dict`` is the way back. Not with
            proj_size, weight_dropout or recompute.
    """

    weight_ih_l0: Tensor
    _all_weights: list[list[str]]
    _flat_weights_names: list[str]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gates: str = "sigmoid",
        tau: float | None = None,
        noise_probability: float = 0.2,
        hard_eval: bool = False,
        weight_dropout: float = 0.0,
        variational_dropout: float = 0.0,
        forget_bias: float | None = None,
        learnable_state: bool = False,
        recompute: bool = False,
        rank: int | Mapping[str, int] | None = None,
    ) -> None:
        self.__dict__.update(forget_bias=None, learnable_state=False, rank=None)  # until the options are checked
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__("LSTM", *sizes, device, dtype)
        self._set_options(
            gates=gates,
            tau=tau,
            noise_probability=noise_probability,
            hard_eval=hard_eval,
            weight_dropout=weight_dropout,
            variational_dropout=variational_dropout,
            forget_bias=forget_bias,
            learnable_state=learnable_state,
            recompute=recompute,
            rank=rank,
        )
        if rank is not None:
            _lstm_rank.use_factors(self, self._ranks)
        if learnable_state:
            self._add_start_states()
        if rank is not None:
            self.reset_parameters()
        elif forget_bias is not None:
            self._set_forget_bias(forget_bias)

    def _set_options(
        self,
        *,
        gates: str,
        tau: float | None,
        noise_probability: float,
        hard_eval: bool,
        weight_dropout: float,
        variational_dropout: float,
        forget_bias: float | None,
        learnable_state: bool,
        recompute: bool,
        rank: int | Mapping[str, int] | None = None,
    ) -> None:
        self._set_gates(gates, tau, noise_probability, hard_eval)
        _check.probability("LSTM", "weight_dropout", weight_dropout)
        _check.probability("LSTM", "variational_dropout", variational_dropout)
        if self.dropout and variational_dropout:
            _check.fail("LSTM", "variational_dropout", f"0 beside dropout={self.dropout}", variational_dropout)
        if forget_bias is not None and not self.bias:
            _check.fail("LSTM", "forget_bias", "None where bias=False", forget_bias)
        for name, flag in (("learnable_state", learnable_state), ("recompute", recompute)):
            if not isinstance(flag, bool):
                raise TypeError(f"LSTM: {name} should be of type bool, got: {type(flag).__name__}")
        self.weight_dropout, self.variational_dropout = weight_dropout, variational_dropout
        self.forget_bias, self.learnable_state, self.recompute = forget_bias, learnable_state, recompute
        _lstm_rank.check_rank(rank, self.hidden_size)
        _lstm_rank.check_others(rank, proj_size=self.proj_size, weight_dropout=weight_dropout, recompute=recompute)
        self.rank = dict(rank) if isinstance(rank, Mapping) else rank
        self._name_weights()

    def _name_weights(self) -> None:
        bias, proj, start, low = self.bias, bool(self.proj_size), self.learnable_state, self.rank is not None
        self._ranks = _lstm_rank.ranks_of({} if self.rank is None else self.rank)
        full = -1 in self._ranks
        self._weight_names = []
        for suffix in self._suffixes():
            kept = (True, full, bias, bias, proj, start, start, low, low)
            names = (f"{kind}{suffix}" if keep else None for kind, keep in zip(_Names._fields, kept, strict=True))
            self._weight_names.append(_Names(*names))  # type: ignore[arg-type]

    def _suffixes(self) -> list[str]:
        return [names[0].removeprefix("weight_ih") for names in self._all_weights]

    def _start_states(self) -> list[tuple[str, int]]:
        """Name and size of every learnable start state."""
        sizes = {"h_start": self.proj_size or self.hidden_size, "c_start": self.hidden_size}
        return [(getattr(names, kind), size) for names in self._weight_names for kind, size in sizes.items()]

    def _add_start_states(self) -> None:
        for name, size in self._start_states():
            self.register_parameter(name, nn.Parameter(self.weight_ih_l0.detach().new_zeros(size)))

    def _set_forget_bias(self, value: float) -> None:
        H = self.hidden_size
        with torch.no_grad():
            for names in self._weight_names:
                getattr(self, str(names.bias_ih))[H : 2 * H] = value
                getattr(self, str(names.bias_hh))[H : 2 * H] = 0

    def reset_parameters(self) -> None:
        """Draw the parameters as ``torch.nn.LSTM`` does, then set forget biases and start states as asked."""
        bound = self.hidden_size**-0.5
        for name in self._flat_weights_names:
            nn.init.uniform_(getattr(self, name), -bound, bound)
        for names in self._weight_names if self.rank is not None else ():
            _lstm_rank.draw_up(getattr(self, str(names.weight_hh_up)), self._ranks)
        if self.forget_bias is not None:
            self._set_forget_bias(self.forget_bias)
        if self.learnable_state:
            for name, _ in self._start_states():
                nn.init.zeros_(getattr(self, name))

    def _weights(self) -> list[Weights]:
        """The tensors of this forward. They are looked up by name each time, so that replaced, swapped
        (``functional_call``) and parametrized ones are seen."""
        parameters = self._parameters
        found = []
        for names in self._weight_names:
            values: list[Any] = [
                None if n is None else parameters[n] if n in parameters else getattr(self, n) for n in names
            ]
            if self.training and self.weight_dropout:
                values[1] = F.dropout(values[1], self.weight_dropout)
            *values, up, down = values
            if self.rank is None:
                found.append(Weights(*values))
                continue
            values[1] = up.new_empty(0, up.shape[0]) if values[1] is None else values[1]
            found.append(Weights(*values)._replace(factors=Factors(up, down, self._ranks)))
        return found

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        return_gates: bool = False,
    ) -> tuple[Any, ...]:
        """
        Args:
            input: [T, B, I], [B, T, I] with batch_first, unbatched [T, I], or a ``PackedSequence``.
            hx: (h_0 [L*D, B, P], c_0 [L*D, B, H]), never batch-first; unbatched: without B; None means the start.
            lengths: integers [B]: valid steps of each row of a padded input; results beyond them are zeros, and h_n,
                c_n and the reverse direction take each row's own end. Not with a ``PackedSequence``.
            reset: bool, sizes as the input without I (a packed input takes [T, B] or a ``PackedSequence``): where True
                a new segment begins at this step, and no state enters it from outside, in either direction.
            return_gates: also return, per layer and direction, ``fastseq.functional.Gates`` (i, f and all c_t).

        Returns:
            output, (h_n, c_n), and with ``return_gates`` a list ordered as h_n; laid out as the input.

        Raises:
            ArgumentError: (a ``ValueError`` and ``RuntimeError``) wrong sizes, dtypes or devices, before any work.
        """
        return self._forward(input, hx, self._weights(), lengths, reset, return_gates)

    def _forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None,
        weights: list[Weights],
        lengths: Tensor | None,
        reset: Tensor | PackedSequence | None,
        return_gates: bool,
    ) -> tuple[Any, ...]:
        """``forward`` with these weights."""
        if isinstance(input, PackedSequence):
            if lengths is not None:
                _check.fail("LSTM", "lengths", "None for a PackedSequence, which has its own", list(lengths.shape))
            return self._forward_packed(input, hx, weights, reset, return_gates)
        if input.dim() not in (2, 3):
            raise _check.ArgumentError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        self._check_input(input, weights, input.dim())
        swap = self.batch_first and batched
        x = input.transpose(0, 1) if swap else input if batched else input.unsqueeze(1)
        if hx is not None:
            hx = _arguments.check_state(hx)
            _arguments.check_state_dims(hx, batched)
            hx = hx if batched else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
            self._check_state(hx, x, x.shape[1])
        if reset is not None:
            reset = _padded_reset(reset, input, swap)
        out = self._call(x, hx, weights, return_gates=return_gates, lengths=lengths, reset=reset)

        def restore(t: Tensor) -> Tensor:
            return t.transpose(0, 1) if swap else t if batched else t.squeeze(1)

        state = (out.h_n, out.c_n) if batched else (out.h_n.squeeze(1), out.c_n.squeeze(1))
        if return_gates:
            return restore(out.output), state, [Gates(*map(restore, g)) for g in out.gates]
        return restore(out.output), state

    def _forward_packed(
        self,
        input: PackedSequence,
        hx: State | None,
        weights: list[Weights],
        reset: Tensor | PackedSequence | None,
        return_gates: bool,
    ) -> tuple[Any, ...]:
        x, batch_sizes, order, restore_order = input
        self._check_input(x, weights, 2)
        if hx is not None:
            hx = _arguments.check_state(hx)
            _arguments.check_state_dims(hx, True)
            B = order.shape[0] if order is not None else int(batch_sizes[0]) if _eager() else hx[0].shape[1]
            self._check_state(hx, x, B)
            hx = self.permute_hidden(hx, order)
        if reset is not None:
            reset = _packed_reset(reset, batch_sizes, order, x.shape[0], hx)
        out = self._call(x, hx, weights, return_gates=return_gates, batch_sizes=batch_sizes, reset=reset, rows=order)
        state = self.permute_hidden((out.h_n, out.c_n), restore_order)
        packed = [PackedSequence(out.output, batch_sizes, order, restore_order), state]
        if return_gates:
            kept: Any = (tuple(PackedSequence(t, batch_sizes, order, restore_order) for t in g) for g in out.gates)
            return *packed, [Gates(*g) for g in kept]
        return tuple(packed)

    def _call(self, x: Tensor, hx: State | None, weights: list[Weights], **layout: Any) -> functional.Result:
        seed, noise_probability, tau, hard = self._gate_call(x.device)
        return functional.lstm(
            x,
            weights,
            hx,
            bidirectional=self.bidirectional,
            seed=seed,
            noise_probability=noise_probability,
            tau=tau,
            hard=hard,
            dropout=self.dropout if self.training else 0.0,
            variational_dropout=self.variational_dropout if self.training else 0.0,
            recompute=self.recompute,
            **layout,
        )

    def _check_input(self, x: Tensor, weights: list[Weights], dims: int) -> None:
        _arguments.check_input(x, self.input_size, weights[0].weight_ih, dims)

    def _check_state(self, hx: State, x: Tensor, rows: int) -> None:
        lead = (self.num_layers * (2 if self.bidirectional else 1), rows)
        sizes = (*lead, self.proj_size or self.hidden_size), (*lead, self.hidden_size)
        _arguments.check_state_sizes(hx, x, *sizes)

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """Sizes of c_0 for this input, which is padded, or packed with ``batch_sizes``."""
        lead = self.get_expected_hidden_size(input, batch_sizes)[:2]
        return *lead, self.hidden_size

    def check_forward_args(self, input: Tensor, hidden: State, batch_sizes: Tensor | None) -> None:  # type: ignore[override]
        """Raise where sizes or dtypes of a batched input and its state do not fit."""
        self._check_input(input, self._weights(), 3 if batch_sizes is None else 2)
        self._check_state(hidden, input, self.get_expected_hidden_size(input, batch_sizes)[1])

    def permute_hidden(self, hx: State, permutation: Tensor | None) -> State:  # type: ignore[override]
        """Reorder the rows of both states."""
        return hx if permutation is None else (hx[0].index_select(1, permutation), hx[1].index_select(1, permutation))

    def dense_state_dict(self) -> dict[str, Tensor]:
        """The state of an LSTM without ``rank`` that computes the same, as of a ``torch.nn.LSTM``: each recurrent
        matrix is the product of its factors. Start states, where they are learnt, are among it."""
        state: dict[str, Tensor] = {}
        for name, value in self.state_dict().items():
            key = name.replace("weight_hh_up", "weight_hh").replace("weight_hh_down", "weight_hh")
            state.setdefault(key, value)
        for suffix in self._suffixes() if self.rank is not None else ():
            up, down = (getattr(self, name).detach() for name in _lstm_rank.factor_names(suffix))
            full = state[f"weight_hh{suffix}"] if -1 in self._ranks else up.new_empty(0, up.shape[0])
            state[f"weight_hh{suffix}"] = functional.dense_weight(full, Factors(up, down, self._ranks))
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.rank is not None:
            _lstm_rank.factor_state(state_dict, prefix, self._suffixes(), self._ranks, self.hidden_size)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def flatten_parameters(self) -> None:
        """As in ``torch.nn.LSTM``; factors stay where they are."""
        if self.rank is None:
            super().flatten_parameters()

    def export_state(self, name: str = "lstm") -> dict[str, Any]:
        """A description and numpy arrays, for deployment; see ``fastseq.export_state``."""
        return plain_lstm_state(self, name)

    def extra_repr(self) -> str:
        text = super().extra_repr() + self._gates_repr()
        for name in ("weight_dropout", "variational_dropout", "forget_bias", "learnable_state", "recompute", "rank"):
            if getattr(self, name) != _DEFAULTS[name]:
                text += f", {name}={getattr(self, name)}"
        return text

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, value in _DEFAULTS.items():  # pickles from before an option existed
            self.__dict__.setdefault(name, value)
        self._name_weights()

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("fastseq.nn.LSTM: torch.jit.script is not supported; use compile or export")


def _eager() -> bool:
    """Values may be read; inside a graph they may not, and the operator finds what this misses."""
    return not torch.compiler.is_compiling()


def _padded_reset(reset: Any, input: Tensor, swap: bool) -> Tensor:
    """[T, B] out of the layout of a padded input."""
    symbols = "T" if input.dim() == 2 else "B, T" if swap else "T, B"
    if not isinstance(reset, Tensor):
        _check.fail("LSTM", "reset", f"a bool tensor [{symbols}]", type(reset).__name__)
    _check.shape("LSTM", "reset", reset, symbols, *input.shape[:-1])
    _check.dtype("LSTM", "reset", reset, torch.bool)
    return reset.unsqueeze(1) if input.dim() == 2 else reset.transpose(0, 1) if swap else reset


def _packed_reset(
    reset: Tensor | PackedSequence, batch_sizes: Tensor, order: Tensor | None, total: int, hx: State | None
) -> Tensor:
    """[N] out of a packed mask, or out of [T, B] in the order of the rows before sorting."""
    if isinstance(reset, PackedSequence):
        _arguments.check_reset_pack(reset, batch_sizes, order)
        return reset.data
    if order is not None or hx is not None or _eager():
        B = order.shape[0] if order is not None else hx[0].shape[1] if hx is not None else int(batch_sizes[0])
        _check.shape("LSTM", "reset", reset, "T, B", batch_sizes.shape[0], B)
    step, row = functional.packed_places(batch_sizes, total, reset.device)
    return reset[step, row if order is None else order[row]]
