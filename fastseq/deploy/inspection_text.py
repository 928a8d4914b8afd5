"""``contents`` as text in aligned columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_HEADER = ("layer", "kept as", "size", "parameters", "bytes", "float32")
_LEFT = 3  # columns of text; numbers stand to the right


def contents_text(found: Mapping[str, Any]) -> str:
    """``contents`` for people; whatever a file says is printed as one line of printable characters."""
    rows = [_HEADER]
    for layer in found["layers"]:
        rows.append((printable(layer["name"]), _kind(layer), _sizes(layer), *_numbers(layer)))
        for entry in layer["tensors"]:
            shape = " x ".join(map(str, entry["shape"]))
            rows.append((f"  {printable(entry['name'])}", entry["kept"], shape, *_numbers(entry)))
    rows.append(("all", "", "", *_numbers(found)))
    given, made = _data(found["input"], "input"), _data(found["output"], "output")
    alone = f"whole sequences only: {found['looks_ahead']}" if found["looks_ahead"] else "runs piece by piece"
    return "\n".join(
        [
            f"{printable(found['file'])}: {found['format']}, {found['file_bytes']:,} bytes",
            f"source: {printable(str(found['source'])) or 'not told'}",
            f"{given}; {made}",
            f"{printable(alone)}; state: {found['state_size']:,} numbers",
            "",
            *table(rows),
            "",
            *(_check_line(check) for check in found["checks"]),
        ]
    )


def other_text(found: Mapping[str, Any]) -> str:
    """``other_contents`` for people."""
    rows = [("tensor", "type", "size")]
    rows += [(printable(k), v["dtype"], " x ".join(map(str, v["shape"]))) for k, v in found["tensors"].items()]
    return "\n".join(table(rows))


def printable(text: str) -> str:
    """``text`` with what could steer a terminal, or break a line, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns, the first of which names them."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if n < _LEFT else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _numbers(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"{entry['parameters']:,}", f"{entry['bytes']:,}", f"{entry['float32_bytes']:,}"


def _kind(layer: Mapping[str, Any]) -> str:
    """The type and what else describes a layer; of numbers those that are not as usual."""
    fields, words = layer["fields"], [str(layer["type"])]
    if layer["type"] == "lstm":
        words.append(f"{'hard' if fields.get('hard', False) else 'sigmoid'} gates")
        words += [f"tau {fields['tau']:g}"] if fields.get("tau", 1.0) != 1.0 else []
        words += [f"{fields['num_layers']} layers"] if fields.get("num_layers", 1) != 1 else []
        words += ["both directions"] if fields.get("bidirectional", False) else []
        words += [f"projected to {fields['proj_size']}"] if fields.get("proj_size", 0) else []
    for name, usual in {"kernel": None, "stride": 1, "dilation": 1, "left": 0, "right": 0}.items():
        words += [f"{name} {fields[name]}"] if layer["type"] == "conv1d" and fields.get(name, usual) != usual else []
    words += [f"{fields['members']} members"] if layer["type"] == "ensemble" else []
    if layer["type"] == "residual_vq":
        words += [f"{fields.get('levels', 1)} levels of {fields['size']}", str(fields.get("metric", "euclidean"))]
    words += [f"from {', '.join(map(printable, fields['from']))}"] if "from" in fields else []
    return ", ".join(words)


def _sizes(layer: Mapping[str, Any]) -> str:
    """Channels in and out; of an embedding its words and their width."""
    fields = layer["fields"]
    if layer["type"] == "lstm":
        size = (fields.get("proj_size", 0) or fields["hidden_size"]) * (1 + fields.get("bidirectional", False))
        return f"{fields['input_size']} to {size}"
    pairs = {"embedding": ("size", "dim"), "linear": ("in", "out"), "conv1d": ("in", "out")}
    return " to ".join(str(fields[name]) for name in pairs.get(layer["type"], ()))


def _data(shape: Mapping[str, Any], name: str) -> str:
    if not shape["index"]:
        return f"{name}: float32 [T, B, {shape['size']}]"
    return f"{name}: int32 [T, B]" if shape["size"] == 1 else f"{name}: int32 [T, B, {shape['size']}]"


def _check_line(check: Mapping[str, Any]) -> str:
    return f"{'ok    ' if check['passed'] else 'FAILED'}  {check['name']}: {printable(check['found'])}"
