"""``CompressedLSTM``: the call of ``LSTM`` over weights that stay compressed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastseq import _check, functional
from fastseq.functional import PackedWeights
from fastseq.nn._exporting import lstm_state
from fastseq.nn.gates import GATE_DEFAULTS
from fastseq.nn.lstm import LSTM, State
from fastseq.nn.stored_matrix import StoredMatrix


class CompressedLSTM(LSTM):
    """An ``LSTM`` for inference whose matrices are ``StoredMatrix``, as ``fastseq.compress`` makes it.

    It is called as ``LSTM`` is, with any floating-point input, and computes in float32: on the CPU in the compiled
    core; on a GPU where the recurrent weights are int8 with one scale a row, or of low rank, by Triton. Gradients go
    straight through all roundings to inputs and states, and where it was made with ``trainable=True`` to the weights
    as they were before rounding, which it then keeps as parameters: in training every forward rounds them anew, and so
    does the end of training (``eval()``). Otherwise ``train()`` changes nothing: neither noise nor dropout.

    Its state_dict holds the compressed tensors: ``weight_ih_l0.i_values`` and so on, ``bias_l0`` (both biases of torch
    in one), ``h_start_l0``, ``c_start_l0``. It loads into a module of the same form.

    Args:
        like: an ``nn.LSTM`` or ``LSTM``: sizes, options, biases and start states.
        matrices: by name of its parameters, every one with two dimensions.
    """

    def __init__(self, like: nn.LSTM | LSTM, matrices: Mapping[str, StoredMatrix]) -> None:
        options = {name: getattr(like, name, default) for name, default in GATE_DEFAULTS.items()}
        sizes = (like.input_size, like.hidden_size, like.num_layers, like.bias, like.batch_first, like.dropout)
        learnable = getattr(like, "learnable_state", False)
        super().__init__(*sizes, like.bidirectional, like.proj_size, "meta", learnable_state=learnable, **options)
        self._flat_weights_names, self._flat_weights, self._flat_weight_refs = [], [], []
        self._parameters.clear()
        for names in self._weight_names:
            for name in (names.weight_ih, names.weight_hh, names.weight_hr):
                if name is not None:
                    self.add_module(name, matrices[name])
            suffix = names.weight_ih.removeprefix("weight_ih")
            if names.bias_ih is not None and names.bias_hh is not None:
                both = getattr(like, names.bias_ih).detach().float() + getattr(like, names.bias_hh).detach().float()
                self._keep(f"bias{suffix}", both)
            for name in (names.h_start, names.c_start):
                if name is not None:
                    self._keep(name, getattr(like, name).detach().float())
        self.training = like.training

    def _keep(self, name: str, value: Tensor) -> None:
        if self.trainable:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def trainable(self) -> bool:
        """Whether the weights before rounding are kept, as parameters."""
        return any(isinstance(m, StoredMatrix) and m.masters is not None for m in self.children())

    def _weights(self) -> list[Any]:
        found = []
        for names in self._weight_names:
            hr = None if names.weight_hr is None else getattr(self, names.weight_hr).of_call()
            rest = (names.weight_ih.replace("weight_ih", "bias") if self.bias else None, names.h_start, names.c_start)
            bias, *start = (None if name is None else getattr(self, name) for name in rest)
            ih, hh = (getattr(self, str(name)).of_call() for name in (names.weight_ih, names.weight_hh))
            found.append(PackedWeights(ih, hh, bias, hr, *start))
        return found

    def _check_input(self, x: Tensor, weights: list[Any], dims: int) -> None:
        if not x.is_floating_point():
            _check.fail("CompressedLSTM", "input", "of a floating-point dtype", x.dtype)
        if x.dim() != dims or x.shape[-1] != self.input_size:
            _check.fail("CompressedLSTM", "input", f"{dims}-D with {self.input_size} features", list(x.shape))
        here = weights[0].weight_hh.matrix[0].rows.values.device
        if here != x.device:
            _check.fail("CompressedLSTM", "input", f"on the module's device {here}", x.device)

    def _call(self, x: Tensor, hx: State | None, weights: list[Any], **layout: Any) -> functional.Result:
        training, self.training = self.training, self.training and self.trainable
        try:
            seed, noise_probability, tau, hard = self._gate_call(x.device)
            layout |= {"seed": seed, "noise_probability": noise_probability, "tau": tau, "hard": hard}
            layout["dropout"] = self.dropout if self.training else 0.0
        finally:
            self.training = training
        return functional.lstm_packed(x, weights, hx, bidirectional=self.bidirectional, **layout)

    def _apply(self, fn: Any, recurse: bool = True) -> CompressedLSTM:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype != value.dtype:  # computed in float32
                self._buffers[name] = value.to(moved.device)
        return self

    def export_state(self, name: str = "lstm") -> dict[str, Any]:
        """A description and numpy arrays, for deployment; see ``fastseq.export_state``."""
        stored = {n: m for n, m in self.named_children() if isinstance(m, StoredMatrix)}
        for m in stored.values():
            if m.training and m.masters is not None:
                m.restore()
        own = (*self._buffers.items(), *self._parameters.items())
        rest = {n: value.detach() for n, value in own if value is not None}
        return lstm_state(self, {n: (m.matrix(), m.K) for n, m in stored.items()}, rest, name)

    def reset_parameters(self) -> None:
        """Nothing to draw: weights come from a trained module."""

    def flatten_parameters(self) -> None:
        """Nothing to do."""
