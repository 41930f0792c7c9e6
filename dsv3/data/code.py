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
"""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from pathlib import Path

from dsv3.data.vocabulary import BOS, EOS
from dsv3.errors import DSV3Error

# In every Python from 3.11 to 3.14, of many kinds, and none the near-copy of another module.
HELD_OUT_MODULES = (
    "calendar", "cmd", "colorsys", "configparser", "csv", "difflib", "fractions", "ftplib",
    "graphlib", "heapq", "sched", "shelve", "shlex", "textwrap", "timeit", "wsgiref", "zipapp")

_LEFT_OUT = {"test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "__phello__",
             "__pycache__"}
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
                    modules[".".join(parts)] = clean_code(
                        (Path(place) / file).read_text(encoding="utf-8"))
                except (UnicodeDecodeError, SyntaxError, ValueError):
                    continue
    if not modules:
        raise DSV3Error("no modules", where=folder, expected="Python files (*.py)")
    return dict(sorted(modules.items()))


def clean_code(text: str) -> str:
    """A module without trailing blanks and form feeds; SyntaxError where it does not parse."""
    lines = text.removeprefix("\ufeff").replace("\f", "").replace("\r\n", "\n").split("\n")
    text = "\n".join(line.rstrip() for line in lines).strip("\n") + "\n"
    _parse(text)
    return text


def split_modules(modules: dict[str, str]) -> tuple[list[str], list[str]]:
    """Texts to train on and texts held out, whole top-level modules or packages each."""
    parts: tuple[list[str], list[str]] = ([], [])
    for name, text in modules.items():
        parts[name.split(".")[0] in HELD_OUT_MODULES].append(text)
    if not all(parts):
        raise DSV3Error("nothing to train on" if parts[1] else "no held-out module",
                        where="code", expected="held out: " + ", ".join(HELD_OUT_MODULES))
    return parts


def pieces(module: str) -> list[str]:
    """The top-level pieces of a module in order, each of which parses on its own.

    Comments and decorators directly above a definition belong to it. A piece that is a long table
    is left out.
    """
    lines = module.split("\n")
    body = _parse(module).body
    cuts = [0]
    for before, node in zip([None, *body], body):
        start = _first_line(node, lines)
        defines = isinstance(node, _DEFINITION)
        after_definition = isinstance(before, _DEFINITION)
        short = not after_definition and len("\n".join(lines[cuts[-1]:start])) < _SHORT
        if (defines and not short) or after_definition:
            cuts.append(max(start, cuts[-1]))
    result = []
    for start, end in zip(cuts, [*cuts[1:], len(lines)]):
        text = "\n".join(lines[start:end]).strip("\n") + "\n"
        result += _class_pieces(text) if len(text.encode()) > _LONG_CLASS else [text]
    return [text for text in result if text.strip() and _parses(text) and not _is_table(text)]


def code_documents(modules: list[str]) -> list[str]:
    """All pieces of all modules, in order, between begin and end token."""
    return [BOS + piece + EOS for module in modules for piece in pieces(module)]


def _class_pieces(text: str) -> list[str]:
    """A long class as several, cut before methods; anything else as it is."""
    nodes = _parse(text).body
    if not nodes or not isinstance(nodes[-1], ast.ClassDef):
        return [text]
    node, lines = nodes[-1], text.split("\n")
    starts = [_first_line(child, lines) for child in node.body]
    if starts[0] < node.lineno:                    # the body stands on the line of the class
        return [text]
    head = lines[node.lineno - 1:starts[0]]
    while head[-1].strip() == "" or head[-1].lstrip().startswith("#"):
        head.pop()
    result, begin = [], 0
    for start, child in zip(starts[1:], node.body[1:]):
        size = len("\n".join(lines[begin:child.end_lineno]).encode())
        if isinstance(child, _DEFINITION) and size > _PIECE and start > starts[0]:
            result.append(lines[begin:start])
            begin = start
    result.append(lines[begin:])
    whole = [result[0], *(head + part for part in result[1:])]
    return ["\n".join(part).strip("\n") + "\n" for part in whole]


def _first_line(node: ast.stmt, lines: list[str]) -> int:
    """Index of the line where a statement begins, with its decorators and comments above."""
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    indent = " " * node.col_offset + "#"
    while start > 0 and lines[start - 1].startswith(indent):
        start -= 1
    return start


def _is_table(text: str) -> bool:
    if len(text) <= _TABLE or any(isinstance(node, _DEFINITION) for node in _parse(text).body):
        return False
    return sum(letter.isalpha() for letter in text) < 0.65 * len(text)


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")            # old escapes in strings
        return ast.parse(text)


def _parses(text: str) -> bool:
    try:
        _parse(text)
    except (SyntaxError, ValueError):
        return False
    return True
