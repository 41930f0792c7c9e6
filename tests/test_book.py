"""The machinery of the book: notation, ledgers, mutations, running a notebook."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path

import nbformat
import pytest
import torch

from dsv3 import ModelConfig, book
from dsv3.book import ledger
from dsv3.book.notation import notation
from dsv3.book.notebook import run
from dsv3.book.ready import NotReady
from dsv3.book.saved import clean, keep_clean, reset
from dsv3.checkpoint.layout import TABLE
from dsv3.errors import DSV3Error
from dsv3.moe import Router
from dsv3.precision import Precision
from dsv3.rope import rotate

ROOT = Path(__file__).parents[1]
SMALL, LARGE = ModelConfig.mini(), ModelConfig.deepseek_v3()
CHAPTERS = {path.name[:2]: path for path in sorted((ROOT / "chapters").glob("[0-9]*.ipynb"))}


# --- notation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["ours", "671B"])
def test_symbols_that_share_a_weight_make_up_its_shape(config):
    shares: dict = {}
    for entry in notation().values():
        if entry.kind == "weight":
            shares.setdefault(entry.row, []).append(entry.sizes(config))
    for row, parts in shares.items():
        whole = tuple(row.shape(config))
        assert sum(part[0] for part in parts) == whole[0], row.name
        assert {part[1:] for part in parts} == {whole[1:]}, row.name


def test_the_reports_own_sizes():
    """TR 4.2, typed in from there."""
    sizes = {
        symbol: entry.sizes(LARGE)[0]
        for symbol, entry in notation().items()
        if entry.kind == "size"
    }
    assert sizes == {
        "d": 7168,
        "l": 61,
        "n_h": 128,
        "d_h": 128,
        "d_h^R": 64,
        "d_c": 512,
        "d_c'": 1536,
        "N_s": 1,
        "N_r": 256,
        "K_r": 8,
        "M": 4,
        "D": 1,
        "V": 129280,
        "inner": 2048,
    }


def test_a_table_has_both_sizes_and_all_names():
    text = book.notation_table(["d_c", "W^DKV", "t"]).data
    assert "| 128 | 512 |" in text and "| 128 × 192 | 512 × 7,168 |" in text
    assert "`kv_lora_rank`" in text and "kv_a_proj_with_mqa" in text
    for entry in notation().values():
        assert f"${entry.tex}$" in book.notation_table().data
    with pytest.raises(KeyError):
        book.notation_table(["d_x"])


def test_fields_of_the_config_carry_the_symbols_of_the_notation():
    """The comment behind a field of ModelConfig begins with its symbol, where it has one."""
    said = re.findall(
        r"^    (\w+): .*?# ([A-Za-z_'^]+)(?:[;:]| *$)",
        (ROOT / "dsv3/config.py").read_text(),
        re.MULTILINE,
    )
    symbols = {entry.field: entry.symbol for entry in notation().values() if entry.field}
    said = {field: symbol for field, symbol in said if symbol in symbols.values()}
    assert len(said) >= 12
    for field, symbol in said.items():
        assert symbols.get(field, "d_h") == symbol, field  # values are d_h wide too: v_head_dim


def test_the_table_of_tensors_uses_symbols_of_the_notation():
    known = set(notation())
    for row in TABLE:
        for word in re.findall(
            r"W\^\w+|FFN\^\(\w\)(?:_i)?|\b[eb]_i|\bM_k|\bEmb\b|\bOutHead\b", row.symbol
        ):
            assert word in known | {"W^Q"}, row.name  # W^Q: where queries are not compressed


# What a symbol looks like in a docstring or comment, and words that look alike and are none.
SYMBOL = re.compile(r"(?<![\w^`*.(/-])(?:W\^[A-Z]+|[dnNKM]_[a-zA-Z](?:\^[A-Z])?'?)(?![\w(.^`*])")
SHAPE_NAMES = {"d_r", "d_v"}  # dsv3/__init__.py: sizes in annotations
OTHERS = {"W^Q", "W^T", "d_j"}  # queries that are not compressed; a transpose; draft j of a pass


def prose(path: Path) -> str:
    """Docstrings and comments of a module."""
    source = path.read_text()
    found = [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
    ]
    found += [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    return "\n".join(found)


def test_docstrings_use_symbols_of_the_notation():
    known = set(notation()) | SHAPE_NAMES | OTHERS
    seen = set()
    for path in sorted((ROOT / "dsv3").rglob("*.py")):
        if path.parent.name in ("kernels", "book"):
            continue  # kernels speak of tiles
        for word in SYMBOL.findall(prose(path)):
            assert word in known, f"{path.relative_to(ROOT)} says {word}"
            seen.add(word)
    assert {"d_c", "d_h^R", "n_h", "N_r", "K_r", "W^UK"} <= seen


# --- ledgers ----------------------------------------------------------------------------------


def test_tags_are_read_as_they_are_written():
    source = '''
class Gate:
    def choose(self):
        """Not a tag: (eq. 3)."""
        return 1  # eq. 16

    def forward(self):
        def inner():
            return 2  # eq. 6-8, 11: and fact 22, 23
        return inner  # eq 9 is none
'''
    assert list(ledger.tags_of_source(source)) == [
        ("Gate.choose", "eq.", 16),
        ("Gate.forward", "eq.", 6),
        ("Gate.forward", "eq.", 7),
        ("Gate.forward", "eq.", 8),
        ("Gate.forward", "eq.", 11),
        ("Gate.forward", "fact", 22),
        ("Gate.forward", "fact", 23),
    ]


@pytest.mark.parametrize("equation", ledger.load("equations"), ids=lambda e: str(e["number"]))
def test_every_equation_has_its_code_its_test_and_its_cell(equation):
    code, tests, cells = ledger.split(ledger.places().get(("eq.", equation["number"]), ()))
    assert code, "no function of the package is tagged"
    assert tests, "no test is tagged"
    chapter = f"{equation['chapter']:02}"
    if chapter in CHAPTERS:
        assert [cell for cell in cells if cell.chapter.startswith(chapter)]


@pytest.mark.parametrize("fact", ledger.load("facts"), ids=lambda f: str(f["number"]))
def test_every_fact_is_recomputed_somewhere(fact):
    _, tests, cells = ledger.split(ledger.places().get(("fact", fact["number"]), ()))
    assert tests or cells


def test_no_tag_leads_nowhere():
    known = {("eq.", equation["number"]) for equation in ledger.load("equations")}
    known |= {("fact", fact["number"]) for fact in ledger.load("facts")}
    assert {number for kind, number in known if kind == "eq."} == set(range(1, 26))
    for tag, found in ledger.places().items():
        assert tag in known, (tag, found)
        for place in found:
            assert place.name, f"{place.file}: {tag} stands outside of any function"


def functions_of_tests() -> set[str]:
    return {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("row", ledger.load("misreadings"), ids=lambda row: row["id"])
def test_every_misreading_is_answered_shown_and_tested(row):
    """The sentence, in a cell tagged so; where a number can show it, a cell and a test."""
    chapter = CHAPTERS.get(f"{row['chapter']:02}")
    if chapter is None:
        pytest.skip("its chapter is not written yet")
    notebook, name = nbformat.read(chapter, as_version=4), f"misread-{row['id']}"
    said = [cell for cell in notebook.cells if name in cell.metadata.get("tags", [])]
    assert [cell for cell in said if cell.cell_type == "markdown"], f"no cell tagged {name}"
    if row["numeric"]:
        assert [cell for cell in notebook.cells if cell.id == name and cell.cell_type == "code"], (
            f"no code cell {name}"
        )
        assert f"test_{name.replace('-', '_')}" in functions_of_tests()


# --- mutations --------------------------------------------------------------------------------


def router() -> tuple[Router, torch.Tensor]:
    gate = Router(SMALL, Precision.of("fp32", SMALL))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gate.weight.normal_(0, 0.2, generator=random)
        gate.bias.normal_(0, 1, generator=random)
    return gate, torch.randn(20, SMALL.hidden_size, generator=random)


def test_a_mutated_method_is_another_one_inside_and_the_same_one_behind():
    gate, u = router()
    before, function = gate(u), Router.__dict__["forward"]
    with book.mutated(
        Router.forward, "scores.gather(-1, chosen)", "(scores + self.bias).gather(-1, chosen)"
    ):
        inside = gate(u)
    assert torch.equal(inside[1], before[1]) and not torch.allclose(inside[0], before[0])
    assert Router.__dict__["forward"] is function and torch.equal(gate(u)[0], before[0])


def test_a_mutated_function_is_seen_by_the_modules_that_imported_it():
    from dsv3 import mla, rope

    with book.mutated(rope.rotate, "pairs * rotation", "pairs"):
        assert mla.rotate is rope.rotate is not rotate
    assert mla.rotate is rope.rotate is rotate


def test_the_right_line_comes_back_after_an_error_too():
    function = Router.__dict__["scores"]
    with pytest.raises(ZeroDivisionError):
        with book.mutated(Router.scores, "logits.sigmoid()", "1 / 0"):
            gate, u = router()
            gate(u)
    assert Router.__dict__["scores"] is function


def test_a_part_that_stands_nowhere_or_twice_is_refused():
    with pytest.raises(ValueError, match="0 times"):
        with book.mutated(Router.forward, "no such line", ""):
            pass
    with pytest.raises(ValueError, match="times"):
        with book.mutated(Router.forward, "weights", "w"):
            pass


# --- running a notebook -----------------------------------------------------------------------


def write(path: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    head = nbformat.v4.new_markdown_cell("# 1\n\n| | |\n|---|---|\n| Budget | not measured |")
    notebook = nbformat.v4.new_notebook(cells=[head, *cells])
    notebook.metadata["widgets"] = {"stale": 1}
    nbformat.write(notebook, path)
    return path


def test_a_run_stores_outputs_and_budget_and_nothing_else(tmp_path):
    path = write(
        tmp_path / "a b.ipynb",
        "x = bytearray(300_000_000)\nlen(x)",
        "",
        "import ipywidgets\nipywidgets.IntSlider(3)",
        "import time\nfor i in range(3):\n    print(i, flush=True)\n    time.sleep(0.5)",
    )
    budget = run(path)
    notebook = nbformat.read(path, as_version=4)
    assert 0.3e9 < budget.memory < 2e9 and 0 < budget.seconds < 60
    assert re.search(
        r"^\| Budget \| \d+ s on .*CPU cores?, \d\.\d GB of memory, no download "
        r"\(measured\) \|$",
        notebook.cells[0].source,
        re.MULTILINE,
    )
    assert [cell.get("execution_count") for cell in notebook.cells] == [None, 1, None, 2, 3]
    assert notebook.cells[1].outputs[0].data["text/plain"] == "300000000"
    assert set(notebook.cells[3].outputs[0].data) == {"text/plain"}
    assert [output.text for output in notebook.cells[4].outputs] == ["0\n1\n2\n"]
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    before = path.read_text()
    clean(notebook)
    assert nbformat.writes(notebook) == before.rstrip("\n")


def test_a_failing_cell_changes_nothing_and_is_named(tmp_path):
    path = write(tmp_path / "a.ipynb", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(DSV3Error, match="ZeroDivisionError"):
        run(path)
    assert path.read_bytes() == before
    with pytest.raises(DSV3Error, match="no such notebook"):
        run(tmp_path / "missing.ipynb")


# --- what a reader's saves leave ---------------------------------------------------------------


class Contents:
    """The part of a contents manager that the hook asks."""

    def __init__(self, root: Path):
        self.root = root

    def _get_os_path(self, path: str) -> str:
        return str(self.root / path)


def saved(path: Path, change) -> str:
    """What JupyterLab would write after ``change`` of the open notebook."""
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    model = {"type": "notebook", "content": dict(notebook)}
    keep_clean(model=model, path=path.name, contents_manager=Contents(path.parent))
    return nbformat.writes(nbformat.from_dict(model["content"])) + "\n"


def noise(notebook) -> None:
    """What JupyterLab adds when a chapter is opened and its widget's cell is run."""
    notebook.metadata["language_info"] = {"name": "python", "version": "3.12.1"}
    for cell in notebook.cells:
        cell.metadata["scrolled"] = True
        if cell.cell_type == "code":
            cell.execution_count = 99
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["application/vnd.jupyter.widget-view+json"] = {"model_id": "x"}


def test_a_chapter_that_was_read_and_run_is_saved_as_it_was(tmp_path):
    path = tmp_path / "01_attention.ipynb"
    path.write_bytes(CHAPTERS["01"].read_bytes())
    assert saved(path, noise) == path.read_text(encoding="utf-8")


def test_what_a_reader_writes_is_saved(tmp_path):
    path = tmp_path / "00_start_here.ipynb"
    path.write_bytes(CHAPTERS["00"].read_bytes())

    def answer(notebook):
        notebook.cells[-2].source += "mine"

    assert "mine" in saved(path, answer)


def test_a_readers_own_notebook_is_left_alone(tmp_path):
    path = write(tmp_path / "own.ipynb", "1")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].metadata["mine"] = 1
    nbformat.write(notebook, path)
    assert "version" in saved(path, noise) and "mine" in saved(path, noise)


def test_a_chapter_is_brought_back_without_git_and_the_readers_is_kept(tmp_path):
    path, shipped = tmp_path / "00_start_here.ipynb", CHAPTERS["00"].read_bytes()
    path.write_bytes(shipped)
    with pytest.raises(DSV3Error, match="nothing to reset it to"):
        reset(path)
    path.write_text(saved(path, lambda notebook: notebook.cells.pop()), encoding="utf-8")
    mine = path.read_bytes()
    saved(path, noise)  # later saves leave the copy as it is
    assert reset(path).read_bytes() == mine != shipped == path.read_bytes()
    assert reset(path) is None


def test_a_chapter_is_brought_back_from_git(tmp_path):
    path = tmp_path / "a.ipynb"
    path.write_text("as committed")
    for words in ("init -q", "add a.ipynb", "-c user.name=a -c user.email=a@b commit -qm a"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True, timeout=30)
    path.write_text("mine")
    assert reset(path).read_text() == "mine" and path.read_text() == "as committed"
    path.unlink()
    reset(path)
    assert path.read_text() == "as committed"


def test_a_cell_before_its_time_says_which_comes_first():
    """One line in a notebook, and no word of it where the cell is run in order."""
    call = "from dsv3.book import needs\nneeds('Before you start')"
    with pytest.raises(NotReady, match="run the cell under “Before you start” first") as stopped:
        exec(call, {})
    assert stopped.value._render_traceback_() == [str(stopped.value)]
    exec(call, {"check": object()})
