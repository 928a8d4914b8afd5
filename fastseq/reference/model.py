"""Definition of a deployed model: a list of layers, and the tensors of each under its name.

Layouts are time-major, [T, B, C]. Steps beyond a row's length are zeros in what every layer gives, or -1 where it gives
indices; so each row is what it would be alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.reference.lstm import lstm
from fastseq.reference.mimo import ensemble_stats
from fastseq.reference.model_matrix import matrix_of, matrix_product
from fastseq.reference.packed import Matrix, linear_packed, matrix_values
from fastseq.reference.vq import vq_nearest


class Steps(NamedTuple):
    """What a layer gives: [T, B, ...], and the valid steps of each row, or None where all are."""

    values: Tensor
    lengths: Tensor | None


Layer = Mapping[str, Any]
Named = Mapping[str, Tensor]
Run = Callable[[Layer, Named, Named, Sequence[Steps]], tuple[Steps, dict[str, Tensor]]]


def run_model(
    layers: Sequence[Layer],
    tensors: Mapping[str, Any],
    x: Any,
    lengths: Any = None,
    state: Named | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a model on a batch of sequences.

    Args:
        layers, tensors: the model; tensors may be arrays, uint16 for the bits of bfloat16.
        x: [T, B, C], or integers [T, B] where the first layer is an embedding.
        lengths: [B], the valid steps of each row.
        state: what an earlier call returned, to go on from there.

    Returns:
        What the last layer gives, and the state: ``name.h`` [L * D, B, P] and ``name.c`` [L * D, B, H] of every lstm
        (directions within layers), ``name.steps`` [S, B, C] and ``name.count`` [B] of every conv1d without zeros on the
        right: the steps that it needs again, at the front of each row, and how many they are. A count of -n means that
        the next n steps are skipped.
    """
    known = {name: v if isinstance(v, Tensor) else _tensor(v) for name, v in tensors.items()}
    x = torch.as_tensor(x)
    if not x.is_floating_point():
        wide = any(value.dtype == torch.float64 for value in known.values())
        known[".dtype"] = torch.empty(0, dtype=torch.float64 if wide else torch.float32)
    lengths = None if lengths is None else torch.as_tensor(lengths)
    found = {"input": _masked(Steps(x, lengths), 0)}
    new_state, before = {}, "input"
    for layer in layers:
        name, kind = layer["name"], layer["type"]
        if kind not in LAYERS:
            raise ValueError(f"run_model: {name} has the unknown type {kind!r}")
        sources = layer.get("from", [before])
        sources = [sources] if isinstance(sources, str) else sources
        own = _under(known, name)
        out, left = LAYERS[kind](layer, own, _under(state or {}, name), [found[source] for source in sources])
        found[name] = _masked(out, 0 if out.values.is_floating_point() else -1)
        new_state.update({f"{name}.{key}": value for key, value in left.items()})
        before = name
    return found[before].values, new_state


def _tensor(values: Any) -> Tensor:
    """An array, bfloat16 as the uint16 of its bits."""
    found = torch.tensor(values)
    return found.view(torch.bfloat16) if found.dtype == torch.uint16 else found


def _under(tensors: Named, name: str) -> dict[str, Tensor]:
    """The tensors of one layer, without its name; ``.dtype`` is everyone's."""
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    return own | {key: value for key, value in tensors.items() if key == ".dtype"}


def _masked(steps: Steps, fill: int) -> Steps:
    values, lengths = steps
    if lengths is None:
        return steps
    live = torch.arange(len(values))[:, None] < lengths
    live = live.reshape(live.shape + (1,) * (values.dim() - 2))
    return Steps(torch.where(live, values, values.new_full((), fill)), lengths)


def _embedding(layer: Layer, own: Named, state: Named, sources: Sequence[Steps]) -> tuple[Steps, dict[str, Tensor]]:
    (index, lengths), V = sources[0], layer["size"]
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < V:
        raise ValueError(f"run_model: {layer['name']} takes integers in 0..{V - 1}")
    weight = matrix_values(matrix_of(own, "weight", layer.get("group")), layer["dim"])
    return Steps(weight.to(own[".dtype"].dtype)[index.long()], lengths), {}


def _linear(layer: Layer, own: Named, state: Named, sources: Sequence[Steps]) -> tuple[Steps, dict[str, Tensor]]:
    x, lengths = sources[0]
    y = matrix_product(x, matrix_of(own, "weight", layer.get("group")))
    return Steps(y + own["bias"].to(y.dtype) if "bias" in own else y, lengths), {}


def _conv1d(layer: Layer, own: Named, state: Named, sources: Sequence[Steps]) -> tuple[Steps, dict[str, Tensor]]:
    """A window of k steps, ``dilation`` apart, as one row [k * C] at every ``stride``-th step."""
    x, lengths = sources[0]
    T, B, C = x.shape
    stride, span = layer.get("stride", 1), layer.get("dilation", 1) * (layer["kernel"] - 1) + 1
    steps = state.get("steps", x.new_zeros(layer.get("left", 0), B, C))
    count = state.get("count", torch.full((B,), len(steps)))
    right = layer.get("right", 0)
    live = torch.full((B,), T) if lengths is None else lengths
    total = count + live + right
    stream = _joined(steps, count, x, live, (int(count.max()) if B else len(steps)) + T + right)
    made = ((total - span).div(stride, rounding_mode="floor") + 1).clamp_min(0)
    most = max(0, (len(stream) - span) // stride + 1)
    taps = [stream[tap::stride][:most] for tap in range(0, span, layer.get("dilation", 1))]
    y = matrix_product(torch.cat(taps, -1), matrix_of(own, "weight", layer.get("group")))
    y = y + own["bias"].to(y.dtype) if "bias" in own else y
    out = Steps(y, made if lengths is not None or bool((count != count[:1]).any()) else None)
    if right:
        return out, {}
    count = total - made * stride
    place = (made * stride) + torch.arange(max(0, int(count.max())) if B else 0)[:, None]
    kept = stream.gather(0, place.clamp(0, max(len(stream) - 1, 0))[..., None].expand(-1, -1, C))
    kept = torch.where((place < total)[..., None], kept, kept.new_zeros(()))
    return out, {"steps": kept, "count": count}


def _joined(steps: Tensor, count: Tensor, x: Tensor, live: Tensor, length: int) -> Tensor:
    """[length, B, C]: of each row the first ``count`` of ``steps``, then ``live`` of x, then zeros."""
    place = torch.arange(max(length, 0))[:, None].expand(-1, x.shape[1])
    old, new = place < count, (place >= count) & (place < count + live)

    def taken(values: Tensor, at: Tensor) -> Tensor:
        padded = torch.cat((values, values.new_zeros(1, *values.shape[1:])))
        return padded.gather(0, at.clamp(0, len(values))[..., None].expand(-1, -1, values.shape[2]))

    mine = torch.where(old[..., None], taken(steps.to(x.dtype), place), x.new_zeros(()))
    return torch.where(new[..., None], taken(x, place - count), mine)


def _elementwise(function: Callable[[Tensor], Tensor]) -> Run:
    def run(layer: Layer, own: Named, state: Named, sources: Sequence[Steps]) -> tuple[Steps, dict[str, Tensor]]:
        return Steps(function(sources[0].values), sources[0].lengths), {}

    return run


def _ensemble(layer: Layer, own: Named, state: Named, sources: Sequence[Steps]) -> tuple[Steps, dict[str, Tensor]]:
    """Of logits [T, B, M * K], one member after another: K mean probabilities, then the members' disagreement."""
    x, lengths = sources[0]
    M = layer["members"]
    if x.shape[2] % M:
        raise ValueError(f"run_model: {layer['name']} takes as many channels for each of {M} members")
    probability, _, _, _, disagreement, *_ = ensemble_stats(x.flatten(0, 1).unflatten(1, (M, x.shape[2] // M)))
    y = torch.cat((probability, disagreement[:, None]), 1)
    return Steps(y.unflatten(0, x.shape[:2]), lengths), {}


def _joining(function: Callable[[list[Tensor]], Tensor]) -> Run:
    def run(layer: Layer, own: Named, state: Named, sources: Sequence[Steps]) -> tuple[Steps, dict[str, Tensor]]:
        if len({source.values.shape[:2] for source in sources}) != 1:
            raise ValueError(f"run_model: {layer['name']} takes layers of one length")
        return Steps(function([source.values for source in sources]), sources[0].lengths), {}

    return run


def _sum(values: list[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _lstm(layer: Layer, own: Named, state: Named, sources: Sequence[Steps]) -> tuple[Steps, dict[str, Tensor]]:
    x, lengths = sources[0]
    B, H, P, group = x.shape[1], layer["hidden_size"], layer.get("proj_size", 0), layer.get("group")
    options = layer.get("tau", 1.0), layer.get("hard", False)
    both = layer.get("bidirectional", False)
    directions = (False, True) if both else (layer.get("reverse", False),)
    ends_h: list[Tensor] = []
    ends_c: list[Tensor] = []
    for n in range(layer.get("num_layers", 1)):
        outs = []
        for reverse in directions:
            suffix = f"_l{n}_reverse" if reverse else f"_l{n}"
            gates = matrix_product(x, matrix_of(own, f"weight_ih{suffix}", group))
            gates = gates + own[f"bias{suffix}"].to(x.dtype) if f"bias{suffix}" in own else gates
            h0, c0 = (
                state[key][len(ends_h)].to(x.dtype)
                if key in state
                else own.get(f"{key}_start{suffix}", torch.zeros(size)).to(x.dtype).expand(B, size)
                for key, size in (("h", P or H), ("c", H))
            )
            recurrent = _product(matrix_of(own, f"weight_hh{suffix}", group), bounded=not P)
            project = _product(matrix_of(own, f"weight_hr{suffix}", group), bounded=True) if P else None
            kept = recurrent, h0, c0, project, lengths, None, None, None, None, None
            h, _, _, h_n, c_n = lstm(gates, *kept, *options, reverse)
            outs.append(h)
            ends_h.append(h_n)
            ends_c.append(c_n)
        x = torch.cat(outs, -1)
    return Steps(x, lengths), {"h": torch.stack(ends_h), "c": torch.stack(ends_c)}


def _product(matrix: Matrix, bounded: bool) -> Callable[[Tensor], Tensor]:
    return lambda h: linear_packed(h, matrix, bounded=bounded)


def _residual_vq(layer: Layer, own: Named, state: Named, sources: Sequence[Steps]) -> tuple[Steps, dict[str, Tensor]]:
    """Each level takes the code nearest to what the levels before it left, or with the largest product with that."""
    x, lengths = sources[0]
    rest, total = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
    indices = []
    for codebook in own["codebooks"].to(x.dtype):
        index = vq_nearest(rest[None], codebook[None], dot=layer.get("metric", "euclidean") == "cosine")[0, :, 0]
        total, rest = total + codebook[index], rest - codebook[index]
        indices.append(index)
    if layer.get("output", "codes") == "codes":  # of one level without its dimension
        found = torch.stack(indices, -1).to(torch.int32) if len(indices) > 1 else indices[0].to(torch.int32)
    else:
        found = total
    return Steps(found.unflatten(0, x.shape[:2]), lengths), {}


def _crf(layer: Layer, own: Named, state: Named, sources: Sequence[Steps]) -> tuple[Steps, dict[str, Tensor]]:
    """Viterbi (1967): the labels of the largest sum of start, x, transitions and end; of equal sums the lower label."""
    x, lengths = sources[0]
    T, B, _ = x.shape
    live = torch.full((B,), T) if lengths is None else lengths
    start, transitions, end = (own[name].to(x.dtype) for name in ("start", "transitions", "end"))
    score, origins = torch.zeros_like(start), []
    for t in range(T):
        sums = score[..., None] + transitions
        origins.append(first_largest(sums, -2))
        moved = start + x[0] if t == 0 else _numbers(sums).amax(-2) + x[t]
        score = moved if t == 0 else torch.where((t < live)[:, None], moved, score)
    label = first_largest(score + end, -1).expand(B) if T else live.new_zeros(B)
    labels = torch.full((T, B), -1, dtype=torch.int32)
    for t in reversed(range(T)):
        if t + 1 < T:
            label = torch.where(t + 1 < live, origins[t + 1].gather(1, label[:, None])[:, 0], label)
        labels[t] = label
    return Steps(labels, lengths), {}


def first_largest(values: Tensor, dim: int) -> Tensor:
    """The first place of the largest value; a NaN is never it."""
    values = _numbers(values)
    return (values == values.amax(dim, keepdim=True)).to(torch.uint8).argmax(dim)


def _numbers(values: Tensor) -> Tensor:
    return values.where(~values.isnan(), values.new_full((), -torch.inf))


LAYERS: dict[str, Run] = {
    "embedding": _embedding,
    "linear": _linear,
    "conv1d": _conv1d,
    "relu": _elementwise(lambda x: torch.where(x < 0, 0, x)),
    "tanh": _elementwise(torch.tanh),
    "sigmoid": _elementwise(torch.sigmoid),
    "softmax": _elementwise(lambda x: x.softmax(-1)),
    "ensemble": _ensemble,
    "lstm": _lstm,
    "residual_vq": _residual_vq,
    "crf": _crf,
    "add": _joining(_sum),
    "concat": _joining(lambda values: torch.cat(values, -1)),
}
