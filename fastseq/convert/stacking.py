"""From layers that know what they take, to the list of layers and the tensors of a deployed model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastseq.convert.onnx_values import Array, Made

_SUFFIX = "_l0"


def ordered(last: Made) -> list[Made]:
    """Every layer behind ``last`` and itself, after those that it takes; without the input."""
    found: dict[Made, None] = {}
    todo = [(last, False)]
    while todo:
        made, ready = todo.pop()
        if made in found or made.type == "input":
            continue
        if ready:
            found[made] = None
        else:
            todo.append((made, True))
            todo.extend((source, False) for source in reversed(made.sources))
    return list(found)


def stacked(last: Made) -> Made:
    """Each run of LSTMs of one shape, of which the next takes nothing but the one before, as one layer."""
    order = ordered(last)
    uses = Counter(source for made in order for source in made.sources)
    new: dict[Made, Made] = {}
    for made in order:
        now = replace(made, sources=tuple(new.get(source, source) for source in made.sources))
        below = now.sources[0] if now.sources else now
        if made.type == "lstm" and below.type == "lstm" and uses[made.sources[0]] == 1 and _fit(below, now):
            n = below.fields["num_layers"]
            upper = {_raised(name, n): value for name, value in now.tensors.items()}
            now = Made("lstm", below.fields | {"num_layers": n + 1}, below.tensors | upper, below.sources)
        new[made] = now
    return new.get(last, last)


def _raised(name: str, n: int) -> str:
    return name.replace(_SUFFIX, f"_l{n}", 1)


def _fit(below: Made, above: Made) -> bool:
    same = [{k: v for k, v in m.fields.items() if k not in ("num_layers", "input_size")} for m in (below, above)]
    size = below.fields["proj_size"] or below.fields["hidden_size"]
    return same[0] == same[1] and above.fields["input_size"] == size * (1 + below.fields["bidirectional"])


def named(last: Made) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    """Layers called by their type, numbered from the second of a type on; "from" where that is not the one before."""
    layers: list[dict[str, Any]] = []
    tensors: dict[str, Array] = {}
    names: dict[Made, str] = {}
    counts: Counter[str] = Counter()
    before = "input"
    for made in ordered(last):
        name = made.type if not counts[made.type] else f"{made.type}_{counts[made.type]}"
        counts[made.type] += 1
        sources = [names.get(source, "input") for source in made.sources]
        layer = {"type": made.type, "name": name, **made.fields}
        layers.append(layer if sources == [before] else layer | {"from": sources})
        tensors |= {f"{name}.{key}": value for key, value in made.tensors.items()}
        names[made] = before = name
    return layers, tensors


def chained(parts: Sequence[tuple[str, Made]]) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    """Layers with names of their own, each of which takes the one before."""
    layers = [{"type": made.type, "name": name, **made.fields} for name, made in parts]
    return layers, {f"{name}.{key}": value for name, made in parts for key, value in made.tensors.items()}
