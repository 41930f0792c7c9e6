"""A process that renders chat templates, and does nothing else.

``dsv3.generation.template`` starts this file by its path, in a bare Python, and speaks with it over
pipes: one JSON object a line in, one out. It is not imported by the package.

A template is a program from elsewhere. Jinja's sandbox keeps it from files and from Python's
internals; it does not keep it from ``2 ** 99999999999`` or from three nested loops of 100,000
steps. Those are stopped here, by limits that the operating system sets on this process and that
need nobody's attention: seconds of processor time for one rendering, and memory. What a rendering
may reach is Jinja, the standard library and the variables it was sent, as a copy.

The dialect is that of transformers, where chat templates are written: blocks leave no blank lines,
``tojson`` does not escape for web pages, ``break`` and ``continue`` exist, ``{% generation %}``
marks what the model says (for training; here it changes nothing), and four helpers are there.
"""

import json
import sys

# Command line: seconds, bytes of memory, then folders in which jinja2 and markupsafe lie.
SECONDS, MEMORY, *FOLDERS = sys.argv[1:]
sys.path += FOLDERS

import resource  # noqa: E402
import signal  # noqa: E402
from contextlib import suppress  # noqa: E402
from datetime import datetime  # noqa: E402
from functools import lru_cache  # noqa: E402
from typing import Any, ClassVar  # noqa: E402

import jinja2  # noqa: E402
import jinja2.ext  # noqa: E402
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError  # noqa: E402

# Characters of a rendered conversation; the longest context of the family is under a tenth.
MOST = 16 << 20


class Refused(jinja2.TemplateError):
    """What a template says with ``raise_exception``: its own judgement on the messages."""


class Generation(jinja2.ext.Extension):
    """``{% generation %}text{% endgeneration %}``: the text, in a scope of its own."""

    tags: ClassVar = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller):
        return caller()


class MakeDict:
    """``dict(...)`` and ``dict.fromkeys(...)``, without the rest of Python's type."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs):
        return dict.fromkeys(*args, **kwargs)


class Namespace(jinja2.utils.Namespace):
    """``namespace(...)`` without names that begin with an underscore: Python's internals do."""

    def __init__(*args, **kwargs):  # so that a template may call a field "self"
        self, *values = args
        fields = dict(*values, **kwargs)
        for name in fields:
            Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, fields)

    def __setitem__(self, name, value):
        Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name):
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace has no field {name!r}")


def sandbox() -> ImmutableSandboxedEnvironment:
    def raise_exception(message):
        raise Refused(str(message))

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    more: dict[str, Any] = {
        "raise_exception": raise_exception,
        "dict": MakeDict(),
        "namespace": Namespace,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    made.globals |= more
    return made


def line_of(error: BaseException) -> int | None:
    """The line of the template where an error arose, if it did there."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def answer(compiled, request: dict) -> dict:
    """{"text": ...}, or {"kind": ..., "error": ..., "line": ...}; compiled: text -> template.

    kind: "template" (it fails for plain conversations too), "refused" (by its own words),
    "sandbox", "render" (it met a value it could not handle), "memory", "size".
    """
    try:
        template = compiled(request["template"])
    except Exception as error:
        kind = "memory" if isinstance(error, MemoryError) else "template"
        return {"kind": kind, "error": told(error), "line": line_of(error)}
    try:
        text = template.render(request["variables"])
    except Refused as error:
        return {"kind": "refused", "error": str(error)[:1000]}
    except Exception as error:
        kind = (
            "memory"
            if isinstance(error, MemoryError)
            else "sandbox"
            if isinstance(error, SecurityError)
            # A filter or test that does not exist, in a branch that was taken.
            else "template"
            if not renders(template, request["variables"])
            else "render"
        )
        return {"kind": kind, "error": told(error), "line": line_of(error)}
    if len(text) > MOST:
        return {"kind": "size", "error": f"{len(text)} characters", "line": None}
    return {"text": text}


def renders(template, variables: dict) -> bool:
    """Whether a template does for any of some plain conversations, as every chat model has them.

    Where it does for none, the messages it was given are not at fault. A refusal in the template's
    own words is no failure.
    """
    roles = ("system", "user", "assistant", "user")
    for part in (roles[1:2], roles[:2], roles):
        talk = [{"role": role, "content": "Hello"} for role in part]
        try:
            template.render({**variables, "messages": talk, "tools": None, "documents": None})
        except Refused:
            return True
        except Exception:
            continue
        return True
    return False


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def limit_seconds(seconds: float) -> None:
    """From now, the kernel ends this process after so much processor time; 0 for no limit."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def lower(kind: int, value: int) -> None:
    """Set a limit, where the system has it and the one in force is not lower already."""
    hard = resource.getrlimit(kind)[1]
    if hard == resource.RLIM_INFINITY or hard > value:
        # macOS knows the names of limits that it does not set.
        with suppress(OSError, ValueError):
            resource.setrlimit(kind, (value, value))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    lower(resource.RLIMIT_AS, int(MEMORY))
    lower(resource.RLIMIT_CORE, 0)
    compiled = lru_cache(4)(sandbox().from_string)
    for line in sys.stdin.buffer:  # ends when the parent closes the pipe, or is gone
        limit_seconds(float(SECONDS))
        try:
            reply = json.dumps(answer(compiled, json.loads(line)))
        except (MemoryError, RecursionError):
            reply = '{"kind": "memory", "error": "MemoryError", "line": null}'
        limit_seconds(0)
        sys.stdout.buffer.write(reply.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
