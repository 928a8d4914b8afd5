"""``MIMOLinear``, ``MIMOConv1d``, ``MIMOConv2d``, ``MIMOEmbedding``, ``MIMOHead``: first layers and heads for M slots.

Parameters are those of the plain layer with the input channels of all slots side by side, slot 0 first.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq import _check, functional
from fastseq.nn._mimo_fold import MIMOLayer, calls, check_slots, sum_slots

_Plain = TypeVar("_Plain", bound=nn.Module)


class MIMOLinear(MIMOLayer, nn.Linear):
    """A linear layer on the features of M examples side by side, the first of a MIMO network.

    Three modes, whatever ``self.training`` is:

    - train, ``layer(x, index)``: x [B, ..., C] of distinct examples, index [M, N] of ``MIMOIndex``: [N, ..., G], rows
      of several examples, by ``functional.mimo_project``: computed once for each example where that is less work.
    - ensemble, ``layer(x)``: x [..., C] lies in all slots.
    - multiplex, ``layer(x, mode="multiplex")``: x [..., M, C], another example in each slot.

    Args:
        C, G: features in (of one slot) and out. M: slots, >= 2. bias, device, dtype: as in ``nn.Linear``.
        batch_dim: dimension of the examples in x, for the train mode.

    Raises (when called):
        ArgumentError: naming the argument.
    """

    def __init__(
        self, C: int, G: int, M: int, bias: bool = True, batch_dim: int = 0, device: Any = None, dtype: Any = None
    ) -> None:
        check_slots("MIMOLinear", M)
        super().__init__(M * C, G, bias, device, dtype)
        self._set_slots(M, C)
        self.batch_dim = batch_dim

    def forward(self, input: Tensor, index: Tensor | None = None, *, mode: str | None = None) -> Tensor:
        mode, index = self._mode_of(index, mode)
        if mode == "multiplex":
            input = self._slots_of_rows(input)
            self._check_last(input, "M, C", self.M, self.channels)
            return F.linear(input.flatten(-2), self.weight, self.bias)
        self._check_last(input, "C", self.channels)
        if index is None:
            return F.linear(input, self._folded("weight"), self.bias)
        index = self._check_index(index, input.shape[self.batch_dim])
        x, weight, bias = _as_autocast(input, self.weight, self.bias)
        return functional.mimo_project(x, weight, bias, index, batch_dim=self.batch_dim)

    def to_plain(self) -> nn.Linear:
        """The ensemble mode as a plain layer with folded weights, for deployment and export."""
        made = nn.Linear(self.channels, self.out_features, self.bias is not None, *_like(self.weight))
        return _filled(made, self, self._folded("weight"))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, M={self.M}"


class MIMOConv1d(MIMOLayer, nn.Conv1d):
    """``nn.Conv1d`` on the channels of M examples side by side, with the modes of ``MIMOLinear``.

    x is [B, C, T] with an index, [B, C, T] or [C, T] for an ensemble, [B, M, C, T] or [M, C, T] for multiplex.

    Args:
        in_channels: of one slot. out_channels ... dtype: as in ``nn.Conv1d``; groups must be 1. M: slots, >= 2.
    """

    _slot_dim = 1

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, *args: Any, M: int, **options: Any
    ) -> None:
        _check_convolution("MIMOConv1d", M, args, options)
        super().__init__(M * in_channels, out_channels, kernel_size, *args, **options)
        self._set_slots(M, in_channels)

    def forward(self, input: Tensor, index: Tensor | None = None, *, mode: str | None = None) -> Tensor:
        return _convolve(self, input, 1, index, mode)

    def to_plain(self) -> nn.Conv1d:
        """The ensemble mode as a plain layer with folded weights, for deployment and export."""
        made = nn.Conv1d(self.channels, **_convolution_options(self))
        return _filled(made, self, self._folded("weight"))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, M={self.M}"  # type: ignore[no-untyped-call]


class MIMOConv2d(MIMOLayer, nn.Conv2d):
    """``nn.Conv2d`` on the channels of M examples side by side, with the modes of ``MIMOLinear``.

    x is [B, C, H, W] with an index, [B, C, H, W] or [C, H, W] for an ensemble, [B, M, C, H, W] or [M, C, H, W] for
    multiplex.

    Args:
        in_channels: of one slot. out_channels ... dtype: as in ``nn.Conv2d``; groups must be 1. M: slots, >= 2.
    """

    _slot_dim = 1

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, *args: Any, M: int, **options: Any
    ) -> None:
        _check_convolution("MIMOConv2d", M, args, options)
        super().__init__(M * in_channels, out_channels, kernel_size, *args, **options)
        self._set_slots(M, in_channels)

    def forward(self, input: Tensor, index: Tensor | None = None, *, mode: str | None = None) -> Tensor:
        return _convolve(self, input, 2, index, mode)

    def to_plain(self) -> nn.Conv2d:
        """The ensemble mode as a plain layer with folded weights, for deployment and export."""
        made = nn.Conv2d(self.channels, **_convolution_options(self))
        return _filled(made, self, self._folded("weight"))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, M={self.M}"  # type: ignore[no-untyped-call]


class MIMOEmbedding(MIMOLayer, nn.Embedding):
    """A table for each of M slots; the vector of a row is the sum of what its tokens have in theirs.

    Modes as of ``MIMOLinear``: tokens [B, ...] with an index give [N, ..., E]; [...] in all slots; [..., M] multiplex.

    Args:
        V: tokens. E: size of a vector. M: slots, >= 2. ``weight`` is [V, M*E]: one row holds a token's vectors of all
            slots.
        padding_idx, scale_grad_by_freq, sparse, device, dtype: as in ``nn.Embedding``. There is no ``max_norm``, which
            would be of all slots together.
        batch_dim: dimension of the examples among the tokens, for the train mode.
    """

    _slot_dim = -1

    def __init__(
        self,
        V: int,
        E: int,
        M: int,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        batch_dim: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_slots("MIMOEmbedding", M)
        super().__init__(V, M * E, padding_idx, None, 2.0, scale_grad_by_freq, sparse, device=device, dtype=dtype)
        self._set_slots(M, E)
        self.batch_dim = batch_dim

    def forward(self, input: Tensor, index: Tensor | None = None, *, mode: str | None = None) -> Tensor:
        mode, index = self._mode_of(index, mode)
        if mode == "multiplex":
            input = self._slots_of_rows(input)
            self._check_last(input, "M", self.M)
            return sum_slots(self._of_slots(input), -2)
        if index is not None:
            if input.dim() <= self.batch_dim:
                _check.fail("MIMOEmbedding", "input", f"tokens with examples along {self.batch_dim}", list(input.shape))
            index = self._check_index(index, input.shape[self.batch_dim])
            return functional.mimo_combine(self._look_up(input), index, batch_dim=self.batch_dim)
        if self.is_folded:
            return self._look_up(input, self._folded("weight"))
        found = self._look_up(input)  # cheaper than the sum of whole tables
        return sum_slots(found.unflatten(-1, (self.M, self.channels)), -2)

    def _of_slots(self, tokens: Tensor) -> Tensor:
        """What each slot's table has for its token: [..., M] to [..., M, E]."""
        M, E = self.M, self.channels
        if self.sparse or self.scale_grad_by_freq:  # gradients of whole rows, and counts of tokens in all slots
            own: Tensor = self._look_up(tokens).unflatten(-1, (M, E)).diagonal(0, -3, -2)  # [..., E, M]
            return own.transpose(-1, -2)
        at = torch.add(torch.arange(M, device=tokens.device), tokens, alpha=M)  # int64, whatever tokens are
        found = F.embedding(at, self.weight.unflatten(1, (M, E)).flatten(0, 1))
        if self.padding_idx is None:
            return found
        return torch.where((tokens == self.padding_idx)[..., None], found.detach(), found)

    def _look_up(self, tokens: Tensor, weight: Tensor | None = None) -> Tensor:
        weight = self.weight if weight is None else weight
        return F.embedding(tokens, weight, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)

    def to_plain(self) -> nn.Embedding:
        """The ensemble mode as a plain table, the sum of those of all slots, for deployment and export."""
        options = (self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse, None, False)
        made = nn.Embedding(self.num_embeddings, self.channels, *options, *_like(self.weight))
        return _filled(made, self, self._folded("weight"))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, M={self.M}"


class MIMOHead(nn.Linear):
    """The heads of M slots in one product: [..., H] -> [..., M, K].

    Args:
        H: features. K: classes. M: slots, >= 2. bias, device, dtype: as in ``nn.Linear``; ``weight`` is [M*K, H].
    """

    def __init__(self, H: int, K: int, M: int, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        check_slots("MIMOHead", M)
        super().__init__(H, M * K, bias, device, dtype)
        self.M, self.K = M, K

    def forward(self, input: Tensor, *, per_slot: bool = False) -> Tensor:
        """
        Args:
            input: [..., H]; with ``per_slot`` [..., M, H], other features for each slot.

        Returns:
            Logits [..., M, K].
        """
        M, H = self.M, self.in_features
        want = (M, H) if per_slot else (H,)
        if input.shape[-len(want) :] != want:
            symbols = f"[..., M, H] = [..., {M}, {H}]" if per_slot else f"[..., H] = [..., {H}]"
            _check.fail("MIMOHead", "input", symbols, list(input.shape))
        if per_slot:
            out: Tensor = torch.einsum("...mh,mkh->...mk", input, self.weight.unflatten(0, (M, self.K)))
            out = out if self.bias is None else out + self.bias.to(out.dtype).unflatten(0, (M, self.K))
        else:
            out = F.linear(input, self.weight, self.bias).unflatten(-1, (M, self.K))
        call = getattr(calls, "now", None)
        if call is not None and call.head is self:  # ``fastseq.nn.MIMO`` compares what a network returns with this
            call.returned = out
        return out

    def to_plain(self) -> nn.Sequential:
        """``nn.Linear`` and ``nn.Unflatten``, for deployment and export."""
        made = nn.Linear(self.in_features, self.M * self.K, self.bias is not None, *_like(self.weight))
        return nn.Sequential(_filled(made, self, self.weight), nn.Unflatten(-1, (self.M, self.K))).train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, M={self.M}"


def _check_convolution(function: str, M: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    check_slots(function, M)
    groups = args[3] if len(args) > 3 else options.get("groups", 1)
    if groups != 1:
        _check.fail(function, "groups", "1, since a group would hold the channels of some slots only", groups)


def _convolution_options(layer: nn.Conv1d | nn.Conv2d) -> dict[str, Any]:
    names = ("out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
    where = dict(zip(("device", "dtype"), _like(layer.weight), strict=True))
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None, **where}


def _convolve(layer: MIMOConv1d | MIMOConv2d, x: Tensor, axes: int, index: Tensor | None, mode: str | None) -> Tensor:
    """A convolution in each of the three modes; ``axes``: how many of x come after the channels."""
    name, M, C = type(layer).__name__, layer.M, layer.channels
    mode, index = layer._mode_of(index, mode)
    if mode == "multiplex":
        x = layer._slots_of_rows(x)
    lead = x.dim() - axes - (2 if mode == "multiplex" else 1)
    channels = x.shape[lead : x.dim() - axes] if lead >= 0 else ()
    if lead not in ((1,) if mode == "train" else (0, 1)) or channels != ((M, C) if mode == "multiplex" else (C,)):
        sizes = {"train": f"[B, {C}, ...]", "ensemble": f"[B, {C}, ...]", "multiplex": f"[B, {M}, {C}, ...]"}[mode]
        _check.fail(name, "input", f"{sizes} with {axes} axes after the channels", list(x.shape))
    if mode == "multiplex":
        out: Tensor = layer._conv_forward(x.flatten(lead, lead + 1), layer.weight, layer.bias)
        return out
    if index is None:
        out = layer._conv_forward(x, layer._folded("weight"), layer.bias)
        return out
    index = layer._check_index(index, x.shape[0])
    each = layer.weight.unflatten(1, (M, C)).transpose(0, 1).flatten(0, 1)  # [M*O, C, ...]: all parts of an example
    return functional.mimo_combine(layer._conv_forward(x, each, None), index, layer.bias, channel_dim=1)


def _as_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast makes of the arguments of ``linear``, where it is on."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _like(weight: Tensor) -> tuple[torch.device, torch.dtype]:
    return weight.device, weight.dtype


def _filled(made: _Plain, layer: Any, weight: Tensor) -> _Plain:
    """The plain layer ``made`` with this weight, and all else as ``layer`` has it."""
    with torch.no_grad():
        made.get_parameter("weight").copy_(weight)
        if getattr(layer, "bias", None) is not None:
            made.get_parameter("bias").copy_(layer.bias)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(getattr(layer, name).requires_grad)
    return made.train(layer.training)
