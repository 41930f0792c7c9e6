"""Widgets of chapters 4 to 7 as a reader moves them: a real JupyterLab in a real browser.

Needs Chromium (the fixture ``browser`` of conftest.py).
"""

from __future__ import annotations

import re
from pathlib import Path

import every_widget
import nbformat
import pytest
from lab import JupyterLab, Notebook, check_shown, words

from dsv3 import load_model, load_tokenizer
from dsv3.viz.widgets import (
    DraftExplorer,
    NumberLine,
    PlacementExplorer,
    ScaleMicroscope,
    TimelineExplorer,
)

pytestmark = pytest.mark.slow

SHIPPED = Path(__file__).parents[1] / "assets" / "dsv3-mini"
WIDGETS = (
    "Scale microscope", "Number line", "Draft explorer", "Timeline explorer", "Placement explorer",
    "Training run",
)  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory, browser):
    folder = tmp_path_factory.mktemp("book")
    codes = [every_widget.SETUP, *(every_widget.CASES[title].code for title in WIDGETS)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in codes])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "widgets.ipynb")
    with JupyterLab(folder) as server:
        yield server


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
    ours = DraftExplorer(
        load_model(SHIPPED, precision="fp32"), load_tokenizer(SHIPPED), every_widget.TEXT
    )
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


def test_a_timeline_is_bent_by_its_controls(page, tmp_path):
    ours = TimelineExplorer()
    page.scroll_to(ours.title)
    check_shown(page, ours.title, ours.scene())
    choose(page, ours.title, "Schedule", "DualPipe")
    ours.schedule.value = "DualPipe"
    check_shown(page, ours.title, ours.scene())
    for description, control, times in (
        ("Overlap, %", ours.overlap, 5),
        ("W: its weights", ours.weights, 1),
        ("Memory of rank", ours.rank, 2),
        ("Micro-batches", ours.micro_batches, 2),
    ):
        page.press_slider(ours.title, description, "ArrowRight", times)
        control.value += times * control.step
        check_shown(page, ours.title, ours.scene())
    panel = page.panel(ours.title)
    panel.locator("[data-key='rank 1']").click()
    ours.drawing.choose("rank 1")
    check_shown(page, ours.title, ours.scene())
    page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press("Enter")
    ours.drawing.choose("rank 2")
    check_shown(page, ours.title, ours.scene())
    assert page.focused() == {"key": "rank 2", "pressed": "true"}
    panel.locator("[aria-label^='rank 0: '][aria-label*=' together with ']").first.hover()
    assert "F, forward, of micro-batch" in panel.locator(".tip").inner_text()
    page.press_slider(ours.title, "Ranks", "ArrowLeft", 1)
    ours.ranks.value = 7
    panel.get_by_text("8 are shown, not 7").wait_for()
    check_shown(page, ours.title, ours.scene())
    panel.screenshot(path=tmp_path / "timeline.png")


def test_replicas_are_dragged_and_chosen(page, tmp_path):
    ours = PlacementExplorer(replicas=24)
    page.scroll_to(ours.title)
    check_shown(page, ours.title, ours.scene())
    page.press_slider(ours.title, "Replicas", "ArrowRight", 1)
    ours.replicas.value = 32
    check_shown(page, ours.title, ours.scene())
    choose(page, ours.title, "Policy", "global")
    choose(page, ours.title, "GPUs", "4")
    ours.policy.value, ours.gpus.value = "global", 4
    check_shown(page, ours.title, ours.scene())
    panel = page.panel(ours.title)
    panel.locator("[data-key='replicas 16']").click()
    ours.drawing.choose("replicas 16")
    check_shown(page, ours.title, ours.scene())
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("Enter")
    ours.drawing.choose("replicas 20")
    check_shown(page, ours.title, ours.scene())
    assert page.focused() == {"key": "replicas 20", "pressed": "true"}
    panel.locator("[aria-label*='one of 2 copies']").first.hover()
    assert "on GPU" in panel.locator(".tip").inner_text()
    choose(page, ours.title, "Loads", "published example, layer 1")
    ours.loads.index = 1
    choose(page, ours.title, "Groups", "8")
    ours.groups.value = 8
    panel.get_by_text("12 experts make no 8 equal groups").wait_for()
    check_shown(page, ours.title, ours.scene())
    panel.screenshot(path=tmp_path / "placement.png")


def test_a_training_run_is_scrubbed_through(page, tmp_path):
    ours = every_widget.make("Training run", every_widget.names())
    page.scroll_to(ours.title)
    check_shown(page, ours.title, ours.scene())
    page.press_slider(ours.title, "Step", "ArrowRight", 3)
    ours.step.value = 1230
    check_shown(page, ours.title, ours.scene())
    choose(page, ours.title, "Router", "layer 3")
    choose(page, ours.title, "Loads of", "code")
    ours.router.value, ours.load_of.value = "layers.3.ffn.gate", "code"
    check_shown(page, ours.title, ours.scene())
    panel = page.panel(ours.title)
    keys = ours.scene().keys()
    panel.locator(f"[data-key='{keys[50]}']").click()
    ours.drawing.choose(keys[50])
    check_shown(page, ours.title, ours.scene())
    assert (
        f"loss {ours.run.step_at(ours.step.value)['loss']:.3f}"
        in panel.locator(".tip").inner_text()
    )
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("Enter")
    ours.drawing.choose(keys[51])
    check_shown(page, ours.title, ours.scene())
    assert page.focused() == {"key": keys[51], "pressed": "true"}
    panel.locator("[aria-label^='expert 9: ']").hover()
    assert "times the mean" in panel.locator(".tip").inner_text()
    choose(page, ours.title, "Prompt", "1 + 1 =")
    ours.prompt.value = "1 + 1 ="
    check_shown(page, ours.title, ours.scene())
    panel.locator(f"[data-key='{keys[0]}']").click()
    ours.drawing.choose(keys[0])
    panel.get_by_text("The first look at held-out text was at step 400").wait_for()
    check_shown(page, ours.title, ours.scene())
    panel.screenshot(path=tmp_path / "training.png")


def test_they_can_be_read_on_a_dark_page(lab, browser, tmp_path):
    """Words on a colour stay dark or white there, all others are light."""
    lab.use_theme("JupyterLab Dark")
    page = Notebook(browser, lab, "widgets.ipynb", height=2600)
    page.run_all()
    timeline, placement = TimelineExplorer("DualPipe", 8, 16), PlacementExplorer(replicas=24)
    page.scroll_to(timeline.title)
    choose(page, timeline.title, "Schedule", "DualPipe")
    page.press_slider(timeline.title, "Micro-batches", "ArrowLeft", 4)
    training = every_widget.make("Training run", every_widget.names())
    for widget in (timeline, placement, training):
        title = widget.title
        page.scroll_to(title)
        check_shown(page, title, widget.scene())
        shown = (
            page.panel(title)
            .locator("svg text")
            .evaluate_all("nodes => nodes.map(n => [n.style.fill, getComputedStyle(n).fill])")
        )
        for name, colour in shown:
            lightest = max(map(int, re.findall(r"\d+", colour)[:3]))
            assert (lightest > 150) != (name == "var(--dsv3-black)"), (name, colour)
        page.panel(title).screenshot(path=tmp_path / f"{title}, dark.png")
    assert page.complaints == []
