"""Damage with a fixed seed, and the one thing asked of its readers: success or one clear line.

``bytes_of`` damages raw bytes, ``json_of`` the values of a JSON file, so that a reader is tried
both by noise and by files that are well-formed and wrong.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator

from dsv3.errors import DSV3Error

# What a field may hold that nobody meant: other types, edges, and things that break printers.
ODD = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**32,
    2**63,
    10**400,
    -0.5,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x1b[2J",
    "\ud800",
    "a\nb",
    "../x",
    "x" * 5000,
    [],
    {},
    [[]],
    [None],
    {"": None},
    [1, 2, 3],
    ["a", "b"],
    {"a": {"b": []}},
)
# A number of more digits than Python turns into an int, and a nest that is too deep.
RAW = ("9" * 5000, "[" * 20_000 + "]" * 20_000)


def bytes_of(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """``count`` damaged copies: bytes changed, cut out, doubled, or the end cut off."""
    choose = random.Random(seed)
    for _ in range(count):
        out = bytearray(data)
        for _ in range(choose.choice((1, 1, 2, 5))):
            at, kind = choose.randrange(len(out) + 1), choose.randrange(5)
            piece = choose.randrange(1, 40)
            if kind == 0 and out:
                out[at % len(out)] = choose.choice((choose.randrange(256), *b'"{}[],:0-\\'))
            elif kind == 1:
                del out[at : at + piece]
            elif kind == 2:
                out[at:at] = out[at : at + piece]
            elif kind == 3:
                out[at:at] = choose.randbytes(piece)
            else:
                del out[at:]
        yield bytes(out)


def json_of(value: object, count: int, seed: int) -> Iterator[str]:
    """``count`` texts of JSON, each with one to three values replaced, removed or renamed."""
    choose = random.Random(seed)
    for _ in range(count):
        root = [copy.deepcopy(value)]
        raw = None
        for _ in range(choose.choice((1, 1, 1, 2, 3))):
            holder, key = choose.choice(list(_places(root)))
            kind = choose.randrange(10)
            if kind < 7:
                holder[key] = copy.deepcopy(choose.choice(ODD))
            elif kind == 7:
                holder[key], raw = "@raw@", choose.choice(RAW)
            elif holder is not root and isinstance(holder, dict):
                moved = holder.pop(key)
                if kind == 8:
                    holder[key + choose.choice(("x", "\x1b[31m", "x" * 300))] = moved
        text = json.dumps(root[0])
        yield text if raw is None else text.replace('"@raw@"', raw)


def _places(value) -> Iterator[tuple]:
    """All (holder, key) of a nest of lists and dicts."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def survives(call: Callable[[], object]) -> str | None:
    """Call; None when it went well, the line when it was refused. All else fails the test."""
    try:
        call()
    except DSV3Error as error:
        line = str(error)
        assert line.isprintable() and len(line) < 2500, line
        line.encode("utf-8")
        return line
    return None
