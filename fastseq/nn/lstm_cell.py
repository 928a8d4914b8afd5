"""``LSTMCell``: the parameters and the call of ``torch.nn.LSTMCell``, with binary gates as an option."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastseq import _check, functional
from fastseq.functional import Weights
from fastseq.nn import _arguments
from fastseq.nn.gates import GATE_DEFAULTS, GateOptions

State = tuple[Tensor, Tensor]

_DEFAULTS: dict[str, Any] = {**GATE_DEFAULTS, "forget_bias": None, "learnable_state": False}


class LSTMCell(GateOptions, nn.RNNCellBase):
    """A drop-in for ``torch.nn.LSTMCell``: same arguments, parameters, state_dict, initial draws and results.

    Not supported, and refused with a message: ``torch.jit.script``, forward-mode differentiation (jvp) and complex
    dtypes; ``torch.func.vmap`` works, one call per element. On the CPU bfloat16 and float16 are computed in float32.

    Args:
        input_size, hidden_size, bias, device, dtype: as in ``torch.nn.LSTMCell``.
        gates, tau, noise_probability, hard_eval, forget_bias: as in ``fastseq.nn.LSTM``; the noise is fresh per call.
        learnable_state: start states are parameters ``h_start`` and ``c_start``, used where no hx is given.
    """

    h_start: nn.Parameter
    c_start: nn.Parameter

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gates: str = "sigmoid",
        tau: float | None = None,
        noise_probability: float = 0.2,
        hard_eval: bool = False,
        forget_bias: float | None = None,
        learnable_state: bool = False,
    ) -> None:
        self.__dict__.update(forget_bias=None, learnable_state=False)  # until the options are checked
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        self._set_gates(gates, tau, noise_probability, hard_eval)
        if forget_bias is not None and not bias:
            _check.fail("LSTMCell", "forget_bias", "None where bias=False", forget_bias)
        if not isinstance(learnable_state, bool):
            raise TypeError(f"LSTMCell: learnable_state should be of type bool, got: {type(learnable_state).__name__}")
        self.forget_bias, self.learnable_state = forget_bias, learnable_state
        if learnable_state:
            for name in ("h_start", "c_start"):
                self.register_parameter(name, nn.Parameter(self.weight_hh.new_zeros(hidden_size).detach()))
        if forget_bias is not None:
            self._set_forget_bias(forget_bias)

    def _set_forget_bias(self, value: float) -> None:
        H = self.hidden_size
        with torch.no_grad():
            self.bias_ih[H : 2 * H] = value
            self.bias_hh[H : 2 * H] = 0

    def reset_parameters(self) -> None:
        """Draw the parameters as ``torch.nn.LSTMCell`` does, then set forget biases and start states as asked."""
        bound = self.hidden_size**-0.5 if self.hidden_size > 0 else 0
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            if getattr(self, name) is not None:
                nn.init.uniform_(getattr(self, name), -bound, bound)
        if self.forget_bias is not None:
            self._set_forget_bias(self.forget_bias)
        if self.learnable_state:
            nn.init.zeros_(self.h_start)
            nn.init.zeros_(self.c_start)

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """
        Args:
            input: [B, I], or unbatched [I].
            hx: (h, c) of [B, H], or unbatched [H], each; None means the start state.

        Returns:
            h', c', sized as the state.

        Raises:
            ArgumentError: (a ``ValueError`` and ``RuntimeError``) wrong sizes, dtypes or devices, before any work.
        """
        hx = None if hx is None else _arguments.check_state(hx, "LSTMCell")
        _arguments.check_cell(input, hx, self.input_size, self.hidden_size)
        learnable = (None, None, None) if not self.learnable_state else (None, self.h_start, self.c_start)
        weights = Weights(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, *learnable)
        seed, noise_probability, tau, hard = self._gate_call(input.device)
        options: Any = {"seed": seed, "noise_probability": noise_probability, "tau": tau, "hard": hard}
        if input.dim() == 2:
            return functional.lstm_cell(input, hx, weights, **options)
        hx = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        h, c = functional.lstm_cell(input.unsqueeze(0), hx, weights, **options)
        return h.squeeze(0), c.squeeze(0)

    def extra_repr(self) -> str:
        text = super().extra_repr() + self._gates_repr()
        for name in ("forget_bias", "learnable_state"):
            if getattr(self, name) != _DEFAULTS[name]:
                text += f", {name}={getattr(self, name)}"
        return text

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, value in _DEFAULTS.items():  # pickles from before an option existed
            self.__dict__.setdefault(name, value)

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("fastseq.nn.LSTMCell: torch.jit.script is not supported; use compile or export")
