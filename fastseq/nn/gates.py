"""The options of input and forget gates that ``LSTM`` and ``LSTMCell`` share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq import _check, functional

KINDS = ("sigmoid", "binary", "sharpened")
TAU = {"sigmoid": 1.0, "binary": 0.9, "sharpened": 0.2}


class GateCall(NamedTuple):
    """What the operator is told about i and f in one forward."""

    seed: Tensor | None
    noise_probability: float
    tau: float
    hard: bool


class GateOptions:
    """Adds ``gates``, ``tau``, ``noise_probability`` and ``hard_eval`` to a module."""

    gates: str
    tau: float
    noise_probability: float
    hard_eval: bool
    training: bool

    def _set_gates(self, gates: str, tau: float | None, noise_probability: float, hard_eval: bool) -> None:
        name = type(self).__name__
        _check.one_of(name, "gates", gates, KINDS)
        tau = TAU[gates] if tau is None else tau
        _check.positive(name, "tau", tau)
        _check.probability(name, "noise_probability", noise_probability)
        if not isinstance(hard_eval, bool):
            raise TypeError(f"{name}: hard_eval should be of type bool, got: {type(hard_eval).__name__}")
        if gates == "sigmoid" and tau != 1:
            _check.fail(name, "tau", "1 for gates='sigmoid' (gates='sharpened' has a temperature)", tau)
        if gates != "binary" and hard_eval:
            _check.fail(name, "hard_eval", f"False for gates={gates!r}", hard_eval)
        self.gates, self.tau = gates, float(tau)
        self.noise_probability, self.hard_eval = float(noise_probability), hard_eval

    def _gate_call(self, device: torch.device) -> GateCall:
        """The noise is drawn here, on the device: once per forward, while training, and never otherwise."""
        if self.gates == "sigmoid":
            return _PLAIN
        if self.gates == "sharpened":
            return GateCall(None, 0.0, self.tau, False)
        if not self.training:
            return GateCall(None, 0.0, 1.0, self.hard_eval)
        seed = functional.draw_seed(device) if self.noise_probability else None
        return GateCall(seed, self.noise_probability, self.tau, False)

    def _gates_repr(self) -> str:
        if self.gates == "sigmoid":
            return ""
        text = f", gates={self.gates!r}, tau={self.tau}"
        if self.gates == "binary":
            text += f", noise_probability={self.noise_probability}"
            text += ", hard_eval=True" if self.hard_eval else ""
        return text


_PLAIN = GateCall(None, 0.0, 1.0, False)
GATE_DEFAULTS: dict[str, Any] = {"gates": "sigmoid", "tau": 1.0, "noise_probability": 0.2, "hard_eval": False}
