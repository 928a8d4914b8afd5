"""What compression costs the trained models: the question that G2-LSTM's tables answer on other text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import fastseq
from fastseq.demo.race import Chunk, Runner, bits_per_character
from fastseq.demo.report import Section, Table, Text

# how, in words: options of fastseq.compress
WAYS: dict[str, dict[str, Any]] = {
    "i, f rounded to 0.2": {"step": 0.2},
    "i, f rounded to 0.2, clipped at 0.4": {"step": 0.2, "clip": 0.4},
    "i, f of rank H/2": {"rank": 2},
    "i, f of rank H/4": {"rank": 4},
    "i, f of rank H/8": {"rank": 8},
    "int8": {"weights": "int8"},
    "int4 by 32": {"weights": "int4", "group": 32},
}


def section(runners: Mapping[str, Runner], held_out: Sequence[Chunk], report: Callable[[float, str], None]) -> Section:
    """Bits per character of each model as it is and compressed, and the bytes that are left."""
    rows, costs, done = [], {}, 0
    whole = {name: bits_per_character(r.model, held_out, r.masked) for name, r in runners.items()}
    rows.append(("as trained", *(f"{bits:.3f}" for bits in whole.values()), "1.0"))
    for way, options in WAYS.items():
        cells, less = [], ""
        for name, runner in runners.items():
            report(done / (len(WAYS) * len(runners)), way)
            given = dict(options)
            if "rank" in given:
                given["rank"] = max(1, int(runner.model.lstm.hidden_size) // given["rank"])  # type: ignore[arg-type]
            model, found = fastseq.compress(runner.model, **given)
            bits = bits_per_character(model, held_out, runner.masked)  # type: ignore[arg-type]
            costs[way, name] = bits - whole[name]
            cells.append(f"{bits:.3f} ({bits - whole[name]:+.3f})")
            less = f"{found.bytes_before / found.bytes_after:.1f}" if found.matrices else "1.0"
            done += 1
        rows.append((way, *cells, less))
    report(1.0, "")
    head = ("matrices", *(f"{name}, bits per character" for name in runners), "times fewer bytes")
    caption = (
        "Computed with the compressed matrices; where these are integers, inputs and states have 8 bits. Held-out "
        "text, without noise. In brackets: what it costs. Bytes: of the matrices that were compressed."
    )
    return Section("What smaller matrices cost", [Text(_verdict(list(runners), costs)), Table(head, rows, caption)])


def _verdict(names: list[str], costs: Mapping[tuple[str, str], float]) -> str:
    """Which model loses less, in how many ways."""
    stock, binary = names[0], names[1]
    fewer = sum(costs[way, binary] < costs[way, stock] for way in WAYS)
    return (
        "The paper compresses the input and forget gates after training, and finds that gates trained towards 0 and 1 "
        f"lose less by it. Here {binary} loses less than {stock} in {fewer} of {len(WAYS)} ways of compression. One "
        "run with one seed on a small text: no verdict on the claim."
    )
