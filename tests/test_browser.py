"""What a reader sees and does: a real JupyterLab in a real browser, moved by the keyboard.

Needs Chromium (the fixture ``browser`` of conftest.py).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import every_widget
import nbformat
import pytest
from lab import JupyterLab, Notebook, check_shown

from dsv3 import load_model, load_tokenizer
from dsv3.book.saved import clean
from dsv3.viz.widgets import KVCacheCalculator, LoadBalanceSimulator, RoutingExplorer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
WIDGETS = ("Routing explorer", "KV-cache calculator", "Load-balancing simulator")
CELLS = [every_widget.CASES[title].code for title in WIDGETS]
CELLS[0] = f"{every_widget.SETUP}\n{CELLS[0]}"


@pytest.fixture(scope="module")
def book(tmp_path_factory, browser) -> Path:
    """A copy of the book's folder, so that nothing stored is touched, with one more notebook."""
    folder = tmp_path_factory.mktemp("book")
    shutil.copytree(
        ROOT / "chapters", folder / "chapters", ignore=shutil.ignore_patterns(".ipynb_checkpoints")
    )
    (folder / "assets").symlink_to(ROOT / "assets")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    clean(notebook)  # as a chapter is
    nbformat.write(notebook, folder / "chapters" / "widgets.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(book):
    with JupyterLab(book) as server:
        yield server


@pytest.fixture(scope="module")
def page(lab, browser):
    """The three widgets in one notebook, on a light page."""
    notebook = Notebook(browser, lab, "chapters/widgets.ipynb", height=2400)
    notebook.run_all()
    yield notebook
    assert notebook.complaints == []


@pytest.fixture(scope="module")
def explorer():
    return new_explorer()


def new_explorer() -> RoutingExplorer:
    """The same widget on this side, to say what the page has to show."""
    model = load_model(ROOT / "assets" / "dsv3-mini", precision="fp32")
    return RoutingExplorer(model, load_tokenizer(ROOT / "assets" / "dsv3-mini"), every_widget.TEXT)


def test_first_pictures_are_those_of_the_still_ones(page, explorer, tmp_path):
    for widget in (explorer, KVCacheCalculator(), LoadBalanceSimulator()):
        check_shown(page, widget.title, widget.scene())
        page.panel(widget.title).screenshot(path=tmp_path / f"{widget.title}.png")
        assert (tmp_path / f"{widget.title}.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    "description, control, key, times",
    [
        ("Bias strength", "strength", "ArrowLeft", 4),
        ("Groups allowed", "groups", "ArrowRight", 1),
        ("Experts (top-k)", "top_k", "ArrowUp", 2),
        ("Layer", "layer", "ArrowLeft", 1),
        ("Token", "token", "ArrowLeft", 3),
    ],
)
def test_a_slider_moved_by_keys_changes_picture_and_numbers(
    page, explorer, description, control, key, times
):
    before = page.words(explorer.title)
    page.press_slider(explorer.title, description, key, times)
    ours = getattr(explorer, control)
    step = times * (1 if key in ("ArrowRight", "ArrowUp") else -1)
    if control == "layer":
        ours.index += step
    else:
        ours.value += step * getattr(ours, "step", 1)
    check_shown(page, explorer.title, explorer.scene())
    assert page.words(explorer.title) != before


def test_sliders_say_their_name_and_their_value_as_it_is_shown(page):
    """At first and after a move; ipywidgets' own text for "80 GB" is the number of the choice."""
    said = {}
    for title in WIDGETS:
        said |= dict(
            page.panel(title)
            .locator("[role='slider']")
            .evaluate_all(
                "nodes => nodes.map(n => [n.ariaLabel, n.getAttribute('aria-valuetext')])"
            )
        )
    assert said["Memory for it"] == "80 GB" and said["Skew of experts"] == "0.50"
    assert said["Bias speed γ"] == "0.001" and len(said) == 13
    handle = page.slider("KV-cache calculator", "Memory for it").locator("[role='slider']")
    for key, now in (("ArrowRight", "160 GB"), ("ArrowLeft", "80 GB")):
        handle.press(key)
        page.page.wait_for_function(
            "([node, text]) => node.ariaValueText === text", arg=[handle.element_handle(), now]
        )


def test_widgets_of_one_page_share_no_id_and_nothing_scrolls_inside(page):
    page.panel("Load-balancing simulator")
    ids = page.page.locator(".dsv3-drawing [id]").evaluate_all("nodes => nodes.map(n => n.id)")
    assert len(ids) == len(set(ids)) == 3
    assert (
        page.page.evaluate("""() => [...document.querySelectorAll(".jp-OutputArea *")].filter(
        node => (node.scrollHeight > node.clientHeight
                 && /auto|scroll/.test(getComputedStyle(node).overflowY))
             || (node.scrollWidth > node.clientWidth
                 && /auto|scroll/.test(getComputedStyle(node).overflowX))).length""")
        == 0
    )


def test_tab_leads_from_the_last_slider_into_the_picture(page):
    """Past the slider's number, which can be edited, to a mark that the arrow keys move."""
    page.slider("KV-cache calculator", "Memory for it").locator("[role='slider']").focus()
    for _ in range(2):
        page.page.keyboard.press("Tab")

    def label() -> str:
        return page.page.evaluate("() => document.activeElement.dataset.label ?? ''")

    assert label().startswith("DeepSeek-V3, MLA: ")
    page.page.keyboard.press("ArrowDown")
    assert label().startswith("DeepSeek-V3 as MQA: ")


def test_a_slider_dragged_by_the_pointer(page):
    calculator = KVCacheCalculator()
    track = page.slider(calculator.title, "Tokens a text").locator(".noUi-base")
    box = track.bounding_box()
    track.click(position={"x": box["width"] - 1, "y": box["height"] / 2})
    calculator.tokens.value = 163_840
    check_shown(page, calculator.title, calculator.scene())


def test_the_other_widgets_follow_their_sliders(page):
    calculator, simulator = KVCacheCalculator(), LoadBalanceSimulator()
    calculator.tokens.value = 163_840
    page.press_slider(calculator.title, "Bytes a value", "ArrowRight", 1)
    calculator.itemsize.value = 1
    check_shown(page, calculator.title, calculator.scene())
    page.press_slider(simulator.title, "Bias speed γ", "ArrowRight", 2)
    simulator.gamma.value = 0.01
    check_shown(page, simulator.title, simulator.scene())


def test_a_token_is_chosen_with_the_keyboard(page, explorer):
    """Tab into the drawing, arrows between its marks, Enter; the focus stays where it was."""
    page.slider(explorer.title, "Experts (top-k)").locator("[role='slider']").focus()
    page.page.keyboard.press("Tab")  # the slider's number, which can be edited
    page.page.keyboard.press("Tab")
    assert page.focused()["key"] == f"token {explorer.token.value}"
    page.page.keyboard.press("Home")
    for _ in range(2):
        page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("Enter")
    explorer.token.value = 2
    check_shown(page, explorer.title, explorer.scene())
    assert page.focused() == {"key": "token 2", "pressed": "true"}
    page.page.keyboard.press("ArrowDown")  # on to the groups and experts, which only say numbers
    assert page.focused()["key"] is None
    assert re.search(r"group \d", page.panel(explorer.title).locator(".tip").inner_text())
    assert "jp-mod-editMode" not in page.page.locator(".jp-Notebook").first.get_attribute("class")


def test_a_token_is_chosen_with_the_pointer_and_hover_shows_numbers(page, explorer):
    panel = page.panel(explorer.title)
    panel.locator("[data-key='token 5']").click()
    explorer.token.value = 5
    check_shown(page, explorer.title, explorer.scene())
    expert = next(label for label in explorer.scene().labels() if label.startswith("expert 9 "))
    panel.locator("[aria-label^='expert 9 ']").hover()
    assert panel.locator(".tip").inner_text() == expert
    page.page.mouse.move(5, 5)
    assert panel.locator(".tip").is_hidden()


def test_a_text_is_typed_and_one_that_cannot_be_read_is_refused(page, explorer):
    field = page.panel(explorer.title).locator("input[type='text']").first
    field.fill("O Romeo, Romeo!")
    field.press("Enter")
    explorer.text.value = "O Romeo, Romeo!"
    check_shown(page, explorer.title, explorer.scene())
    field.fill("")
    field.press("Enter")
    page.panel(explorer.title).get_by_text("there is no text").wait_for()
    check_shown(page, explorer.title, explorer.scene())


def test_the_next_day(page, lab, browser, book, tmp_path):
    """Saved after a run and opened again: still pictures that say how to move them."""
    page.page.locator(".dsv3-drawing").nth(2).wait_for()  # the run has drawn all three
    page.save()
    again = Notebook(browser, lab, "chapters/widgets.ipynb", height=2400)
    again.page.locator(".jp-OutputArea-output img").nth(2).wait_for()
    assert again.page.locator(".jp-OutputArea-output img").count() == 3
    assert not again.page.locator(".dsv3-drawing").count()
    stored = nbformat.read(book / "chapters" / "widgets.ipynb", as_version=4)
    assert [cell.outputs[-1].data["text/plain"].partition(".")[0] for cell in stored.cells] == [
        f"[Figure: {title}" for title in WIDGETS
    ]
    again.page.screenshot(path=tmp_path / "next_day.png")
    assert not again.page.get_by_text("Error displaying widget").count()
    assert again.complaints == []
    again.page.close()


def test_a_chapter_that_is_only_opened(lab, browser, book):
    """Nothing of it changes when it is saved, an exercise names the section to run first, and a
    link of the ledger opens the chapter that it names."""
    path = book / "chapters" / "00_start_here.ipynb"
    before = path.read_bytes()
    page = Notebook(browser, lab, "chapters/00_start_here.ipynb")
    page.page.get_by_text("| Idle").wait_for()  # what is known of the kernel goes into the notebook
    page.page.locator(".lm-TabBar-tab.jp-mod-dirty").wait_for(state="attached")
    page.save()
    assert path.read_bytes() == before
    ids = [cell.id for cell in nbformat.reads(before.decode(), as_version=4).cells]
    page.go_to(ids.index("ex-next-token"))
    page.page.keyboard.press("Control+Enter")
    page.page.get_by_text("run the cell under “Before you start” first").wait_for()
    page.go_to(ids.index("equations"))
    page.page.get_by_role(
        "link", name="2 · Equations 1, 2 and 5: latent, keys, values"
    ).first.click()
    page.page.get_by_role("heading", name="Equations 1, 2 and 5: latent, keys, values").wait_for()
    page.page.close()


def test_the_explorer_in_its_chapter_on_a_dark_page(lab, browser, tmp_path):
    """Chapter 3 from top to bottom; words are light there."""
    explorer = new_explorer()
    lab.use_theme("JupyterLab Dark")
    page = Notebook(browser, lab, "chapters/03_moe_gating.ipynb")
    page.run_all()
    page.scroll_to(explorer.title)
    check_shown(page, explorer.title, explorer.scene())
    page.press_slider(explorer.title, "Bias strength", "ArrowRight", 4)
    explorer.strength.value = 2.0
    check_shown(page, explorer.title, explorer.scene())
    word = page.panel(explorer.title).locator("svg text").first
    colour = word.evaluate("node => getComputedStyle(node).fill")
    assert min(map(int, re.findall(r"\d+", colour)[:3])) > 150, colour
    page.panel(explorer.title).screenshot(path=tmp_path / "dark.png")
    assert page.complaints == []
