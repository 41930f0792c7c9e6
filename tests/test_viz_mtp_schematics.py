"""Chapter 5's schematics: what they say of tokens, shapes and chances is right.

That nothing on them is cut or covered is held for all schematics in ``test_viz_schematics``.
"""

import pytest

from dsv3.config import ModelConfig
from dsv3.viz import mtp_schematics as mtp
from dsv3.viz.scene import Rect, Scene, Text

TOKENS = ("To", "be", ",", "or", "not", "to", "sleep")


def at_height(scene: Scene, top: float, bottom: float) -> list[str]:
    """Texts between two heights, from left to right."""
    found = [m for m in scene.marks if isinstance(m, Text) and top < m.y < bottom]
    return [mark.text for mark in sorted(found, key=lambda mark: mark.x)]


def texts(scene: Scene) -> list[str]:
    return [mark.text for mark in scene.marks if isinstance(mark, Text)]


def column(scene: Scene, x: float, width: float) -> list[str]:
    found = [m for m in scene.marks if isinstance(m, Text) and abs(m.x - x) < width / 2]
    return [mark.text for mark in sorted(found, key=lambda mark: mark.y)]


@pytest.mark.parametrize("at", [1, 3, 5])
@pytest.mark.parametrize("leak", [False, True])
def test_each_position_is_fed_the_next_token_and_asked_for_the_one_after(at, leak):
    scene = mtp.time_shift(TOKENS, at=at, leak=leak)
    places = {m.text: m.x for m in scene.marks if isinstance(m, Text) and m.y == 16}
    for i in range(1, len(TOKENS) - 1):
        down = [t for t in column(scene, places[str(i)], 84) if not t.startswith("at i")]
        number, reads, asked, *module = down
        fed, target = module[-2:]
        assert (number, reads, asked) == (str(i), TOKENS[i - 1], TOKENS[i])
        assert module[0] == "h" + mtp.subscript(i)
        assert fed == TOKENS[i + 1 if leak else i] and target == TOKENS[i + 1]
    red = [m for m in scene.marks if isinstance(m, Rect) and m.fill == "vermillion"]
    assert len(red) == (2 if leak else 0)
    assert ("leak" in scene.alt) == leak


def test_positions_without_targets_are_refused():
    with pytest.raises(ValueError, match="3 to 10"):
        mtp.time_shift(("To", "be"))
    with pytest.raises(ValueError, match="from 1 to 5"):
        mtp.time_shift(TOKENS, at=6)


def test_shapes_in_the_module_are_those_of_the_config():
    large = texts(mtp.inside_the_module())
    assert "7,168 × 14,336" in large and "(b, s, 129,280)" in large
    small = ModelConfig.from_pretrained("assets/dsv3-mini")
    shown = texts(mtp.inside_the_module(small))
    d = small.hidden_size
    assert f"{d} × {2 * d}" in shown and f"(b, s, {2 * d})" in shown
    assert shown.count(f"(b, s, {d})") == 5
    order = [m.x for m in mtp.inside_the_module().marks if isinstance(m, Text) and m.y == 189]
    assert order == sorted(order)  # embedding, state and the words beside them


def test_the_first_answer_reaches_the_module_and_not_the_second_head():
    shown = texts(mtp.heads_and_module())
    assert shown.count("tᵢ₊₁") == shown.count("tᵢ₊₂") == 2
    assert "chosen" in shown and "head 2" in shown
