"""Sphinx: Markdown by MyST, formulas as MathML, plots drawn from the rows when a build begins."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from docutils import nodes  # noqa: E402
from latex2mathml.converter import convert  # noqa: E402

import fastseq  # noqa: E402
from docs import names, plots  # noqa: E402

project = "fastseq"
author = "the authors of fastseq"
release = version = fastseq.__version__
extensions = ["myst_parser", "sphinx_copybutton", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
add_module_names = False
autodoc_inherit_docstrings = False  # torch's own, of the methods that take their place, say too little
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autosummary_generate = False
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # the signature has it
smartquotes_action = "De"  # dashes and dots; quotes in docstrings are those of code
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["plots"]
html_theme = "furo"
html_title = f"fastseq {release}"
html_static_path = ["style"]
html_css_files = ["fastseq.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
FUNCTION = re.compile(r"(<mi>(?:log|exp|tanh)</mi>)(?=<m[ins])")  # without brackets around what it is of


def _renderer(display: str) -> Any:
    """Browsers draw MathML themselves: a page needs no script and no network for its formulas."""

    def visit(translator: Any, node: nodes.Element) -> None:
        mathml = convert(node.astext(), display=display)
        translator.body.append(FUNCTION.sub(r'\1<mspace width="0.17em"/>', mathml))
        raise nodes.SkipNode

    return visit, None


def _wrap_sentences(app: Any, page: nodes.document) -> None:
    """Tables of figures keep their columns; where a cell holds a sentence, lines wrap."""
    for table in page.findall(nodes.table):
        if max(len(cell.astext()) for cell in table.findall(nodes.entry)) > 60:
            table["classes"].append("prose")


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", _renderer("inline"), _renderer("block"))
    app.connect("autodoc-process-docstring", names.complete)
    app.connect("autodoc-process-signature", names.shortened)
    app.connect("autodoc-skip-member", names.skip)
    app.connect("doctree-read", _wrap_sentences)
    app.connect("builder-inited", lambda _: plots.draw(Path(__file__).parent / "plots"))
