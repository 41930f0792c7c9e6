"""Chapter 5's widget without a browser: the record of the passes, and what is shown of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv3 import ModelConfig, Transformer, generate, load_model, load_tokenizer
from dsv3.errors import DSV3Error
from dsv3.generation.loop import complete, stream
from dsv3.viz import scene as scenes
from dsv3.viz.draft_scene import STAGES
from dsv3.viz.drafted import record
from dsv3.viz.scene import Scene, still
from dsv3.viz.widgets import DraftExplorer, draft_explorer
from dsv3.viz.widgets.explorer import token_text

SHIPPED = Path(__file__).parents[1] / "assets" / "dsv3-mini"
PROMPT = "To be, or not to be"


@pytest.fixture(scope="module")
def shipped():
    return load_model(SHIPPED, precision="fp32"), load_tokenizer(SHIPPED)


@pytest.fixture
def explorer(shipped):
    return DraftExplorer(*shipped, PROMPT, tokens=24)


def texts(scene: Scene) -> list[str]:
    return [mark.text for mark in scene.marks if isinstance(mark, scenes.Text)]


# The record -------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_record_is_what_the_stream_did(shipped, drafts, temperature):
    model, tokenizer = shipped
    prompt = tokenizer.encode(PROMPT)
    options = dict(tokenizer=tokenizer, temperature=temperature, seed=3)
    ours = record(model, prompt, 30, drafts, **options)
    options |= dict(max_new_tokens=30, speculative=True, num_draft_tokens=drafts, eos_ids=())
    account = complete(model, [prompt], **options)
    assert list(ours.ids) == account.ids[0]
    assert len(ours.rounds) == account.passes
    assert ours.acceptance == pytest.approx(account.acceptance)
    run, seen = stream(model, [prompt], **options), []
    for _ in run:
        (done,) = run.last_pass
        if done is not None and not any(done is old for old in seen):
            seen.append(done)
    drafted = [each for each in ours.rounds if each.drafts]
    assert len(drafted) == len(seen)
    for each, done in zip(drafted, seen):
        assert [place.draft.id for place in each.places if place.draft] == list(done.drafts)
        assert [place.chosen.id for place in each.places if place.chosen] == list(done.chosen)
        assert each.accepted == done.accepted
        for at, place in enumerate(each.places):
            for chance in (*place.likely, *filter(None, (place.draft, place.chosen))):
                assert chance.p == float(done.p[at, chance.id])
                assert chance.q is None or chance.q == float(done.q[at, chance.id])
            if place.draft:
                q, p = place.draft.q, place.draft.p
                assert place.accepting == pytest.approx(min(1, p / q))
                missing = (done.p[at] - done.q[at]).clamp(min=0).sum()
                assert place.missing == pytest.approx(float(missing))


def test_states_and_cache_lengths_follow_the_rules(shipped):
    model, tokenizer = shipped
    prompt = tokenizer.encode(PROMPT)
    ours = record(model, prompt, 30, 3, tokenizer=tokenizer, temperature=1.0)
    assert len(ours.states()) == len(ours.ids) == 30
    start, states = 1, set()
    for each in ours.rounds:
        stands = [place for place in each.places if place.chosen]
        assert each.start == start
        assert [place.chosen.id for place in stands] == list(ours.ids[start : start + len(stands)])
        start += len(stands)
        assert each.held == (
            len(prompt) + each.start - 1,
            len(prompt) + each.start + each.drafts,
            len(prompt) + start - 1,
        )
        kinds = [place.state for place in each.places]
        states |= set(kinds)
        assert kinds[: each.accepted] == ["accepted"] * each.accepted
        assert kinds[each.accepted] == ("extra" if each.accepted == each.drafts else "replaced")
        assert set(kinds[each.accepted + 1 :]) <= {"dropped"}
    assert states == {"accepted", "replaced", "extra", "dropped"}


def test_nothing_large_and_no_graph_is_kept(explorer):
    """Plain numbers: no tensor hangs on the record, and the model asks for no gradient."""
    kept = repr(explorer.drafted())
    assert "tensor" not in kept and len(kept) < 60_000
    assert not any(weight.grad_fn for weight in explorer.model.parameters())


# The picture ------------------------------------------------------------------------------------


def test_greedy_text_is_that_of_plain_decoding(shipped):
    model, tokenizer = shipped
    explorer = DraftExplorer(model, tokenizer, PROMPT, temperature=0.0, tokens=20)
    plain = generate(model, [tokenizer.encode(PROMPT)], 20, tokenizer=tokenizer, eos_ids=())[0]
    assert list(explorer.drafted().ids) == plain
    shown = texts(explorer.scene())
    assert all(token_text(tokenizer, id)[:12] in " ".join(shown) for id in plain)


def test_the_counters_are_those_of_the_record(explorer):
    drafted = explorer.drafted()
    passes = len(drafted.rounds)
    assert texts(explorer.scene())[0] == (
        f"23 tokens in {passes} passes, {23 / passes:.2f} a pass; plain decoding takes 23. "
        f"{100 * drafted.acceptance:.0f}% of {drafted.drafts} drafts accepted"
    )


def test_every_token_says_who_proposed_it_and_with_what_probabilities(explorer):
    explorer.drafts.value = 3
    drafted, said = explorer.drafted(), explorer.scene().labels()
    places = [place for each in drafted.rounds for place in each.places if place.chosen]
    words = {
        "accepted": "draft, accepted",
        "replaced": "the model's, for a rejected draft",
        "extra": "the model's, after the drafts",
    }
    for at, place in enumerate(places, start=1):
        label = next(label for label in said if label.startswith(f"token {at + 1}:"))
        assert words[place.state] in label
        if place.draft:
            assert f"q = {place.draft.q:.3f}, p = {place.draft.p:.3f}" in label
            assert f"min(1, p/q) = {place.accepting:.3f}" in label


@pytest.mark.parametrize(
    "control, value",
    [
        ("prompt", "O Romeo"),
        ("temperature", 0.0),
        ("drafts", 4),
        ("seed", 5),
        ("number", 2),
        ("stage", 0),
        ("stage", 1),
        ("stage", 2),
    ],
)
def test_each_control_of_the_drafts_changes_the_picture(explorer, control, value):
    explorer.number.value = 4
    before = explorer.drawing.scene
    getattr(explorer, control).value = value
    assert explorer.drawing.scene != before
    assert explorer.drawing.scene == explorer.scene().as_dict()


def test_stepping_does_not_run_the_model(explorer, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the model was asked")

    monkeypatch.setattr(draft_explorer, "record", refuse)
    for number in range(1, explorer.number.max + 1):
        explorer.number.value = number
        for stage in range(4):
            explorer.stage.value = stage
            still(explorer.scene()) if number == 1 else explorer.scene()


def test_stages_show_only_what_is_known_by_then(explorer):
    at = next(
        at
        for at, each in enumerate(explorer.drafted().rounds)
        if any(place.state == "replaced" for place in each.places)
    )
    explorer.number.value = at + 1
    seen = []
    for stage in range(len(STAGES)):
        explorer.stage.value = stage
        shown = texts(explorer.scene())
        rects = [mark for mark in explorer.scene().marks if isinstance(mark, scenes.Rect)]
        seen.append(
            (
                any(text.startswith(("p 0.", "p 1.")) for text in shown),
                any(text.startswith("✗") for text in shown),
                any(rect.hatched for rect in rects),
            )
        )
    assert seen == [
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, True, True),
    ]


def test_tokens_stages_and_doors_are_chosen_by_their_keys(explorer):
    explorer.drawing._hear(None, {"chosen": "token 10"}, None)
    now = explorer.drafted().rounds[explorer.number.value - 1]
    stands = sum(place.chosen is not None for place in now.places)
    assert now.start <= 10 < now.start + stands
    before = explorer.number.value
    explorer.drawing.choose("later")
    assert explorer.number.value == before + 1
    explorer.drawing.choose("earlier")
    assert explorer.number.value == before
    explorer.drawing.choose("stage 1")
    assert explorer.stage.value == 1
    explorer.number.value = 1
    assert "earlier" not in explorer.scene().keys()  # noqa: SIM118
    explorer.drawing.choose("earlier")
    assert explorer.number.value == 1
    for junk in ({"chosen": "token 99"}, {"chosen": 3}, {}, "later"):
        explorer.drawing._hear(None, junk, None)
    assert explorer.number.value == 1


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("", "there is no text"),
        (" \n", "there is no text"),
        ("word " * 1100, "leaves no room"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused_in_words(explorer, prompt, said):
    before = explorer.drawing.scene
    explorer.prompt.value = prompt
    assert said in explorer.message() and "still shows the text before" in explorer.message()
    assert explorer.drawing.scene == before
    explorer.prompt.value = "Better."
    assert explorer.message() == "" and explorer.drawing.scene != before


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_very_short_text_is_drawn(shipped, tokens):
    explorer = DraftExplorer(*shipped, PROMPT, drafts=4, tokens=tokens)
    assert len(explorer.drafted().ids) == tokens
    still(explorer.scene())


def test_a_model_without_mtp_is_refused(shipped):
    config = ModelConfig.mini().but(num_nextn_predict_layers=0)
    with torch.inference_mode(), pytest.raises(DSV3Error, match="cannot draft"):
        DraftExplorer(Transformer(config).init_weights(0), shipped[1], PROMPT)
