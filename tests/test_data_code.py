"""The standard library to documents that parse, whole modules held out."""

import ast
import sys
import sysconfig
from pathlib import Path

import pytest

from dsv3 import data
from dsv3.data import BOS, EOS
from dsv3.errors import DSV3Error

MODULE = '''"""What it is for.

Long enough that the constants below stay apart from the function that follows them: a run of
statements under two hundred characters would be read together with the next definition.
"""
import os

LIMIT = 3


# Why f is here.

# Above f.
@cache
def f(x):
    return x

small = {}
def g(): pass

class A:
    pass

if __name__ == "__main__":
    f(1); g()
    # the end
'''


def long_class(methods: int) -> str:
    body = "".join(
        f"    # about m{i}\n    @property\n    def m{i}(self):\n        "
        f"{'x' * 60!r}\n{'        y = 1' + chr(10)}" * 1 + "        z = 2\n" * 20
        for i in range(methods)
    )
    return "@final\nclass Long(\n        Base):\n\n    # first\n" + body


@pytest.fixture(scope="module")
def modules():
    return data.read_modules()


def test_pieces_are_definitions_and_what_stands_between():
    pieces = data.pieces(MODULE)
    assert [piece.splitlines()[-1] for piece in pieces] == [
        "LIMIT = 3",
        "    return x",
        "def g(): pass",
        "    pass",
        "    # the end",
    ]
    assert pieces[1].startswith("# Why f is here.\n\n# Above f.\n@cache\ndef f")
    assert pieces[2].startswith("small = {}\n")  # too short to stand alone
    assert "".join(pieces).replace("\n", "") == MODULE.replace("\n", "")


def test_a_long_class_is_cut_at_methods_and_keeps_its_first_line():
    short, long = long_class(5), long_class(20)
    assert len(short) < 4000 < len(long)
    assert data.pieces(short) == [short]
    pieces = data.pieces(long)
    assert len(pieces) > 3 and max(map(len, pieces)) < 2400
    assert pieces[0].startswith("@final\nclass Long(\n        Base):\n\n    # first\n")
    methods = []
    for number, piece in enumerate(pieces):
        node = ast.parse(piece).body[0]
        assert isinstance(node, ast.ClassDef) and node.name == "Long"
        assert node.bases[0].id == "Base"
        if number:
            assert piece.startswith("class Long(\n        Base):\n    # about m")
        methods += [(m.name, len(m.decorator_list)) for m in node.body]
    assert methods == [(f"m{i}", 1) for i in range(20)]


def test_tables_and_what_does_not_parse_are_left_out():
    table = "T = {\n" + "".join(f"    {i}: 0x{i:04x},\n" for i in range(500)) + "}\n"
    assert len(table) > 6000 and data.pieces(table) == []
    assert data.pieces(table[:600] + "}\n") == [table[:600] + "}\n"]
    function = "def f():\n    t = 1\n" + "    0x00, 0x01, 0x02\n" * 400
    assert data.pieces(function) == [function]  # a function is no table
    branch = "if x:\n" + "".join(f"    {line}\n" for line in function.splitlines())
    assert data.pieces(branch) == [branch]
    assert data.pieces(branch + "else:\n    T = [\n" + "    0x00, 0x01,\n" * 600 + "    ]\n") == []
    assert data.pieces("print 'old'\n") == []


def test_folder_is_read_in_order_without_tests_and_tables(tmp_path):
    kept = ["b.py", "a.py", "p/__init__.py", "p/z.py", "textwrap.py"]
    left_out = [
        "test/t.py",
        "p/tests/t.py",
        "p/test_z.py",
        "encodings/cp1.py",
        "notes.txt",
        "_sysconfigdata__linux.py",
        "site-packages/s.py",
        "__pycache__/c.py",
    ]
    for name in kept + left_out:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f"\f\nname = {name!r}  \n\n\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    modules = data.read_modules(tmp_path)
    assert list(modules) == ["a", "b", "p.__init__", "p.z", "textwrap"]
    assert modules["p.z"] == "name = 'p/z.py'\n"
    train, held_out = data.split_modules(modules)
    assert train == [modules[name] for name in ("a", "b", "p.__init__", "p.z")]
    assert held_out == ["name = 'textwrap.py'\n"]


def test_missing_code_is_named(tmp_path):
    with pytest.raises(DSV3Error, match="no modules"):
        data.read_modules(tmp_path)
    with pytest.raises(DSV3Error, match="no held-out module"):
        data.split_modules({"os": "x = 1\n"})
    with pytest.raises(DSV3Error, match="nothing to train on"):
        data.split_modules({"wsgiref.util": "x = 1\n"})


def test_held_out_modules_are_whole_and_there(modules):
    train, held_out = data.split_modules(modules)
    tops = {name.split(".")[0] for name in modules}
    assert set(data.HELD_OUT_MODULES) <= tops
    assert set(data.HELD_OUT_MODULES) <= sys.stdlib_module_names
    assert len(train) + len(held_out) == len(modules)
    assert 0.03 < sum(map(len, held_out)) / sum(map(len, modules.values())) < 0.06
    seen = {line.strip() for text in train for line in text.splitlines()}
    long = [
        line.strip() for text in held_out for line in text.splitlines() if len(line.strip()) > 35
    ]
    assert sum(line in seen for line in long) < 0.05 * len(long)


def test_every_document_of_the_library_parses_and_most_text_is_kept(modules):
    texts = list(modules.values())[::3]
    documents, size = data.code_documents(texts), 0
    for document in documents:
        assert document.startswith(data.BOS) and document.endswith("\n" + data.EOS)
        text = document.removeprefix(data.BOS).removesuffix(data.EOS)
        assert not any(token in text for token in data.SPECIAL_TOKENS)
        size += len(text)
        ast.parse(text)
    assert 0.95 < size / sum(map(len, texts)) < 1.02
    textwrap = data.pieces(modules["textwrap"])
    assert any(
        piece.startswith("def dedent(") and piece.endswith("return text\n") for piece in textwrap
    )


def test_no_path_of_this_machine_is_in_the_text(modules):
    places = {str(Path(sysconfig.get_path("stdlib")).parent), sys.prefix, str(Path.home())}
    places -= {"/usr/lib", "/usr", "/usr/local", "/usr/local/lib", "/root"}
    assert not [name for name, text in modules.items() for place in places if place in text]


# Plain functions ---------------------------------------------------------------------------------

CLASS = (
    BOS
    + '''class Cup:
    """Holds tea."""
    size = 3

    @property
    def full(self):
        """Whether it is."""
        # ask
        return self.tea   ==  "much"

    async def sip(self, *, n=1):
        def inner():
            """Only words."""
        return inner, n
'''
    + EOS
)


def test_plain_functions_are_methods_and_functions_without_words():
    assert data.plain_functions([CLASS]) == [
        BOS + "@property\ndef full(self):\n    return self.tea == 'much'\n" + EOS,
        BOS + "async def sip(self, *, n=1):\n\n    def inner():\n        pass\n"
        "    return (inner, n)\n" + EOS,
    ]


def test_plain_functions_are_short_and_not_empty():
    empty = BOS + 'def nothing():\n    """Later."""\n' + EOS
    other = BOS + "import os\nx = 1\n" + EOS
    long = BOS + "def long():\n" + "    step()\n" * 200 + EOS
    assert data.plain_functions([empty, other, long]) == []
    assert data.plain_functions([long], longest=5000) == [long]


def test_functions_are_a_domain_of_training_text_only():
    domains = [data.Domain("plays", ["p"], ["q"]), data.Domain("code", [CLASS], [CLASS])]
    *before, functions = data.with_others(domains, ["functions"])
    assert before == domains and functions.name == "functions"
    assert functions.train == data.plain_functions([CLASS]) and functions.held_out == []
