"""Chat templates: rendered as transformers renders them, and never more than a line of trouble."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3.errors import DSV3Error
from dsv3.generation.template import Renderer, choose, template_messages

pytestmark = pytest.mark.slow

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of <a> city & more",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
DOCUMENTS = [{"title": "Ulm", "text": "A city\non the Danube"}]
TALK = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": [{"type": "text", "text": "Hö?"}, {"type": "image"}]},
    {
        "role": "assistant",
        "content": "Ja.",
        "reasoning": "hm",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Ulm", "n": 1.5}}}],
    },
    {"role": "user", "content": "  So?\n"},
]
TEMPLATES = {
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}\n{% else %}Q{% endif %}\n{% endfor %}",
    "scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "tools": "{% if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}"
    "{% for t in tools %}{{ t.function | tojson(sort_keys=true) }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ {'ö': '<&>'} | tojson(ensure_ascii=true) }}"
    "{{ [1, 2] | tojson(separators=(',', ':')) }}",
    "documents": "{% for d in documents %}{{ loop.index }}. {{ d['title'] }}: {{ d.text }}\n"
    "{% endfor %}",
    "parts": "{% for m in messages %}{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}<img>"
    "{% endif %}{% endfor %}{% endif %}|{% endfor %}",
    "white space": "  {% for m in messages %}\n    {%- if loop.first %}\n  first {{ m.role }}\n"
    "    {% continue %}\n  {% endif %}\n  {{ m.role }}\n  {% break %}\n{% endfor %}\n",
    "namespace": "{% set n = namespace(found=false, self=3) %}{% for m in messages %}"
    "{% set n.found = m.role == 'user' %}{% endfor %}{{ n.found }}{{ n.self }}"
    "{{ dict(a=1, b=2).items() | list }}{{ dict.fromkeys('ab') }}",
    "thoughts": "{% for m in messages %}{{ m.reasoning_content }}/{{ m.thinking }};{% endfor %}",
    "macro": "{% macro turn(m) %}<{{ m.role }}>{% endmacro %}{% for m in messages[::-1] %}"
    "{{ turn(m) }}{% endfor %}{{ messages | map(attribute='role') | unique | join(',') }}",
    "switches": "{{ add_generation_prompt }}{{ tools is defined }}{{ documents is none }}"
    "{{ absent is defined }}{{ thinking_budget | default(7) }}",
    "year": "{{ strftime_now('%Y') | length }}",
}


@pytest.fixture(scope="module")
def renderer():
    made = Renderer(seconds=0.5, memory=256 << 20)
    yield made
    made.close()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("extras", [True, False])
def test_rendered_as_transformers_does(renderer, name, extras):
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    template = TEMPLATES[name]
    more = dict(tools=TOOLS, documents=DOCUMENTS) if extras else dict(tools=None, documents=None)
    if name in ("tools", "documents") and not extras:
        template = "{{ tools }}{{ documents }}"
    (expected,), _ = chat.render_jinja_template(
        conversations=[TALK], chat_template=template, add_generation_prompt=True, **more
    )
    found = renderer.render(
        template,
        {"messages": template_messages(TALK), **more, "add_generation_prompt": True},
        where="x",
    )
    assert found == expected


@pytest.mark.parametrize(
    "template, what",
    [
        # The template itself is wrong, for every conversation.
        ("a\n{% if %}", "chat_template:2: the chat template has a mistake in it.*Syntax"),
        ("{{ 1 | no_such_filter }}", "has a mistake in it.*no_such_filter"),
        ("{% if true %}{{ 1 is no_such_test }}{% endif %}", "has a mistake in it.*no_such_test"),
        ("{% unknown %}", "has a mistake in it.*unknown"),
        ("{% generation %}", "has a mistake in it"),
        (
            "{{ '" + "(" * 5000 + "' }}{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
            "has a mistake in it|memory|has ended",
        ),
        # It speaks.
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages.*roles must alt"),
        ("{{ raise_exception(3) }}", "refuses these messages .found 3"),
        (
            "\n\n{{ messages[0].content + none }}",
            "chat_template:3: the chat template has a mistake",
        ),
        ("{{ messages[9].content.x }}", "has a mistake in it.*UndefinedError"),
        # It meets something it did not expect.
        ("\n\n{{ messages[1].content }}", "chat_template:3: the chat template cannot render these"),
        (
            "{{ messages[1:][0].content.x.y if messages | length < 2 }}",
            "cannot render.*UndefinedErr",
        ),
        ("{{ messages.append(1) }}", "reaches for what a template may not have"),
        ("{{ messages[0].update({'role': 'x'}) }}", "reaches for what"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "reaches for what"),
        ("{{ '%s'.__format__.__self__.__class__.__base__ }}", "reaches for what|cannot render"),
        ("{% set n = namespace(__init__=1) %}", "reaches for what"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "has a mistake.*RecursionError"),
        ("{% include 'x' %}", "has a mistake"),
        ("{{ 1 / 0 }}", "has a mistake.*ZeroDivisionError"),
        ("{{ strftime_now(3) }}", "TypeError"),
        # It would never end, or eat the machine.
        ("{{ 2 ** 99999999999 }}", "does not come to an end|memory"),
        ("{% set x = 9 ** 9 %}{{ x ** x }}", "does not come to an end|memory"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "does not come to an end .found no result after 0.5 s",
        ),
        ("{{ [0] * 10 ** 10 }}", "needs too much memory"),
        ("{{ 'a' * 10 ** 10 }}", "needs too much memory"),
        ("{{ messages * 10 ** 9 }}", "needs too much memory"),
        ("{{ '%1000000000d' % 1 }}", "needs too much memory|cannot render"),
        ("{{ 'a' * (17 * 1024 * 1024) }}", "makes too long a text"),
        ("{{ range(10 ** 9) | list }}", "has a mistake.*OverflowError"),
    ],
)
def test_trouble_is_one_line_that_says_whose_it_is(renderer, template, what):
    variables = {"messages": [{"role": "user", "content": "a"}]}
    with pytest.raises(DSV3Error, match=what) as error:
        renderer.render(template, variables, where="folder")
    assert str(error.value).startswith("folder: chat_template") and "\n" not in str(error.value)
    assert renderer.render("{{ messages[0].role }}", variables, where="x") == "user"  # it goes on


def test_contents_of_another_form_are_the_messages_fault(renderer):
    variables = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}
    with pytest.raises(DSV3Error, match="cannot render these messages.*TypeError"):
        renderer.render("{{ '<' + messages[0].content }}", variables, where="x")


def test_which_template_is_meant():
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    assert [choose(named, "x"), choose(named, "x", tools=True)] == ["d", "t"]
    assert [choose("s", "x", tools=True), choose(None, "x")] == ["s", None]
    assert choose(named[1:], "x") is None and choose(named[:1], "x", tools=True) == "d"
    for wrong in (3, {}, ["a"], [{"name": "default"}], [{"name": 1, "template": "x"}], [None]):
        with pytest.raises(DSV3Error, match="x: chat_template: not a"):
            choose(wrong, "x")


def test_what_json_does_not_know(renderer):
    """Subclasses and tensors reach a template as plain values; a lone surrogate as it is."""
    assert (
        renderer.render("{{ a }}{{ b[0] }}", {"a": Path("x"), "b": ("\udc80",)}, "x")
        == "<PosixPath>\udc80"
    )
    loop = []
    loop.append(loop)
    with pytest.raises(DSV3Error, match="not something a chat template can read"):
        renderer.render("", {"a": loop}, "x")


def test_a_large_conversation_passes_both_ways(renderer):
    """More than a pipe holds, in and out."""
    text = "wörd " * 300_000
    assert renderer.render("{{ a }}|", {"a": text}, "x") == text + "|"


def test_a_worker_that_was_killed_is_started_again(renderer):
    renderer.render("a", {}, "x")
    os.kill(renderer._process.pid, signal.SIGKILL)
    renderer._process.wait(10)
    with pytest.raises(DSV3Error, match="has ended .found SIGKILL"):
        renderer.render("a", {}, "x")
    assert renderer.render("b", {}, "x") == "b"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("template", ["a", "{{ 2 ** 99999999999 }}"])
def test_no_worker_outlives_its_parent(template):
    """Neither one that waits nor one that computes, when the parent is killed."""
    code = (
        "import sys; from dsv3.generation.template import Renderer; r = Renderer(seconds=2); "
        "r.render('a', {}, 'x'); print(r._process.pid, flush=True); "
        f"r.render({template!r}, {{}}, 'x'); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait(10)
    end = time.monotonic() + 60
    while (
        Path(f"/proc/{worker}/cmdline").exists()
        and b"template_worker" in Path(f"/proc/{worker}/cmdline").read_bytes()
    ):
        assert time.monotonic() < end, "the worker lives on"
        time.sleep(0.05)
    parent.stdin.close()
    parent.stdout.close()
