"""The terminal side of ``fastseq demo``: the progress bar and the report as text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table as Grid
from rich.text import Text as Plain

from fastseq.demo import Progress
from fastseq.demo.report import Chapter, Picture, Sample, Table, Text

_LINE_SECONDS = 10.0  # between two lines of progress where the output is a file or a pipe


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """A function for ``Budget.progress``: bars on a terminal, now and then a line elsewhere."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (TextColumn("{task.description:<28}"), BarColumn(24), TextColumn("{task.percentage:>3.0f}%"))
    remark = TextColumn("{task.fields[remark]}", markup=False)
    with Bars(*columns, TimeElapsedColumn(), remark, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, fraction: float, remark: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=1.0, remark="")
            bars.update(tasks[stage], completed=fraction, remark=remark)

        yield show


class _Lines:
    """Progress as lines: the first and the last of every stage, and one every ten seconds between."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stage = ""
        self.last = 0.0

    def __call__(self, stage: str, fraction: float, remark: str) -> None:
        now = time.perf_counter()
        if stage == self.stage and fraction < 1 and now - self.last < _LINE_SECONDS:
            return
        self.stage, self.last = stage, now
        line = f"{stage}: {fraction:.0%} {remark}".rstrip()
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def show(console: Console, facts: Sequence[tuple[str, str]], chapters: Sequence[Chapter]) -> None:
    """Print what the report says; of pictures their captions."""
    console.print()
    for name, value in facts:
        console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
    for chapter in chapters:
        console.print()
        console.rule(Plain(chapter.title))
        if chapter.about:
            console.print(Plain(chapter.about, style="dim"))
        for section in chapter.sections:
            console.print()
            console.print(Plain(section.title, style="bold"))
            for block in section.blocks:
                _show_block(console, block)


def _show_block(console: Console, block: Text | Table | Picture | Sample) -> None:
    if isinstance(block, Text):
        console.print(Plain(block.text))
    elif isinstance(block, Sample):
        console.print(Padding(Plain(block.text), (0, 2)))
        console.print(Plain(block.caption, style="dim"))
    elif isinstance(block, Picture):
        console.print(Plain(f"[picture in the report] {block.alt}", style="dim"))
    else:
        caption = Plain(block.caption) if block.caption else None
        grid = Grid(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
        for name, numeric in zip(block.head, block.numeric(), strict=True):
            grid.add_column(Plain(name), justify="right" if numeric else "left")
        for row in block.rows:
            grid.add_row(*(Plain(cell) for cell in row))
        console.print(grid)
