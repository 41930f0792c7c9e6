"""The second domain: Python, the standard library of the interpreter that runs.

Every reader has it, under a free licence, and it is good code. It is read as files. Left out are
tests, tables, files made by a program (one of them holds the paths of the machine that built the
interpreter), and what does not parse.

A document is one whole top-level piece of a module: a function, a class, or the docstring, imports
and constants between them. A model that reads windows of 256 tokens then sees where a function
begins and where it ends, and learns to end its own; whole modules would show it mostly middles.
A long class is cut at its methods, and each piece repeats the class line. So every document parses
on its own.

Whole modules are held out, as whole plays are.

``plain_functions`` gives the same code once more in its simplest form: each function and method by
itself, without docstring and comments, in the one style in which Python prints a syntax tree. Half
of a library's text is English between quotes; what is left when it is gone is the grammar, and a
small model has to see much of that to close what it has opened.
"""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from dsv3.data.vocabulary import BOS, EOS
from dsv3.errors import DSV3Error

# In every Python from 3.11 to 3.14, of many kinds, and none the near-copy of another module.
HELD_OUT_MODULES = (
    "calendar",
    "cmd",
    "colorsys",
    "configparser",
    "csv",
    "difflib",
    "fractions",
    "ftplib",
    "graphlib",
    "heapq",
    "sched",
    "shelve",
    "shlex",
    "textwrap",
    "timeit",
    "wsgiref",
    "zipapp",
)

_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "__phello__",
    "__pycache__",
}
# Bytes: a class above the first is cut into pieces of about the second; above the third, statements
# with few letters are a table; a run of statements below the last stays with what follows.
_LONG_CLASS, _PIECE, _TABLE, _SHORT = 4000, 2000, 6000, 200
_DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def read_modules(folder: str | Path | None = None) -> dict[str, str]:
    """Text by dotted module name, sorted; by default the running interpreter's library."""
    folder = Path(sysconfig.get_path("stdlib") if folder is None else folder)
    modules = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name.isidentifier() and name not in _LEFT_OUT]
        for file in files:
            if file.endswith(".py") and not file.startswith(("_sysconfigdata", "test_")):
                parts = (Path(place) / file).relative_to(folder).with_suffix("").parts
                try:
                    text = (Path(place) / file).read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue
                modules[".".join(parts)] = clean_code(text)
    if not modules:
        raise DSV3Error(
            "no modules" if folder.is_dir() else "no such folder",
            where=folder,
            expected="Python files (*.py)",
        )
    return dict(sorted(modules.items()))


def clean_code(text: str) -> str:
    """A module without trailing blanks, form feeds and the mark of its byte order."""
    lines = text.removeprefix("\ufeff").replace("\f", "").split("\n")
    return "\n".join(line.rstrip() for line in lines).strip("\n") + "\n"


def split_modules(modules: dict[str, str]) -> tuple[list[str], list[str]]:
    """Texts to train on and texts held out, whole top-level modules or packages each."""
    parts: tuple[list[str], list[str]] = ([], [])
    for name, text in modules.items():
        parts[name.split(".")[0] in HELD_OUT_MODULES].append(text)
    if not all(parts):
        raise DSV3Error(
            "nothing to train on" if parts[1] else "no held-out module",
            where="code",
            expected="held out: " + ", ".join(HELD_OUT_MODULES),
        )
    return parts


def pieces(module: str) -> list[str]:
    """The top-level pieces of a module in order, each of which parses on its own.

    A piece ends where its last statement ends; comments and decorators above the next definition
    belong to that. Long tables are left out, and so is a whole module that does not parse.
    """
    lines, body, cuts = module.split("\n"), _statements(module), [0]
    for before, node in pairwise(body or []):
        after_definition = isinstance(before, _DEFINITION)
        size = len("\n".join(lines[cuts[-1] : _end(before)]))
        starts_piece = after_definition or (isinstance(node, _DEFINITION) and size >= _SHORT)
        if starts_piece and node.lineno > _end(before):
            cuts.append(_end(before))
    result = []
    for start, end in pairwise([*cuts, len(lines)]):
        text = "\n".join(lines[start:end]).strip("\n") + "\n"
        result += _class_pieces(text) if len(text.encode()) > _LONG_CLASS else [text]
    return [text for text in result if _statements(text) and not _is_table(text)]


def code_documents(modules: list[str]) -> list[str]:
    """All pieces of all modules, in order, between begin and end token."""
    return [BOS + piece + EOS for module in modules for piece in pieces(module)]


def plain_functions(documents: list[str], longest: int = 1200) -> list[str]:
    """Functions and methods of code documents as documents, without docstrings and comments.

    longest: in characters; functions above it, and those of which nothing is left, are dropped.
    """
    texts = [_plain(node) for node in _functions(documents)]
    return [
        BOS + text + "\n" + EOS
        for text in texts
        if len(text) <= longest and not text.endswith(":\n    pass")
    ]


def described_functions(documents: Sequence[str], longest: int = 800) -> list[tuple[str, str, str]]:
    """(name, first sentence of the docstring, plain code) of functions that have both."""
    result = []
    for node in _functions(documents):
        said = (ast.get_docstring(node) or "").split("\n")[0].strip()
        if 16 <= len(said) <= 120 and said.endswith("."):
            code = _plain(node)
            if len(code) <= longest and not code.endswith(":\n    pass"):
                result.append((node.name, said, code))
    return result


def _functions(documents: Sequence[str]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions at the top of documents and methods of classes there."""
    for document in documents:
        for piece in _statements(document.removeprefix(BOS).removesuffix(EOS)) or []:
            for node in piece.body if isinstance(piece, ast.ClassDef) else [piece]:
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield node


def _plain(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The code of a function without its docstrings, which are taken out of the tree."""
    for inner in ast.walk(node):
        if isinstance(inner, _DEFINITION) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    return ast.unparse(node)


def _class_pieces(text: str) -> list[str]:
    """A long text that ends in a class as several, cut before methods; any other as it is."""
    last, lines = (_statements(text) or [None])[-1], text.split("\n")
    if not isinstance(last, ast.ClassDef) or last.body[0].lineno == last.lineno:
        return [text]
    first = last.body[0]
    above = [decorator.lineno for decorator in getattr(first, "decorator_list", [])]
    head = lines[last.lineno - 1 : min([first.lineno, *above]) - 1]
    while not head[-1].strip() or head[-1].lstrip().startswith("#"):
        head.pop()
    result, begin = [], 0
    for before, node in pairwise(last.body):
        size = len("\n".join(lines[begin : _end(node)]).encode())
        if isinstance(node, _DEFINITION) and size > _PIECE and node.lineno > _end(before):
            result.append("\n".join(lines[begin : _end(before)]).strip("\n") + "\n")
            begin = _end(before)
    result.append("\n".join(lines[begin:]).strip("\n") + "\n")
    return [result[0], *("\n".join(head) + "\n" + part for part in result[1:])]


def _is_table(text: str) -> bool:
    """Whether a long text, its definitions aside, has few letters."""
    if len(text) <= _TABLE:
        return False
    lines = text.split("\n")
    for statement in _statements(text) or []:
        for node in ast.walk(statement):
            if isinstance(node, _DEFINITION):
                lines[node.lineno - 1 : _end(node)] = [""] * (_end(node) - node.lineno + 1)
    rest = "\n".join(lines)
    return len(rest) > _TABLE and sum(letter.isalpha() for letter in rest) < 0.65 * len(rest)


def _statements(text: str) -> list[ast.stmt] | None:
    """The top-level statements; None where the text does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in strings
            return ast.parse(text).body
    except (SyntaxError, ValueError):
        return None


def _end(node: ast.stmt) -> int:
    """The last line of a statement that was read from a text."""
    assert node.end_lineno is not None
    return node.end_lineno
