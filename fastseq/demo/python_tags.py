"""Python's own standard library as data: its tokens, tagged in four ways, exactly, by ``tokenize`` and ``ast``."""

from __future__ import annotations

import ast
import bisect
import functools
import io
import keyword
import random
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

T = 32  # tokens of a window
SYMBOLS = 800  # the most frequent token texts have a number of their own; all others share 0
NONE = -100  # the label of a token that a task says nothing of, as torch's cross-entropy has it

TASKS = ("token type", "operator class", "context", "name role")
TAGS = {
    "token type": ("name", "keyword", "operator", "integer", "other number", "text", "bytes", "layout"),
    "operator class": ("open", "close", "separator", "assign", "arithmetic", "compare", "flow", "definition", "word"),
    "context": ("module", "class", "function", "signature", "call", "subscript", "collection", "comprehension"),
    "name role": (
        "function",
        "class",
        "parameter",
        "keyword argument",
        "called",
        "method",
        "attribute",
        "stored",
        "loaded",
    ),
}

_LAYOUT = {tokenize.NEWLINE: "\n", tokenize.INDENT: "<indent>", tokenize.DEDENT: "<dedent>"}
_SKIPPED = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)
_OPERATORS = {
    **dict.fromkeys("([{", "open"),
    **dict.fromkeys(")]}", "close"),
    **dict.fromkeys((",", ":", ";", ".", "->", "..."), "separator"),
    **dict.fromkeys(("=", ":=", "+=", "-=", "*=", "/=", "//=", "%=", "|=", "&=", "^=", ">>=", "<<=", "**="), "assign"),
    **dict.fromkeys(("==", "!=", "<", ">", "<=", ">=", "in", "is", "not", "and", "or"), "compare"),
    **dict.fromkeys(("if", "elif", "else", "for", "while", "return", "yield", "raise", "try", "except"), "flow"),
    **dict.fromkeys(("finally", "break", "continue", "pass", "with", "assert"), "flow"),
    **dict.fromkeys(("def", "class", "lambda", "import", "from", "as", "global", "nonlocal", "async"), "definition"),
}

Position = tuple[int, int]  # line, and bytes into it: files are ASCII, so they are characters too


class Windows(NamedTuple):
    """Of consecutive tokens: numbers of their texts [N, T], and labels [N, T] of each task, NONE where it has none."""

    x: Tensor
    labels: dict[str, Tensor]


class Corpus(NamedTuple):
    """Files of the one part are not in the other."""

    training: Windows
    test: Windows


class _Token(NamedTuple):
    text: str
    tags: tuple[int, ...]  # of TASKS


@functools.cache
def corpus(files: int, windows: int, tests: int) -> Corpus:
    """Windows of the standard library that this Python has, drawn the same way each time.

    Args:
        files: at most so many of its modules are read. windows, tests: at most so many windows for training, and for
            the test from a quarter of the files.
    """
    found = [tagged(text) for text in _sources(files)]
    counts = Counter(token.text for file in found for token in file)
    number = {text: n + 1 for n, (text, _) in enumerate(counts.most_common(SYMBOLS - 1))}
    for_tests = len(found) // 4
    return Corpus(_windows(found[for_tests:], windows, number), _windows(found[:for_tests], tests, number))


def tagged(text: str) -> list[_Token]:
    """The tokens of a module and their tags in the order of TASKS, NONE where a task says nothing."""
    tree = ast.parse(text)
    roles = dict(_roles(tree))
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in _SKIPPED]
    contexts = _contexts(tree, [t.start for t in tokens])
    found = []
    before = ""
    for token, context in zip(tokens, contexts, strict=True):
        role = roles.get(token.start) if token.type == tokenize.NAME else None
        if before in ("def", "class"):
            role = "function" if before == "def" else "class"
        tags = (_type(token), _operator(token), context, role)
        numbers = (NONE if tag is None else TAGS[task].index(tag) for task, tag in zip(TASKS, tags, strict=True))
        found.append(_Token(_LAYOUT.get(token.type, token.string), tuple(numbers)))
        before = token.string
    return found


def _sources(files: int) -> Iterator[str]:
    """Of modules in ASCII, in a random order that is always the same."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(paths)
    for path in paths:
        text = path.read_bytes()
        if files and text.isascii() and len(text) > 2000:
            files -= 1
            yield text.decode()


def _windows(files: list[list[_Token]], count: int, number: dict[str, int]) -> Windows:
    starts = [(file, start) for file in files for start in range(0, len(file) - T + 1, T)]
    random.Random(0).shuffle(starts)
    parts = [file[start : start + T] for file, start in starts[:count]]
    x = torch.tensor([[number.get(token.text, 0) for token in part] for part in parts])
    tags = torch.tensor([[token.tags for token in part] for part in parts])
    return Windows(x, {task: tags[:, :, n].contiguous() for n, task in enumerate(TASKS)})


def _type(token: tokenize.TokenInfo) -> str:
    if token.type in _LAYOUT:
        return "layout"
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "name"
    if token.type == tokenize.NUMBER:
        return "integer" if token.string.isdigit() else "other number"
    if token.type == tokenize.OP:
        return "operator"
    return "bytes" if token.type == tokenize.STRING and "b" in token.string[:2].lower() else "text"


def _operator(token: tokenize.TokenInfo) -> str | None:
    if token.type == tokenize.OP:
        return _OPERATORS.get(token.string, "arithmetic")
    if token.type == tokenize.NAME and keyword.iskeyword(token.string):
        return _OPERATORS.get(token.string, "word")
    return None


def _walk(tree: ast.AST) -> Iterator[ast.AST]:
    """What is outside before what is inside; nothing of an f-string, whose parts have no exact place in old Pythons."""
    nodes = [tree]
    while nodes:
        yield from nodes
        nodes = [c for node in nodes if not isinstance(node, ast.JoinedStr) for c in ast.iter_child_nodes(node)]


def _roles(tree: ast.AST) -> Iterator[tuple[Position, str]]:
    """Where a name stands and what it does there."""
    calls = {id(node.func) for node in _walk(tree) if isinstance(node, ast.Call)}
    for node in _walk(tree):
        if isinstance(node, ast.arg):
            yield (node.lineno, node.col_offset), "parameter"
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield (node.lineno, node.col_offset), "keyword argument"
        elif isinstance(node, ast.Attribute):
            place = node.end_lineno or 0, (node.end_col_offset or 0) - len(node.attr)
            yield place, "method" if id(node) in calls else "attribute"
        elif isinstance(node, ast.Name):
            role = "called" if id(node) in calls else "loaded" if isinstance(node.ctx, ast.Load) else "stored"
            yield (node.lineno, node.col_offset), role


def _contexts(tree: ast.AST, starts: list[Position]) -> list[str]:
    """The innermost construct that each token is in."""
    found = ["module"] * len(starts)
    for node in _walk(tree):
        for begin, end, context in _spans(node):
            first, last = bisect.bisect_left(starts, begin), bisect.bisect_left(starts, end)
            found[first:last] = [context] * (last - first)
    return found


def _spans(node: ast.AST) -> Iterator[tuple[Position, Position, str]]:
    if isinstance(node, ast.ClassDef):
        yield (*_span(node), "class")
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        begin, end = _span(node)
        yield begin, _span(node.body[0])[0], "signature"
        yield _span(node.body[0])[0], end, "function"
    elif isinstance(node, ast.Call):
        yield _span(node.func)[1], _span(node)[1], "call"
    elif isinstance(node, ast.Subscript):
        yield _span(node.value)[1], _span(node)[1], "subscript"
    elif isinstance(node, ast.List | ast.Tuple | ast.Dict | ast.Set):
        yield (*_span(node), "collection")
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        yield (*_span(node), "comprehension")


def _span(node: ast.expr | ast.stmt) -> tuple[Position, Position]:
    return (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)
