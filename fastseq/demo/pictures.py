"""Charts as inline SVG that is readable on a light and on a dark page. No pyplot, so no global state."""

from __future__ import annotations

import io
import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

COLOURS = {"orange": "#d9822b", "blue": "#3a8fd9", "green": "#35a06f", "violet": "#9b72d6"}

Series = Mapping[str, tuple[str, Sequence[float], Sequence[float]]]  # label -> (colour, x, y)
Panel = tuple[str, Mapping[str, tuple[str, Sequence[float]]]]  # title, label -> (colour, height per bin)
Bands = Mapping[str, tuple[str, Sequence[float], Sequence[float], Sequence[float]]]  # colour, x, y, half the width
HeatRow = tuple[str, NDArray[np.float32]]  # label, [rows, characters] in [0, 1]

_INK = "#010203"  # stands for the page's text colour until the SVG is written
_GROUND = "#010204"  # and this for that of its background
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10.0,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_numbers = itertools.count()


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    with matplotlib.rc_context(_SETTINGS):
        yield Figure(figsize=(width, height), layout="constrained")


def _inline(figure: Figure) -> str:
    """The figure as an SVG element: no metadata, text in the page's colour, ids that no other picture has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(buffer.getvalue())
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for size in ("width", "height"):
        root.attrib.pop(size, None)  # the viewBox keeps the proportions, the page gives the width
    prefix = f"picture{next(_numbers)}-"
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "id":
                value = prefix + value
            elif name == f"{{{_XLINK}}}href" and value.startswith("#"):
                value = f"#{prefix}{value[1:]}"
            value = re.sub(r"url\(#", f"url(#{prefix}", value)
            element.set(name, value.replace(_INK, "currentColor").replace(_GROUND, "var(--ground)"))
    return ElementTree.tostring(root, encoding="unicode")


def curves(panels: Sequence[tuple[str, str, Series]]) -> str:
    """Line charts side by side.

    Args:
        panels: (x label, y label, series) each.
    """
    with _figure(9, 3.6) as figure:
        for k, (x_label, y_label, series) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), k + 1)
            for label, (colour, x, y) in series.items():
                axes.plot(x, y, color=colour, label=label, linewidth=1.8, marker="o", markersize=2.5)
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label)
            axes.grid(True)
            if k == 0:
                axes.legend()
        return _inline(figure)


def bands(panels: Sequence[tuple[str, str, str, Bands]]) -> str:
    """Lines with bands around them, side by side; what is never negative is not drawn below zero, and a band that is
    much higher than all lines is cut.

    Args:
        panels: (title, x label, y label, label -> series) each.
    """
    with _figure(9, 3.6) as figure:
        for k, (title, x_label, y_label, series) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), k + 1)
            for label, (colour, x, y, half) in series.items():
                axes.plot(x, y, color=colour, label=label, linewidth=1.8, marker="o", markersize=2.5)
                axes.fill_between(x, np.subtract(y, half), np.add(y, half), color=colour, alpha=0.25, linewidth=0)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label)
            axes.set_xlim(left=0)
            values = np.concatenate([np.asarray(y) for _, _, y, _ in series.values()])
            if values.size and values.min() >= 0:
                low, high = axes.get_ylim()
                axes.set_ylim(max(low, 0.0), min(high, 2 * float(values.max())) or 1.0)
            axes.grid(True)
            if k == 0:
                axes.legend()
        return _inline(figure)


def beside(figures: Callable[[], Sequence[Figure]]) -> str:
    """Figures of matplotlib that other code makes, side by side in the page's colours.

    Args:
        figures: called where the colours are set.
    """
    legend = {"legend.frameon": True, "legend.facecolor": _GROUND, "legend.edgecolor": "none"}
    with matplotlib.rc_context(_SETTINGS | legend):
        parts = [ElementTree.fromstring(_inline(figure)) for figure in figures()]
    sizes = [[float(size) for size in part.attrib["viewBox"].split()[2:]] for part in parts]
    width, height = sum(size[0] for size in sizes), max(size[1] for size in sizes)
    root = ElementTree.Element(f"{{{_SVG}}}svg", {"viewBox": f"0 0 {width:g} {height:g}"})
    for k, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        place = {"x": sum(s[0] for s in sizes[:k]), "y": 0.0, "width": size[0], "height": size[1]}
        part.attrib.update({name: f"{value:g}" for name, value in place.items()})
        root.append(part)
    return ElementTree.tostring(root, encoding="unicode")


def bars(x_label: str, values: Mapping[str, tuple[str, float]]) -> str:
    """Horizontal bars, one per label, each with its value at the end.

    Args:
        values: label -> (colour, value).
    """
    with _figure(9, 0.7 + 0.42 * len(values)) as figure:
        axes = figure.add_subplot()
        labels = list(values)
        drawn = axes.barh(labels, [values[n][1] for n in labels], color=[values[n][0] for n in labels], height=0.65)
        axes.bar_label(drawn, fmt="%.1f", padding=4)
        axes.invert_yaxis()
        axes.set_xlabel(x_label)
        axes.margins(x=0.08)
        return _inline(figure)


def histograms(panels: Sequence[Panel], columns: int = 2) -> str:
    """Histograms over [0, 1] in a grid; in each, the series stand side by side."""
    rows = -(-len(panels) // columns)
    with _figure(9, 2.5 * rows) as figure:
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axes, (title, series) in zip(grid.flat, panels, strict=False):
            bins = len(next(iter(series.values()))[1])
            width = 0.84 / bins / len(series)
            left = np.arange(bins) / bins + 0.08 / bins
            for k, (label, (colour, heights)) in enumerate(series.items()):
                axes.bar(left + k * width, heights, width, align="edge", color=colour, label=label)
            axes.set_title(title, fontsize=10)
            axes.set_xlim(0, 1)
            axes.set_xticks(np.arange(0, 1.01, 0.2))
        for axes in grid[:, 0]:
            axes.set_ylabel("share of gates")
        for axes in grid[-1]:
            axes.set_xlabel("gate")
        grid.flat[0].legend()
        return _inline(figure)


def images(rows: Sequence[tuple[str, Sequence[tuple[str, NDArray[np.uint8]]]]]) -> str:
    """Images in a grid, pixel by pixel.

    Args:
        rows: label, and (title, [H, W, 3]) of each image in the row; as many in each row.
    """
    columns = len(rows[0][1])
    shape = rows[0][1][0][1].shape
    with _figure(9, (9 / columns * shape[0] / shape[1] + 0.3) * len(rows)) as figure:
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for line, (label, shown) in zip(grid, rows, strict=True):
            for axes, (title, pixels) in zip(line, shown, strict=True):
                axes.imshow(pixels, interpolation="none")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
                axes.set_title(title, fontsize=10)
            line[0].set_ylabel(label)
        return _inline(figure)


def heat_map(
    characters: Sequence[str],
    groups: Sequence[HeatRow],
    row_height: float = 0.3,
    limits: tuple[float, float] = (0.0, 1.0),
) -> str:
    """Gates over a sentence: one block of rows per group, one column per character.

    Args:
        characters: labels of the columns. groups: label and [rows, len(characters)] each. row_height: in inches.
        limits: values of the darkest and of the brightest colour.
    """
    settings: dict[str, Any] = {"cmap": "viridis", "vmin": limits[0], "vmax": limits[1], "interpolation": "nearest"}
    heights = [max(0.28, row_height * len(values)) for _, values in groups]
    with _figure(9, 0.7 + sum(heights) + 0.12 * len(heights)) as figure:
        grid = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (label, values) in zip(grid, groups, strict=True):
            image = axes.imshow(values, aspect="auto", **settings)
            axes.set_yticks([])
            axes.set_ylabel(label, rotation=0, ha="right", va="center")
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
        grid[-1].set_xticks(range(len(characters)), list(characters), fontfamily="monospace", fontsize=8)
        figure.colorbar(image, ax=list(grid), label="gate", fraction=0.02, pad=0.01)
        return _inline(figure)
