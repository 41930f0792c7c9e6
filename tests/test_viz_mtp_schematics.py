"""Chapter 5's schematics: what they say of tokens, shapes and chances is right.

That nothing on them is cut or covered is held for all schematics in ``test_viz_schematics``.
"""

import pytest

from dsv3 import costs
from dsv3.config import ModelConfig
from dsv3.viz import drafting_schematics as drafting
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


# Drafting ---------------------------------------------------------------------------------------


def latents(scene: Scene, y: float) -> list[str]:
    """Colours of the cells of a cache, from left to right."""
    found = [m for m in scene.marks if isinstance(m, Rect) and m.height == 14 and m.y == y]
    return [mark.fill for mark in sorted(found, key=lambda mark: mark.x)]


def caches(scene: Scene) -> dict[float, list[str]]:
    heights = {m.y for m in scene.marks if isinstance(m, Rect) and m.height == 14}
    return {y: latents(scene, y) for y in sorted(heights)}


@pytest.mark.parametrize(
    ("drafts", "chosen"),
    [
        ((" be",), (" be", ".")),
        ((" be",), (" say",)),
        ((" be", ",", " and"), (" be", ",", " that")),
        ((" be", ",", " and"), (" be", ",", " and", " so")),
        ((" be", ",", " and"), (" do",)),
    ],
)
def test_the_caches_hold_what_the_code_holds(drafts, chosen):
    """Before the pass n latents; in it n + 1 + k; after it one for each token but the last."""
    text, k, accepted = ("To", "be", ",", "or"), len(drafts), len(chosen) - 1
    scene = drafting.draft_and_verify(text, drafts, chosen)
    n = len(text) - 1
    main, draft, in_pass, draft_in_pass, after, draft_after = caches(scene).values()
    assert main == ["blue"] * n
    assert draft == ["blue"] * n + ["orange"] * (k - 1)  # with one draft never a guess
    assert in_pass == ["blue"] * (n + 1) + ["orange"] * k
    assert draft_in_pass == draft_after == ["blue"] * n
    assert after == ["blue"] * (n + 1) + ["green"] * accepted + ["paper"] * (k - accepted)
    shown = texts(scene)
    assert shown.count("=") == accepted and shown.count("≠") == (accepted < k)
    assert f"{len(chosen)} token{'s' * (len(chosen) > 1)} from one pass" in shown
    assert f"{accepted} of {k} drafts are accepted" in scene.alt


def test_passes_that_cannot_be_are_refused():
    for drafts, chosen in (((), ("a",)), (("a",), ()), (("a",), ("b", "c")), (("a",), ("a",))):
        with pytest.raises(ValueError, match="draft"):
            drafting.draft_and_verify(("To", "be"), drafts, chosen)
    with pytest.raises(ValueError, match="2 tokens"):
        drafting.draft_and_verify(("To",))


def test_kept_and_missing_make_up_p():
    p, q = (0.5, 0.3, 0.2), (0.2, 0.6, 0.2)
    scene = drafting.rejection_rule(p, q, ("yes", "no", "maybe"))
    bars = [m for m in scene.marks if isinstance(m, Rect) and m.width == 44]
    unit = sum(m.height for m in bars[-2:])  # the last bar: p over all words
    for index, (a, b) in enumerate(zip(p, q)):
        middle = 580 / 3 * (index + 0.5)
        near = [m for m in bars if abs(m.x + 22 - middle) < 50]
        for shift, whole in ((-25, b), (25, a)):
            parts = {m.fill: m.height / unit for m in near if m.x + 22 == middle + shift}
            assert parts["green"] == pytest.approx(min(a, b))
            assert sum(parts.values()) == pytest.approx(whole)
            assert set(parts) <= {"green", "grey" if shift < 0 else "orange"}
    assert texts(scene).count("0.7") == 2
    for bad in ((0.5, 0.3, 0.3), (1.2, -0.4, 0.2)):
        with pytest.raises(ValueError, match="sum 1"):
            drafting.rejection_rule(bad, q)
    with pytest.raises(ValueError, match="2 to 5 words"):
        drafting.rejection_rule(p, q, ("yes", "no"))


def test_a_busy_batch_waits_for_arithmetic_and_a_lonely_text_for_memory():
    large = ModelConfig.deepseek_v3()
    # By hand: 36.6 billion weights, a byte each at 3.35 TB/s, two FLOPs each at 1,978 TFLOP/s.
    (read, multiply), (full_read, full_multiply) = costs.pass_milliseconds(large, [1, 8192])
    assert read == pytest.approx(36.625618432 / 3.35, rel=1e-6)
    assert multiply == pytest.approx(2 * 36.625618432 / 1978, rel=1e-6)
    whole = 671.026419 - 129280 * 7168 / 1e9  # all weights but the embedding
    assert full_read == pytest.approx(whole / 3.35, rel=1e-4) and full_multiply > full_read
    shown = texts(drafting.busy_batch((1, 256, 4096)))
    assert [t for t in shown if "takes" in t] == [
        f"a pass takes × {r}" for r in ("1.5", "1.0", "1.5")
    ]
    assert "more experts" in shown and "read anyway" in shown and "arithmetic is full" in shown
    with pytest.raises(ValueError, match="1 to 4"):
        drafting.busy_batch(())
