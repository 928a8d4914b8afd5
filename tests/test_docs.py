"""The documentation says what is so: blocks run, commands and names exist, tables are of rows, messages of the code."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import json
import re
import zlib
from pathlib import Path

import pytest

import fastseq
from docs import names, notebook, plots, tables
from tests import documents

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
PARTS = [part for page in PAGES for part in documents.parts(page)]
MARK = re.compile(r"<!-- ((?:rows|bench):[\w-]+|paper) -->.*?<!-- /\1 -->", re.S)


@functools.cache
def text(page: Path) -> str:
    return page.read_text()


def short(page: Path) -> str:
    return str(page.relative_to(ROOT / "docs"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, documents.Outcome]:
    return documents.outcomes(PAGES, tmp_path_factory.mktemp("pages"))


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_blocks_run(part: documents.Part, outcomes: dict[str, documents.Outcome]) -> None:
    status, said = outcomes[part.name]
    assert status == 0, said
    assert "Warning" not in said


def test_every_block_is_of_a_known_kind() -> None:
    found = {block[1] for page in PAGES for block in documents.FENCE.finditer(text(page))}
    assert found <= {*documents.RUNS, "console", "text"}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    console = "\n".join(block[2] for block in documents.FENCE.finditer(text(page)) if block[1] == "console")
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^#.*$", "", text(page), flags=re.M))
    said = "\n".join([console, *spans])
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.M))
    targets = {name for line in targets for name in line.split()}
    extras = re.search(r"optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S)
    assert extras is not None
    missing = [f"make {name}" for name in re.findall(r"^(?:\$ )?make ([a-z][\w-]*)", said, re.M) if name not in targets]
    for module in re.findall(r"python -m ([\w.]+)", said):
        if importlib.util.find_spec(module) is None:
            missing.append(module)
    for name in re.findall(r"^(?:\$ )?fastseq ([a-z]+)", said, re.M):
        if f'"{name}"' not in (ROOT / "fastseq" / "cli.py").read_text():
            missing.append(f"fastseq {name}")
    for name in re.findall(r"examples/\w+\.\w+", said):
        if not (ROOT / name).exists():
            missing.append(name)
    for listed in re.findall(r"pip install [^\n]*\[([\w,]+)\]", said):
        missing += [name for name in listed.split(",") if not re.search(rf"^{name} = ", extras[1], re.M)]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_names_exist(page: Path) -> None:
    """``fastseq.a.b`` in the text, and files that it names."""
    for name in sorted(set(re.findall(r"`(fastseq(?:\.\w+)+)", text(page)))):
        if name.endswith((".h", ".so")):
            continue
        found = importlib.import_module("fastseq")
        for attribute in name.split(".")[1:]:
            assert hasattr(found, attribute), name
            found = getattr(found, attribute)
    for name in set(re.findall(r"`((?:fastseq|kernels|csrc|tests|benchmarks|docs|examples)/[\w/.]+)`", text(page))):
        built = name == "build/docs"
        assert built or (ROOT / name).exists() or list(ROOT.glob(f"{name}*")), name


@pytest.mark.parametrize("module", names.MODULES)
def test_names_say_what_they_are(module: str) -> None:
    """And stand on a page, which is made of these texts."""
    named = names.public(f"fastseq.{module}")
    found = importlib.import_module(f"fastseq.{module}")
    undocumented = (str, tuple, type(list[int]), type(int | str), dict)  # a name for a type says no more
    silent = [name for name in named if not isinstance(vars(found).get(name), undocumented)]
    silent = [name for name in silent if not (inspect.getdoc(getattr(found, name)) or "").strip()]
    assert named and silent == []
    assert any(f".. automodule:: fastseq.{module}\n" in text(page) for page in (ROOT / "docs" / "api").glob("*.md"))


@pytest.mark.parametrize("kind", [fastseq.deploy.Model, fastseq.deploy.Stream])
def test_what_is_compiled_says_what_it_does(kind: type) -> None:
    for name, member in vars(kind).items():
        if not name.startswith("_"):
            said = (getattr(kind, name).__doc__ or member.__doc__).split("\n\n")  # of functions the signature first
            assert said[-1].strip() and (isinstance(member, property) or len(said) > 1), name


def test_all_modules_of_users_have_a_page_of_names() -> None:
    public = {name for name in fastseq._MODULES if names.public(f"fastseq.{name}")}
    assert public == set(names.MODULES)
    members = re.search(r"automodule:: fastseq\n   :members: (.*)", text(ROOT / "docs" / "api" / "fastseq.md"))
    assert members and members[1].split(", ") == sorted(fastseq._NAMES)


@pytest.mark.nightly
def test_the_pages_of_names_have_them_all() -> None:
    """As ``make docs`` has built them."""
    inventory = (ROOT / "build" / "docs" / "objects.inv").read_bytes().split(b"zlib.\n")[1]
    built = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines() if " py:" in line}
    wanted = {f"fastseq.{name}" for name in fastseq._NAMES}
    for module in [*(f"fastseq.{name}" for name in names.MODULES), "fastseq.recipes.attacks"]:
        for name in set(names.public(module)) - fastseq._NAMES.keys():
            thing = getattr(importlib.import_module(module), name)
            once = f"{module}.{name}" in built or not inspect.isclass(thing)  # a class of two modules stands at one
            if inspect.isclass(thing) or inspect.isroutine(thing):
                wanted.add(f"{module}.{name}" if once else f"{thing.__module__}.{thing.__qualname__}")
    assert wanted - built == set()


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", documents.FENCE.sub("", text(page))):
        if target.endswith(".svg"):
            assert Path(target).stem in plots.PLOTS, target
        else:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_tables_are_of_the_rows(page: Path) -> None:
    for name, written in tables.marks(text(page)):
        assert written == tables.block(name), f"{name}: run python -m docs.tables"


def test_every_table_and_plot_is_shown() -> None:
    names = [name for page in tables.pages() for name, _ in tables.marks(text(page))]
    assert sorted(names) == sorted(tables.PIECES)
    shown = [Path(target).stem for page in PAGES for target in re.findall(r"\]\((\S+\.svg)\)", text(page))]
    assert sorted(shown) == sorted(plots.PLOTS)


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs" / "papers").glob("*.md")), ROOT / "docs" / "performance.md"], ids=short
)
def test_no_figure_is_typed(page: Path) -> None:
    """Prose gives no decimals and no percentages: they stand in tables that are drawn from rows, or in code."""
    prose = MARK.sub("", text(page))
    for kept in (r"^```.*?^```$", r"\$\$.*?\$\$", r"\$[^$\n]+\$", r"`[^`]+`", r"\]\([^)]*\)", r"arXiv\s+\d+\.\d+"):
        prose = re.sub(kept, "", prose, flags=re.S | re.M)
    assert re.findall(r"\d+\.\d+|\d ?%", prose) == []


def test_what_was_measured_before_its_commit_says_so() -> None:
    found = [{"commit": "ab", "clean": True}, {"commit": "cd", "clean": False}]
    assert [tables.commit(row) for row in found] == ["`ab`", "`cd` with changes"]


def test_plots_are_drawn(tmp_path: Path) -> None:
    for path in plots.draw(tmp_path):
        svg = path.read_text()
        assert svg.startswith("<?xml") and svg.count("<path") + svg.count("<use") > 10, path.name


def _literal(node: ast.expr) -> str:
    """The text of an expression, with … for what is known only at run time."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[-\d.]*[a-z]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_literal(value) for value in node.values)
    return "…"


@functools.cache
def literals() -> str:
    """All texts in the code, a line each."""
    sources = [ROOT / "setup.py", *sorted((ROOT / "fastseq").rglob("*.py"))]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    found = [_literal(node) for node in nodes if isinstance(node, (ast.Constant, ast.JoinedStr))]
    for path in sorted((ROOT / "csrc").rglob("*.cpp")):
        found += [
            re.sub(r"%[-\d.]*[a-z]", "…", quoted) for quoted in re.findall(r'"((?:[^"\\\n]|\\.)*)"', path.read_text())
        ]
    return "\n".join([*found, re.sub(r"\$\$?\(?\w+\)?", "…", (ROOT / "Makefile").read_text())])


MESSAGES = re.findall(r"^### `(.*)`$", text(ROOT / "docs" / "troubleshooting.md"), re.M)


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_of_the_code(message: str) -> None:
    fragments = [part.strip() for part in message.split("…")]
    assert any(len(part) >= 12 for part in fragments), "too short to be told from others"
    for part in fragments:
        assert part in literals(), part


def test_the_notebook_is_the_page() -> None:
    written = notebook.NOTEBOOK.read_text()
    assert written == notebook.notebook(notebook.PAGE.read_text()), "run python -m docs.notebook"
    cells = json.loads(written)["cells"]
    assert sum(cell["cell_type"] == "code" for cell in cells) == notebook.PAGE.read_text().count("```python")


def test_the_notebook_runs(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: it comes with the extra 'docs'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: it comes with the extra 'docs'")
    import nbformat

    content = nbformat.read(notebook.NOTEBOOK, as_version=4)
    done = nbclient.NotebookClient(content, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", []))
    assert float(re.search(r"accuracy (0\.\d+)", printed)[1]) > 0.85  # type: ignore[index]
    assert "as with torch: 0.0e+00" in printed
