"""What a demonstration reports, and the self-contained HTML page made of it. Needs the standard library only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class Text:
    """A paragraph. Plain text, escaped on output."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table of texts: head [C], rows [R][C]. The first column names the row; columns of numbers are set right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"Table: every row must have {len(self.head)} cells as the head, got {len(row)}")

    def numeric(self) -> list[bool]:
        """Per column: every cell begins as a number does."""
        return [
            all(re.match(r"[-+]?\d", row[k]) for row in self.rows) and bool(self.rows) for k in range(len(self.head))
        ]


@dataclass(frozen=True)
class Picture:
    """A picture as SVG markup from ``fastseq.demo.pictures``, the one thing that is not escaped."""

    svg: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Sample:
    """Text that keeps its line breaks, such as generated text."""

    text: str
    caption: str = ""


Block = Text | Table | Picture | Sample


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Chapter:
    """The sections of one demonstration, and what it is about in a few plain sentences."""

    title: str
    sections: Sequence[Section]
    about: str = ""


_STYLE = """
:root { color-scheme: light dark;
  --ground: #ffffff; --ink: #1c2024; --soft: #5b6570; --line: #d5dae0; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --ink: #e4e8ec; --soft: #9aa5b1; --line: #363d45; --band: #1d2226; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 60rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.5rem; line-height: 1.25; margin: 3rem 0 0.75rem; padding-bottom: 0.3rem;
  border-bottom: 2px solid var(--line); }
h3 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
p { max-width: 46rem; }
a { color: inherit; }
.about { background: var(--band); border-left: 4px solid var(--line); padding: 0.7rem 1rem; max-width: 48rem; }
nav { margin: 1.5rem 0; }
nav ol { padding-left: 1.4rem; margin: 0.5rem 0; }
nav li { margin: 0.5rem 0; }
nav .sections { color: var(--soft); font-size: 0.9rem; }
.scroll { overflow-x: auto;  /* with a shadow at the side where there is more */
  background: linear-gradient(to right, var(--ground) 40%, transparent) left / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--ground) 40%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(to right, var(--line), transparent) left / 1rem 100% no-repeat scroll,
    linear-gradient(to left, var(--line), transparent) right / 1rem 100% no-repeat scroll; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; color: var(--soft); font-size: 0.9rem; padding-top: 0.4rem; }
th, td { padding: 0.35rem 0.8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
.number { text-align: right; }
td.number { white-space: nowrap; }
thead th { background: var(--band); }
tbody th { font-weight: 500; }
.facts { font-size: 0.9rem; }
figure { margin: 1.25rem 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 0.9rem; max-width: 46rem; margin-top: 0.3rem; }
pre { background: var(--band); border: 1px solid var(--line); border-radius: 6px;
  padding: 0.8rem 1rem; margin: 0 0 0.4rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
@media (max-width: 46rem) {  /* pictures and tables keep a size that can be read, and scroll sideways */
  body { padding: 1.2rem 0.9rem 3rem; }
  h1 { font-size: 1.6rem; }
  h2 { font-size: 1.3rem; }
  th, td { padding: 0.3rem 0.5rem; font-size: 0.9rem; }
  table:not(.facts) tbody th { min-width: 8.5rem; }
  caption span { display: block; position: sticky; left: 0; max-width: calc(100vw - 1.8rem); }
  figure svg { min-width: 34rem; }
}
"""


def html(title: str, facts: Sequence[tuple[str, str]], chapters: Sequence[Chapter], about: Sequence[str] = ()) -> str:
    """One page that needs no other file and no network.

    Args:
        title: of the page. facts: pairs of name and value. chapters: in order. about: paragraphs on top.

    Returns:
        An HTML document.
    """
    anchors: dict[str, int] = {}
    contents, body = [], []
    for chapter in chapters:
        anchor, links = _anchor(chapter.title, anchors), []
        body.append(f'<h2 id="{anchor}">{escape(chapter.title)}</h2>')
        if chapter.about:
            body.append(f'<p class="about">{escape(chapter.about)}</p>')
        entry = f'<li><a href="#{anchor}">{escape(chapter.title)}</a>'
        for section in chapter.sections:
            anchor = _anchor(section.title, anchors)
            links.append(f'<a href="#{anchor}">{escape(section.title)}</a>')
            body.append(f'<section>\n<h3 id="{anchor}">{escape(section.title)}</h3>')
            body.extend(_block(block) for block in section.blocks)
            body.append("</section>")
        contents.append(f'{entry}<br><span class="sections">{" · ".join(links)}</span></li>')
    known = "\n".join(f'<tr><th scope="row">{escape(n)}</th><td>{escape(v)}</td></tr>' for n, v in facts)
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f"<header>\n<h1>{escape(title)}</h1>",
            *(f"<p>{escape(paragraph)}</p>" for paragraph in about),
            f'<nav aria-label="Contents"><ol>{"".join(contents)}</ol></nav>',
            f'<div class="scroll"><table class="facts"><tbody>\n{known}\n</tbody></table></div>\n</header>\n<main>',
            *body,
            "</main>\n</body>\n</html>\n",
        ]
    )


def write(
    path: Path,
    title: str,
    facts: Sequence[tuple[str, str]],
    chapters: Sequence[Chapter],
    about: Sequence[str] = (),
) -> None:
    """Write ``html(title, facts, chapters, about)`` to ``path`` in UTF-8."""
    path.write_text(html(title, facts, chapters, about), encoding="utf-8")


def _anchor(title: str, used: dict[str, int]) -> str:
    """An id for a heading: its letters and digits, numbered from the second use on."""
    word = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
    used[word] = used.get(word, 0) + 1
    return word if used[word] == 1 else f"{word}-{used[word]}"


def _row(marks: Sequence[str], cells: Sequence[str]) -> str:
    rest = "".join(f"<td{m}>{escape(cell)}</td>" for m, cell in zip(marks[1:], cells[1:], strict=True))
    return f'<tr><th scope="row"{marks[0]}>{escape(cells[0])}</th>{rest}</tr>'


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    caption = escape(block.caption)
    if isinstance(block, Table):
        marks = [' class="number"' if numeric else "" for numeric in block.numeric()]
        head = "".join(f'<th scope="col"{m}>{escape(cell)}</th>' for m, cell in zip(marks, block.head, strict=True))
        rows = "\n".join(_row(marks, row) for row in block.rows)
        caption = f"<caption><span>{caption}</span></caption>" if caption else ""
        table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"
        return f'<div class="scroll">{table}</div>'
    caption = f"<figcaption>{caption}</figcaption>" if caption else ""
    if isinstance(block, Picture):
        picture = f'<div class="scroll" role="img" aria-label="{escape(block.alt)}">{block.svg}</div>'
        return f"<figure>{picture}{caption}</figure>"
    return f"<figure><pre>{escape(block.text)}</pre>{caption}</figure>"
