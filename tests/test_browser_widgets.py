"""Chapter 4's and 5's widgets as a reader moves them: a real JupyterLab in a real browser.

Needs Chromium, see tests/test_browser.py.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from lab import JupyterLab, Notebook, check_shown, open_browser, words

from dsv3 import load_model, load_tokenizer
from dsv3.commands import doctor
from dsv3.viz.widgets import DraftExplorer, NumberLine, ScaleMicroscope

pytestmark = pytest.mark.slow

SHIPPED = Path(__file__).parents[1] / "assets" / "dsv3-mini"

PROMPT = "To be, or not to be"
CELLS = [
    "from dsv3.viz.widgets import DraftExplorer, NumberLine, ScaleMicroscope",
    f"ScaleMicroscope({str(SHIPPED)!r})",
    "NumberLine()",
    f"""\
from dsv3 import load_model, load_tokenizer
model = load_model({str(SHIPPED)!r}, precision="fp32")
DraftExplorer(model, load_tokenizer({str(SHIPPED)!r}), {PROMPT!r})""",
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    if doctor.browser() is None:
        reason = f"no browser found, looked for {', '.join(doctor.BROWSERS)}"
        (pytest.fail if os.environ.get("DSV3_NEED_BROWSER") else pytest.skip)(reason)
    folder = tmp_path_factory.mktemp("book")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "widgets.ipynb")
    with JupyterLab(folder) as server:
        yield server


@pytest.fixture(scope="module")
def browser(lab):
    with open_browser() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def page(lab, browser):
    """All of them in one notebook, on a light page."""
    notebook = Notebook(browser, lab, "widgets.ipynb", height=2600)
    notebook.run_all()
    yield notebook
    assert notebook.complaints == []


def choose(page: Notebook, title: str, description: str, option: str) -> None:
    """Another option of a drop-down list, by the words before it."""
    page.panel(title).get_by_label(description, exact=True).select_option(label=option)


def test_a_block_is_looked_into(page, tmp_path):
    """Another matrix from the list, a block by the pointer, the next by the keyboard; hover."""
    ours = ScaleMicroscope(SHIPPED)
    check_shown(page, ours.title, ours.scene())
    choose(page, ours.title, "Matrix", "attn.wq_b")
    ours.matrix.value = "attn.wq_b"
    check_shown(page, ours.title, ours.scene())
    panel = page.panel(ours.title)
    panel.locator("[data-key='block 3 1']").click()
    ours.drawing.choose("block 3 1")
    check_shown(page, ours.title, ours.scene())
    assert panel.locator("image").count() == 4
    page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press("Enter")
    ours.drawing.choose("block 4 1")
    check_shown(page, ours.title, ours.scene())
    assert page.focused() == {"key": "block 4 1", "pressed": "true"}
    panel.locator("[aria-label^='exponent 12']").hover()
    assert re.search(r"of 16,384 codes", panel.locator(".tip").inner_text())
    choose(page, ours.title, "Colour by", "error, one scale for the matrix")
    choose(page, ours.title, "Matrix", "x of attn.wo")
    ours.show.value, ours.matrix.value = "tensor", "x of attn.wo"
    check_shown(page, ours.title, ours.scene())
    panel.screenshot(path=tmp_path / "microscope.png")
    assert (
        words(ours.scene())[0]
        == "layer 2, x of attn.wo, 42 × 1024: activations, quantised as the model reads them"
    )


def test_a_number_is_dragged_typed_and_chosen(page, tmp_path):
    ours = NumberLine()
    check_shown(page, ours.title, ours.scene())
    page.press_slider(ours.title, "Drag the value", "ArrowRight", 3)
    ours.drag.value += 3 * ours.drag.step
    check_shown(page, ours.title, ours.scene())
    panel = page.panel(ours.title)
    field = panel.get_by_label("Value, then Enter", exact=True)
    field.fill("10.5")
    field.press("Enter")
    ours.value.value = "10.5"
    check_shown(page, ours.title, ours.scene())
    panel.locator("[data-key='point 85']").click()  # 0x55: 13
    ours.drawing.choose("point 85")
    check_shown(page, ours.title, ours.scene())
    page.page.keyboard.press("ArrowLeft")
    page.page.keyboard.press("Enter")
    ours.drawing.choose("point 84")
    check_shown(page, ours.title, ours.scene())
    assert page.focused() == {"key": "point 84", "pressed": "true"}
    field.fill("eleven")
    field.press("Enter")
    panel.get_by_text("this is no number").wait_for()
    choose(page, ours.title, "Cases", "464: half a step beyond it")
    ours.case.value = "464"
    check_shown(page, ours.title, ours.scene())
    page.press_slider(ours.title, "Power of two", "ArrowLeft", 2)
    ours.power.value = -2
    check_shown(page, ours.title, ours.scene())
    panel.locator("[data-key='format E5M2']").click()
    ours.format.value = "E5M2"
    check_shown(page, ours.title, ours.scene())
    panel.screenshot(path=tmp_path / "number_line.png")


def test_a_text_is_drafted_and_stepped_through(page, tmp_path):
    ours = DraftExplorer(load_model(SHIPPED, precision="fp32"), load_tokenizer(SHIPPED), PROMPT)
    page.scroll_to(ours.title)
    check_shown(page, ours.title, ours.scene())
    page.press_slider(ours.title, "Drafts a pass", "ArrowRight", 1)
    ours.drafts.value += 1
    check_shown(page, ours.title, ours.scene())
    panel = page.panel(ours.title)
    panel.locator("[data-key='token 12']").click()
    ours.drawing.choose("token 12")
    check_shown(page, ours.title, ours.scene())
    assert "pass" in panel.locator(".tip").inner_text()
    page.press_slider(ours.title, "Stage", "ArrowLeft", 1)
    ours.stage.value = 2
    check_shown(page, ours.title, ours.scene())
    panel.locator("[data-key='later']").click()
    ours.drawing.choose("later")
    check_shown(page, ours.title, ours.scene())
    page.page.keyboard.press("ArrowLeft")
    page.page.keyboard.press("Enter")
    ours.drawing.choose("earlier")
    check_shown(page, ours.title, ours.scene())
    field = panel.get_by_label("Prompt + Enter", exact=True)
    field.fill("")
    field.press("Enter")
    panel.get_by_text("there is no text").wait_for()
    field.fill("O Romeo, Romeo!")
    field.press("Enter")
    ours.prompt.value = "O Romeo, Romeo!"
    check_shown(page, ours.title, ours.scene())
    panel.screenshot(path=tmp_path / "drafts.png")
