"""``from_torch_uncertainty``: MIMO networks of ENSTA-U2IS-AI/torch-uncertainty."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastseq import _check
from fastseq.convert.checkpoint import ACTIVATIONS, from_checkpoint, tensors_of
from fastseq.convert.matrices import Array
from fastseq.convert.official import Official, needed
from fastseq.convert.onnx_read import ConversionError

_NAME = "from_torch_uncertainty"


class _Network(NamedTuple):
    what: str
    first: str
    head: str


_NETWORKS = (  # by names that the first layer and the head have in it
    _Network("mimo_mlp", "layers.0", "final_layer"),
    _Network("mimo_resnet or mimo_wideresnet28x10", "conv1", "linear"),
)
_REFUSED = {  # a name that only this network has, and why it is no MIMO of ours
    "last_layer.weight": "mimo_inception_time has several first layers side by side; MIMO here replaces one",
    "outc.conv.weight": "mimo_unet ends in a convolution; the head of a MIMO here is linear",
    "final_layer.loc.weight": "mimo_mlp with a dist_family ends in the parameters of a distribution, not in logits",
}


def from_torch_uncertainty(source: Any, members: int, *, activation: str = "relu") -> Official:
    """A ``mimo_mlp``, ``mimo_resnet`` or ``mimo_wideresnet28x10``: its names, and its weights as they are.

    Both libraries lay the channels of the slots side by side, slot 0 first, in the first layer and in the head, so the
    state of ``fastseq.nn.MIMO`` differs in names only. The deployed model, of the ``mimo_mlp`` alone, is the ensemble
    of evaluation: the first layer's weights summed over the slots, then the mean of the members' probabilities.

    Args:
        source: names to tensors, or a file of them, as of ``from_checkpoint``; names may begin with "model.", as they
            do in the checkpoints of its routines.
        members: what it was made with as num_estimators, >= 2. The file does not tell.
        activation: of the ``mimo_mlp``; "relu", "tanh" or "sigmoid". The file does not tell.

    Raises:
        ConversionError: it is another network, or its sizes are no multiples of ``members``.
        ArgumentError: for a value out of its range.
    """
    if isinstance(members, bool) or not isinstance(members, int) or members < 2:
        _check.fail(_NAME, "members", "an integer >= 2, the num_estimators of the network", repr(members))
    choices = tuple(name for name in ACTIVATIONS if name != "softmax")
    _check.one_of(_NAME, "activation", activation, choices)
    tensors = _of_the_network(tensors_of(_NAME, source))
    network = _recognized(tensors)
    first, head = (tensors[f"{name}.weight"] for name in (network.first, network.head))
    for name, size, what in (
        (network.first, first.shape[1], "input channels"),
        (network.head, len(head), "answers"),
    ):
        if size % members:
            raise ConversionError(f"{_NAME}: {name} has {size} {what}, no multiple of members = {members}")
    is_mlp = network.first == "layers.0"
    why_not = "" if is_mlp else f"{network.what} has 2-d convolutions, which a deployed model has no place for"
    model = _deployed(tensors, members, activation) if is_mlp else None
    notes = [f"the file does not say how many members there are: taken as {members}"]
    if is_mlp:
        notes.append(f"it does not say what lies between the layers: taken as {activation}")
    state = {f"backbone.{name}": value for name, value in tensors.items()}
    sizes = f"{first.shape[1] // members} channels in and {len(head) // members} answers out"
    module = (
        f'fastseq.nn.MIMO(backbone, M={members}, first="{network.first}", head="{network.head}"), where backbone is '
        f"the same network made for one member, with {sizes}"
    )
    return Official(state, module, model, why_not, notes)


def _of_the_network(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Without what a routine holds beside its model."""
    own = {name.removeprefix("model."): v for name, v in tensors.items() if name.startswith("model.")}
    return own or dict(tensors)


def _recognized(tensors: Mapping[str, Array]) -> _Network:
    for name, why in _REFUSED.items():
        if name in tensors:
            raise ConversionError(f"{_NAME}: {why}")
    for network in _NETWORKS:
        weights = [tensors.get(f"{name}.weight") for name in (network.first, network.head)]
        if all(weight is not None for weight in weights):
            return network
    expected = " nor ".join(f"{n.first}.weight with {n.head}.weight ({n.what})" for n in _NETWORKS)
    some = ", ".join([*tensors][:6]) or "nothing"
    raise ConversionError(f"{_NAME}: the file has neither {expected} (there is {some})")


def _deployed(tensors: Mapping[str, Array], members: int, activation: str) -> dict[str, Any]:
    layers = sorted(
        {name.rpartition(".")[0] for name in tensors if re.fullmatch(r"layers\.\d+\.weight", name)},
        key=lambda name: int(name.rpartition(".")[2]),
    )
    weight = needed(_NAME, tensors, "layers.0.weight", "H, M*C", None, None)
    folded = weight.reshape(len(weight), members, -1).sum(1, dtype=np.float64).astype(np.float32)
    own = {**tensors, "layers.0.weight": folded}
    order = [part for name in layers for part in (name, activation)]
    types = {name: {"type": "linear"} for name in [*layers, "final_layer"]}
    model = from_checkpoint(own, order=[*order, "final_layer"], fields=types)
    model["layers"].append({"type": "ensemble", "name": "final_layer.ensemble", "members": members})
    return model
