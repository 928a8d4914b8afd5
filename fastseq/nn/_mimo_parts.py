"""Which layers of a network ``MIMO`` replaces, and what replaces them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fastseq import _check
from fastseq.nn._mimo_fold import MIMOLayer
from fastseq.nn.lstm import LSTM
from fastseq.nn.mimo_layers import MIMOConv1d, MIMOConv2d, MIMOEmbedding, MIMOHead, MIMOLinear
from fastseq.nn.mimo_lstm import MIMOLSTM, lstm_options

_FIRST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, nn.LSTM, LSTM)
_KINDS = "nn.Linear, Conv1d, Conv2d, Embedding, LSTM or fastseq.nn.LSTM"


def find(backbone: nn.Module, first: str | None, head: str | None, example: Any) -> tuple[str, str]:
    """The names of the first layer and of the head."""
    for argument, name in (("first", first), ("head", head)):
        if name is not None and name not in dict(backbone.named_modules()):
            _check.fail("MIMO", argument, f"one of {_listed(dict(backbone.named_modules()))}", repr(name))
    leaves = _leaves(backbone)
    if not leaves:
        _check.fail("MIMO", "backbone", "a network of layers", f"{type(backbone).__name__} without any")
    order = list(leaves) if example is None else _called(backbone, leaves, example, head)
    known = _candidates(order, leaves)
    first = _first(order, leaves, known, example is not None) if first is None else first
    head = _head(order, leaves, known, example is not None) if head is None else head
    _check_layer(backbone, "first", first, _FIRST, _KINDS)
    _check_layer(backbone, "head", head, (nn.Linear,), "nn.Linear")
    if first == head:
        _check.fail("MIMO", "backbone", "a network with a first layer and a head of its own", f"{first} as both")
    return first, head


def _leaves(backbone: nn.Module) -> dict[str, nn.Module]:
    """Modules without modules inside, by name."""
    return {name: m for name, m in backbone.named_modules() if name and next(m.children(), None) is None}


def _holds_state(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) or any(True for _ in (*module.parameters(), *module.buffers()))


def _called(backbone: nn.Module, leaves: dict[str, nn.Module], example: Any, head: str | None) -> list[str]:
    """The names of ``leaves`` in the order of their calls; the last one's output is what the network returns."""
    order: list[str] = []
    outputs: list[Any] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            order.append(name)
            outputs.append(output)

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in leaves.items()]
    try:
        with evaluating(backbone):
            out = backbone(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        _check.fail("MIMO", "backbone", "a network that calls its layers", "none of them called")
    last = order[-1] if head is None else head
    if order.count(last) > 1:
        _check.fail("MIMO", "head", "called once in a forward", f"{last}, called {order.count(last)} times")
    returned = outputs[order.index(last)] if last in order else None
    if out is not returned:
        explain_output(last, out, returned)
    return order


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Without gradients and in evaluation mode; then all parts are in the mode they were in."""
    training = [m for m in module.modules() if m.training]
    try:
        with torch.no_grad():
            module.eval()
            yield
    finally:
        for m in training:
            m.training = True


def _candidates(order: Iterable[str], leaves: dict[str, nn.Module]) -> str:
    return _listed({name: leaves[name] for name in order if type(leaves[name]) in _FIRST}) or "none"


def _listed(modules: dict[str, nn.Module]) -> str:
    return ", ".join(f"{name} ({type(module).__name__})" for name, module in modules.items() if name)


def _first(order: list[str], leaves: dict[str, nn.Module], known: str, called: bool) -> str:
    """The first layer that holds parameters, where nothing speaks against it."""
    with_state = [name for name in order if _holds_state(leaves[name])]
    if not with_state:
        _check.fail("MIMO", "backbone", "a network with parameters", "none in its layers")
    name = with_state[0]
    if type(leaves[name]) not in _FIRST:
        _refuse(
            "first",
            f"the first layer {'called' if called else 'registered'} is {name} ({type(leaves[name]).__name__}), "
            f"not {_KINDS}",
            known,
            called,
        )
    kind = type(leaves[name])
    others = [n for n in with_state[1:] if type(leaves[n]) is nn.Embedding and kind is nn.Embedding and n != name]
    if others:  # of tokens, of positions, ... only their owner knows which of them takes the examples
        _refuse("first", f"there are several tables: {', '.join([name, *dict.fromkeys(others)])}", known, called)
    return name


def _head(order: list[str], leaves: dict[str, nn.Module], known: str, called: bool) -> str:
    """The last layer, where it is linear."""
    name = order[-1] if called else [n for n in order if _holds_state(leaves[n])][-1]
    if type(leaves[name]) is not nn.Linear:
        what = f"the last layer {'called' if called else 'registered'} is {name} ({type(leaves[name]).__name__})"
        _refuse("head", f"{what}, not nn.Linear", known, called)
    return name


def _refuse(argument: str, why: str, known: str, called: bool) -> NoReturn:
    hint = f"name it with {argument}=" + ("" if called else ", or give an example=")
    raise _check.ArgumentError(f"MIMO: {argument}: {why}; {hint}. Candidates: {known}")


def _check_layer(backbone: nn.Module, argument: str, name: str, kinds: tuple[type, ...], text: str) -> None:
    """The layer named can be replaced: its kind is known, and its parameters are its own."""
    layer = backbone.get_submodule(name)
    if type(layer) not in kinds:
        _check.fail("MIMO", argument, text, f"{name or 'the backbone itself'} ({type(layer).__name__})")
    if not name:
        _check.fail("MIMO", argument, "a layer inside the backbone", "the backbone itself")
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if any(hooks):
        _check.fail("MIMO", argument, "a layer without hooks, which would be lost with it", f"{name}, which has some")
    places = [n for n, m in backbone.named_modules(remove_duplicate=False) if m is layer]
    if len(places) > 1:
        _check.fail("MIMO", argument, "a layer with one place", f"{' and '.join(places)}, which are one module")
    own = {id(p) for p in layer.parameters()}
    for other, p in backbone.named_parameters(remove_duplicate=False):
        if id(p) in own and not other.startswith(f"{name}."):
            _check.fail("MIMO", argument, "a layer with parameters of its own", f"{name}, tied to {other}")


def check_time_first(backbone: nn.Module, first: str) -> None:
    """A first layer that works along no dimension but the last does not say where the examples are; where a layer
    behind it takes time first, the default is a guess that trains on steps of different examples, unnoticed."""
    layer = backbone.get_submodule(first)
    if not isinstance(layer, (nn.Linear, nn.Embedding)):
        return
    for name, module in backbone.named_modules():
        if getattr(module, "batch_first", None) is False:
            why = f"since {name or 'the backbone'} ({type(module).__name__}) takes time first"
            want = f"given, {why}: 0 where the input of {first} ({type(layer).__name__}) is [B, T, ...], 1 where it is "
            _check.fail("MIMO", "batch_dim", f"{want}[T, B, ...]", "None")


def explain_output(head: str, out: Any, returned: Any) -> NoReturn:
    """The output of the network is not that of its head."""
    want = f"a network that returns the output of its head {head} as it is"
    if returned is None:
        _check.fail("MIMO", "backbone", want, "one that does not call it")
    if isinstance(out, Tensor):
        sizes = f"another tensor {list(out.shape)}; that of the head is {list(returned.shape)}"
        _check.fail("MIMO", "backbone", want, f"{sizes}. Leave softmax, squeeze and the like to the caller")
    several = list(out.values()) if isinstance(out, dict) else list(out) if isinstance(out, (tuple, list)) else []
    shapes = [list(v.shape) for v in several if isinstance(v, Tensor)]
    _check.fail("MIMO", "backbone", want, f"{type(out).__name__} of tensors {shapes}: several heads are not supported")


def first_layer(layer: nn.Module, M: int, copied: bool) -> MIMOLayer:
    """The MIMO layer in the place of ``layer``; copied: each slot has its weights / M."""
    weight = next(layer.parameters())
    where: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}

    def of(*names: str) -> tuple[Any, ...]:
        return tuple(getattr(layer, name) for name in names)

    new: MIMOLayer
    if isinstance(layer, nn.Linear):
        new = MIMOLinear(layer.in_features, layer.out_features, M, layer.bias is not None, **where)
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        kind = MIMOConv1d if isinstance(layer, nn.Conv1d) else MIMOConv2d
        sizes = of("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        new = kind(*sizes, layer.bias is not None, layer.padding_mode, M=M, **where)
    elif isinstance(layer, nn.Embedding):
        if layer.max_norm is not None:
            _check.fail("MIMO", "first", "an Embedding without max_norm", f"max_norm={layer.max_norm}")
        sizes = of("padding_idx", "scale_grad_by_freq", "sparse")
        new = MIMOEmbedding(layer.num_embeddings, layer.embedding_dim, M, *sizes, **where)
    else:
        sizes = of("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout")
        sizes += of("bidirectional", "proj_size")
        where |= lstm_options(layer) if isinstance(layer, LSTM) else {}
        new = MIMOLSTM(sizes[0], sizes[1], *sizes[2:], M=M, **where)
    return _take_over(new, layer, M, copied, new._folding)


def head_layer(layer: nn.Module, M: int, copied: bool) -> MIMOHead:
    """M heads in the place of ``layer``."""
    assert isinstance(layer, nn.Linear)
    bias, weight = layer.bias is not None, layer.weight
    new = MIMOHead(layer.in_features, layer.out_features, M, bias, weight.device, weight.dtype)
    if copied:
        with torch.no_grad():
            for name, p in layer.named_parameters():
                getattr(new, name).requires_grad_(p.requires_grad).copy_(torch.cat([p] * M))
    return new.train(layer.training)


def _take_over(new: MIMOLayer, layer: nn.Module, M: int, copied: bool, slotted: tuple[str, ...]) -> MIMOLayer:
    if copied:
        with torch.no_grad():
            for name, p in layer.named_parameters():
                value = torch.cat([p / M] * M, 1) if name in slotted else p
                getattr(new, name).requires_grad_(p.requires_grad).copy_(value)
    return new.train(layer.training)
