"""The report of ``compress``: as text, as data, and drawn."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastseq.compression.measure import Steps


class Matrix(NamedTuple):
    """One matrix of one gate that was compressed; snr: its power over that of the difference, in decibels."""

    name: str
    gate: str  # empty: a projection
    how: str
    bytes_before: int
    bytes_after: int
    snr: float


class Report(NamedTuple):
    """What ``compress`` did. metric and milliseconds: before and after, None where they were not asked for."""

    matrices: list[Matrix]
    steps: list[Steps]
    metric: tuple[float, float] | None
    milliseconds: tuple[float, ...] | None
    left: list[str]  # other modules with parameters, which stay
    bytes_left: int

    @property
    def bytes_before(self) -> int:
        """Of all matrices that were compressed."""
        return sum(m.bytes_before for m in self.matrices)

    @property
    def bytes_after(self) -> int:
        return sum(m.bytes_after for m in self.matrices)

    def as_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts alone, as json takes them."""
        found = self._asdict()
        found["matrices"] = [m._asdict() for m in self.matrices]
        found["steps"] = [s._asdict() for s in self.steps]
        return {**found, "bytes_before": self.bytes_before, "bytes_after": self.bytes_after}

    def __str__(self) -> str:
        header = ("matrix", "gate", "compressed", "bytes", "of", "SNR dB")
        lines = [
            (m.name, m.gate, m.how, f"{m.bytes_after:,}", f"{m.bytes_before:,}", f"{m.snr:.1f}") for m in self.matrices
        ]
        widths = [max(len(line[n]) for line in (header, *lines)) for n in range(len(header))]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in (header, *lines)]
        text.insert(1, "-" * len(text[0]))
        share = f", {self.bytes_before / self.bytes_after:.1f} times less" if self.bytes_after else ""
        text.append(f"{self.bytes_after:,} of {self.bytes_before:,} bytes{share}")
        text += [
            f"error of {s.module or 'the output'}: first step {s.first:.2g}, middle {s.middle:.2g}, last {s.last:.2g}"
            for s in self.steps
        ]
        if self.metric is not None:
            text.append(f"metric: {self.metric[1]:.6g}, before {self.metric[0]:.6g}")
        if self.milliseconds is not None:
            text.append(f"a call: {self.milliseconds[1]:.3g} ms, before {self.milliseconds[0]:.3g}")
        if self.left:
            text.append(f"left as they are, {self.bytes_left:,} bytes: {'; '.join(self.left)}")
        return "\n".join(line.rstrip() for line in text)

    def plot(self) -> Any:
        """A matplotlib figure: bytes of every matrix before and after, and its signal-to-noise ratio.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 1.5 + 0.3 * len(self.matrices)), layout="constrained")
        sizes, noise = figure.subplots(1, 2, sharey=True)
        places = range(len(self.matrices))
        sizes.barh(places, [m.bytes_before for m in self.matrices], color="0.85", label="before")
        sizes.barh(places, [m.bytes_after for m in self.matrices], color="tab:blue", label="after")
        sizes.set_yticks(list(places), [f"{m.name} {m.gate}".strip() for m in self.matrices])
        sizes.invert_yaxis()
        sizes.set_xlabel("bytes")
        sizes.legend()
        noise.barh(places, [min(m.snr, 160.0) for m in self.matrices], color="tab:orange")
        noise.set_xlabel("signal to noise, dB")
        return figure
