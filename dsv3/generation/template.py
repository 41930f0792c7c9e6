"""The chat template: a program that came with the checkpoint.

It is a Jinja template which turns a list of messages into the exact text the model was trained
on: for DeepSeek-V3 ``bos + system + <｜User｜> + question + <｜Assistant｜> + answer + eos``. A
checkpoint is data from elsewhere, so its program runs in Jinja's sandbox, and in a process of its
own (``dsv3.generation.template_worker``) with limits of time and memory: it can read the messages
and nothing else, and the worst it can do is to be stopped.

A checkpoint may name several templates; "default" is meant, or "tool_use" where tools are given.
They are in tokenizer_config.json or, in newer checkpoints, in chat_template.jinja and the folder
additional_chat_templates.

When something is wrong, it matters where. A template with a mistake in it renders nothing for
anybody; one that refuses a conversation (two questions in a row, say) says so in its own words;
one that meets a message it did not expect fails somewhere in its middle. Each is reported in its
own way.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3.errors import DSV3Error

_WORKER = Path(__file__).with_name("template_worker.py")
_SECONDS = 5.0  # of processor time for one rendering; a long conversation takes hundredths
_MEMORY = 1 << 30  # bytes
# A worker that was stopped from outside uses no processor time, and no limit of its own ends it.
_PATIENCE = 60.0
_LEAST_JINJA = (3, 1, 6)  # earlier ones have published escapes from the sandbox

# kind of failure -> (what happened, the way out)
_TOLD = {
    "template": (
        "the chat template has a mistake in it",
        "The messages are not at fault: use the template of the original checkpoint",
    ),
    "refused": (
        "the chat template refuses these messages",
        "The words found are the template's own: check the order and the fields of the messages",
    ),
    "sandbox": (
        "the chat template reaches for what a template may not have",
        "Use the template of the original checkpoint",
    ),
    "render": (
        "the chat template cannot render these messages",
        "Check the order and the fields of the messages",
    ),
    "time": (
        "the chat template does not come to an end",
        "Use the template of the original checkpoint",
    ),
    "memory": (
        "the chat template needs too much memory",
        "Use the template of the original checkpoint",
    ),
    "size": (
        "the chat template makes too long a text",
        "Use the template of the original checkpoint",
    ),
    "ended": (
        "the process that renders the chat template has ended",
        "Use the template of the original checkpoint",
    ),
}


def choose(templates: Any, where: str, tools: bool = False) -> str | None:
    """The template that is meant, of the value of ``chat_template``: a text, or a list of
    {"name", "template"}; None when there is none."""
    if templates is None or isinstance(templates, str):
        return templates
    expected = "a text, or a list of objects with name and template"
    if not isinstance(templates, list):
        raise DSV3Error(
            "not a chat template",
            where=f"{where}: chat_template",
            found=type(templates).__name__,
            expected=expected,
        )
    named = {}
    for entry in templates:
        pair = [entry.get(key) for key in ("name", "template")] if isinstance(entry, dict) else []
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DSV3Error(
                "not a list of chat templates",
                where=f"{where}: chat_template",
                found=f"{type(entry).__name__} in the list",
                expected=expected,
            )
        named[pair[0]] = pair[1]
    return named.get("tool_use" if tools and "tool_use" in named else "default")


class Renderer:
    """Renders templates in a process beside this one, which is started when first needed and
    ends with this object. Safe to use from several threads."""

    def __init__(self, seconds: float = _SECONDS, memory: int = _MEMORY):
        """seconds: processor time of one rendering; memory: bytes of the process."""
        self.seconds, self.memory = seconds, memory
        self._process: subprocess.Popen | None = None
        self._owner = 0  # who started it: a fork of that process must not share its pipes
        self._lock = threading.Lock()

    def __reduce__(self):
        """A copy, or one sent to another process, starts a worker of its own."""
        return Renderer, (self.seconds, self.memory)

    def render(self, template: str, variables: Mapping[str, Any], where: str) -> str:
        """The text. Raises DSV3Error, naming ``where`` and the line of the template."""
        try:
            request = json.dumps({"template": template, "variables": variables}, default=_plain)
        except (ValueError, TypeError, RecursionError) as error:
            raise DSV3Error(
                "not something a chat template can read", where="messages", found=error
            ) from None
        with self._lock:
            reply = self._ask(request.encode() + b"\n")
        if "text" in reply:
            return reply["text"]
        what, fix = _TOLD[reply["kind"]]
        line = f":{reply['line']}" if reply.get("line") else ""
        raise DSV3Error(what, where=f"{where}: chat_template{line}", found=reply["error"], fix=fix)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._finalizer()
            self._process = None

    def _ask(self, request: bytes) -> dict[str, Any]:
        if self._process is None or self._owner != os.getpid():
            self._start()
        process, data = self._process, bytearray()
        end = time.monotonic() + _PATIENCE
        try:
            waiting = memoryview(request)
            while not data.endswith(b"\n"):
                left = max(end - time.monotonic(), 0)
                ready = select.select(
                    [process.stdout], [process.stdin] if waiting else [], [], left
                )
                if ready[1]:
                    waiting = waiting[os.write(process.stdin.fileno(), waiting[:65536]) :]
                elif ready[0]:
                    part = os.read(process.stdout.fileno(), 1 << 20)
                    if not part:
                        break
                    data += part
                else:
                    break
            if data.endswith(b"\n"):
                reply = json.loads(data)
                if reply.get("kind") == "memory":  # what it holds now is anyone's guess
                    self.close()
                return reply
        except BrokenPipeError:
            pass
        except BaseException:  # Ctrl-C: the answer that is still to come belongs to nobody
            self.close()
            raise
        slow = process.poll() is None and time.monotonic() >= end
        self.close()
        return self._how_it_ended(process.returncode, slow)

    def _how_it_ended(self, code: int, slow: bool) -> dict[str, Any]:
        if slow or code == -signal.SIGPROF:
            seconds = _PATIENCE if slow else self.seconds
            return {"kind": "time", "error": f"no result after {seconds:g} s"}
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"kind": "ended", "error": how}

    def _start(self) -> None:
        version = importlib.metadata.version("jinja2")
        if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < _LEAST_JINJA:
            raise DSV3Error(
                "too old to run a template of others safely",
                where="jinja2",
                found=version,
                expected="3.1.6 or later",
                fix='pip install "jinja2>=3.1.6"',
            )
        folders = sorted(
            {
                str(Path(importlib.util.find_spec(name).origin).parents[1])
                for name in ("jinja2", "markupsafe")
            }
        )
        # Isolated and without site-packages' own start-up code: half the time, and no surprises.
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                str(_WORKER),
                str(self.seconds),
                str(self.memory),
                *folders,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        os.set_blocking(self._process.stdin.fileno(), False)
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _stop, self._process, self._owner)


def _stop(process: subprocess.Popen, owner: int) -> None:
    process.stdin.close()
    process.stdout.close()
    if os.getpid() == owner:
        process.kill()
        process.wait()


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages, with the thoughts of an answer under each of the names by which
    templates ask for them."""
    names = ("reasoning_content", "thinking", "reasoning")
    result = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DSV3Error(
                "not a message",
                where=f"message {number}",
                found=type(message).__name__,
                expected='{"role": ..., "content": ...}',
            )
        thoughts = next((message[name] for name in names if message.get(name) is not None), None)
        extra = {} if thoughts is None else {"reasoning_content": thoughts}
        result.append({**({"thinking": thoughts} if extra else {}), **message, **extra})
    return result


def _plain(value: Any) -> Any:
    """What JSON does not know, as plain values; an image or a tensor as its type's name."""
    if isinstance(value, Mapping):
        return dict(value)
    return f"<{type(value).__name__}>"
