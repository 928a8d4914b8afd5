"""What the MIMO layers share: three ways to call them, and folding the weights of all slots into one."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastseq import _check

if TYPE_CHECKING:
    from typing_extensions import Self

MODES = ("train", "ensemble", "multiplex")


class Call:
    """What the network between cannot say to first layer and head: made by ``fastseq.nn.MIMO`` for one forward."""

    def __init__(self, first: nn.Module, head: nn.Module, mode: str, index: Tensor | None) -> None:
        self.first, self.head, self.mode, self.index = first, head, mode, index
        self.returned: Tensor | None = None  # by the head


calls = threading.local()  # ``now``: the Call that this thread is in; not on the modules, which threads share


class MIMOLayer(nn.Module):
    """The base of layers whose input channels are those of M slots side by side.

    ``fold()`` keeps the sum of the slots' weights in buffers that are not saved; the weights themselves stay. A folded
    layer computes the ensemble mode only, without that sum and without gradients of the folded weights. It refuses to
    run where a weight has changed since, in place, by replacement or by ``load_state_dict`` (not noticed: writes to
    ``weight.data``, and changes under a graph that ``torch.compile`` has made). ``.train()`` unfolds it.
    """

    M: int
    channels: int  # of one slot
    batch_dim = 0  # of the examples, counted in the input of the train mode
    _slot_dim = -2  # of the slots in the input of the multiplex mode
    _folding: tuple[str, ...] = ("weight",)  # parameters with the channels of all slots along dimension 1

    def _set_slots(self, M: int, channels: int, folding: tuple[str, ...] = ("weight",)) -> None:
        self.M, self.channels, self._folding = M, channels, folding
        self._folded_of: list[tuple[nn.Parameter, int]] | None = None
        for name in folding:
            self.register_buffer(f"folded_{name}", None, persistent=False)

    @property
    def _told(self) -> Call | None:
        """The call of the wrapper, where this layer is inside one."""
        call: Call | None = getattr(calls, "now", None)
        return call if call is not None and call.first is self else None

    @property
    def is_folded(self) -> bool:
        """Whether ``fold()`` holds."""
        return self._folded_of is not None

    def fold(self) -> Self:
        """Sum the weights of the slots once for all calls to come; again where they have changed.

        Raises:
            ArgumentError: in training mode.
        """
        if self.training:
            raise _check.ArgumentError(f"{type(self).__name__}: fold() is for evaluation: call .eval() first")
        self._fold()
        return self

    def _fold(self) -> None:
        with torch.inference_mode(False), torch.no_grad():  # what inference_mode makes, no later gradient may meet
            for name in self._folding:
                setattr(self, f"folded_{name}", fold_weight(getattr(self, name), self.M))
        self._folded_of = [(p, _version(p)) for p in self._sources()]

    def unfold(self) -> Self:
        """Undo ``fold()``; nothing happens where the layer is not folded."""
        for name in self._folding:
            setattr(self, f"folded_{name}", None)
        self._folded_of = None
        return self

    def train(self, mode: bool = True) -> Self:
        """As of any module; going to training mode unfolds."""
        if mode and self.is_folded:
            self.unfold()
        return super().train(mode)

    def to_plain(self) -> nn.Module:
        """The ensemble mode as a plain layer with folded weights, for deployment and export."""
        raise NotImplementedError

    def _sources(self) -> list[nn.Parameter]:
        """What the folded weights are computed from."""
        found = [self._parameters.get(name) for name in self._folding]
        if any(p is None for p in found):  # parametrized
            inside = tuple(f"parametrizations.{name}." for name in self._folding)
            found = [p for name, p in self.named_parameters() if name in self._folding or name.startswith(inside)]
        return [p for p in found if p is not None]

    def _folded(self, name: str) -> Tensor:
        """The sum over slots of one weight."""
        if self._folded_of is None:
            return fold_weight(getattr(self, name), self.M)
        if not torch.compiler.is_compiling():
            now = self._sources()
            if len(now) != len(self._folded_of) or any(
                p is not kept or _version(p) != version for p, (kept, version) in zip(now, self._folded_of, strict=True)
            ):
                raise _check.ArgumentError(
                    f"{type(self).__name__}: a weight has changed or was loaded since fold(): "
                    "call fold() again, or unfold()"
                )
        folded = self._buffers[f"folded_{name}"]
        assert folded is not None
        return folded

    def _mode_of(self, index: Tensor | None, mode: str | None) -> tuple[str, Tensor | None]:
        """The mode of a call and its index, from its arguments or else from the wrapper."""
        name, told = type(self).__name__, self._told
        if index is None and mode is None and told is not None:
            mode, index = told.mode, told.index
        elif mode is None:
            mode = "ensemble" if index is None else "train"
        _check.one_of(name, "mode", mode, MODES)
        if (index is not None) != (mode == "train"):
            got = "None" if index is None else list(index.shape)
            _check.fail(name, "index", "[M, N] in mode 'train'" if index is None else f"None in mode {mode!r}", got)
        if self.is_folded and mode != "ensemble":
            raise _check.ArgumentError(f"{name}: mode {mode!r} needs the weights of each slot: call unfold() first")
        return mode, index

    def _slots_of_rows(self, x: Tensor) -> Tensor:
        """The input of the multiplex mode, which inside a wrapper comes as M examples of a row after another."""
        if self._told is None:
            return x
        rows: Tensor = x.unflatten(self.batch_dim, (-1, self.M))
        return rows.movedim(self.batch_dim + 1, self._slot_dim)

    def _check_index(self, index: Any, batch: int) -> Tensor:
        name, symbols = type(self).__name__, f"integers [M, R*B] = [{self.M}, R*{batch}], as MIMOIndex draws them"
        if not isinstance(index, Tensor):
            raise TypeError(f"{name}: index must be a tensor of {symbols}, got {type(index).__name__}")
        fits = index.dim() == 2 and index.shape[0] == self.M
        if not torch.compiler.is_compiling():  # a graph of any number of rows shall not promise that it divides them
            fits = fits and index.shape[1] % max(batch, 1) == 0
        if not fits:
            _check.fail(name, "index", symbols, list(index.shape))
        return index

    def _check_last(self, x: Tensor, symbols: str, *sizes: int) -> None:
        """The last sizes of x are these."""
        if x.shape[-len(sizes) :] != sizes:
            want = f"[..., {symbols}] = [..., {str(list(sizes))[1:]}"
            _check.fail(type(self).__name__, "input", want, list(x.shape))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.is_folded:  # from the weights as they are now, so that a change of dtype rounds once
            self._fold()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.is_folded:  # copies have parameters and versions of their own
            self._fold()


def fold_weight(weight: Tensor, M: int) -> Tensor:
    """The sum over slots: [G, M*C, ...] -> [G, C, ...]."""
    return sum_slots(weight.unflatten(1, (M, weight.shape[1] // M)), 1)


def sum_slots(x: Tensor, dim: int) -> Tensor:
    """A sum in float32 or wider, rounded once."""
    out: Tensor = x.sum(dim, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
    return out


def fold(model: nn.Module) -> nn.Module:
    """Fold all MIMO layers inside ``model``, for evaluation: a first layer then costs what a plain one does.

    Returns:
        ``model``.

    Raises:
        ArgumentError: where one of them is in training mode; none is folded then.
    """
    layers = mimo_layers("fold", model)
    training = [name or type(model).__name__ for name, layer in layers if layer.training]
    if training:
        raise _check.ArgumentError(f"fold: {', '.join(training)} in training mode: call .eval() first")
    for _, layer in layers:
        layer.fold()
    return model


def unfold(model: nn.Module) -> nn.Module:
    """Undo ``fold`` in all MIMO layers inside ``model``; returns ``model``."""
    for _, layer in mimo_layers("unfold", model):
        layer.unfold()
    return model


def mimo_layers(function: str, model: nn.Module) -> list[tuple[str, MIMOLayer]]:
    """The layers that fold, with their names."""
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, MIMOLayer)]
    if not found:
        _check.fail(function, "model", "a module with MIMO layers inside", type(model).__name__)
    return found


def check_slots(function: str, M: Any) -> None:
    if isinstance(M, bool) or not isinstance(M, int) or M < 2:
        _check.fail(function, "M", "an integer >= 2", repr(M))


def _version(p: Tensor) -> int:
    """Tensors made under inference_mode count no versions."""
    return -1 if p.is_inference() else p._version
