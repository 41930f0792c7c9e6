"""Every schedule of the report (TR 4.2) at its breakpoints, and in a run of another length."""

import itertools
import json
import math
from dataclasses import asdict

import pytest

from dsv3.errors import DSV3Error
from dsv3.training import Recipe
from dsv3.training.schedules import BatchRamp, Reach, Schedules

PAPER = Schedules.deepseek_v3()
T = 1e12
SEQUENCE = 4096  # tokens
LATE = 3000  # a step after the warm-up


def rate(tokens: float, schedules: Schedules = PAPER) -> float:
    return schedules.learning_rate.at(LATE, tokens)


def test_warm_up_is_a_line_over_2000_steps():
    at = PAPER.learning_rate.at
    assert at(0, 0) == pytest.approx(2.2e-4 / 2000)
    assert at(999, 12e9) == pytest.approx(1.1e-4)
    assert at(1999, 25e9) == at(2000, 25e9) == 2.2e-4


def test_learning_rate_at_its_breakpoints():
    assert rate(9.999 * T) == rate(10 * T) == 2.2e-4
    for part in (0.01, 0.02, 0.25, 0.5, 0.99):  # of the cosine; 1 - cos x = 2 sin^2 (x / 2)
        fallen = math.sin(math.pi * part / 2) ** 2
        assert rate(10 * T + 4.3 * T * part) == pytest.approx(2.2e-4 - 1.98e-4 * fallen, rel=1e-9)
    assert 2.2e-5 < rate(14.29999 * T) < 2.2001e-5
    assert rate(14.3 * T) == rate(14.632 * T) == 2.2e-5
    assert rate(14.633 * T) == rate(14.8 * T) == 7.3e-6


def test_learning_rate_falls_without_jumps_until_the_last_part():
    values = [rate(10 * T + i * 4.3 * T / 1000) for i in range(1001)]
    assert all(after <= before for before, after in itertools.pairwise(values))
    assert max(before - after for before, after in itertools.pairwise(values)) < 4e-7


def test_parts_add_up_to_the_whole():
    # fact 58
    parts = [10 * T, 4.3 * T, 333e9, 167e9]
    assert sum(parts) == PAPER.total == 14.8 * T
    ends = (
        PAPER.learning_rate.constant_until,
        PAPER.learning_rate.cosine_until,
        PAPER.learning_rate.low_until,
        PAPER.total,
    )
    assert ends == (10 * T, 14.3 * T, 14.633 * T, 14.8 * T)


def test_batch_ramp_at_its_breakpoints():
    at = PAPER.batch.at
    assert at(0) == 3072
    assert at(469e9 / 2) == (3072 + 15360) // 2
    assert at(469e9) == at(470e9) == at(14.8 * T) == 15360
    assert all(type(at(tokens)) is int for tokens in (0, 1e11, 1 * T))
    assert at(469e9 * 0.99999) == 15360 > at(469e9 * 0.999)


def test_steps_of_the_whole_run():
    """242,783: the ramp step by step, the constant batch behind it by division."""
    tokens = steps = 0
    while PAPER.batch.at(tokens) < 15360:
        tokens += SEQUENCE * PAPER.batch.at(tokens)
        steps += 1
    steps += math.ceil((PAPER.total - tokens) / (SEQUENCE * 15360))
    # dn/dt = 1 / (4096 (3072 + 12288 t / 469e9)) gives a logarithm.
    ramp = 469e9 / (SEQUENCE * 12288) * math.log(5)
    assert steps == math.ceil(ramp + (14.8 * T - 469e9) / (SEQUENCE * 15360)) == 242_783


def test_a_ramp_of_no_length_is_its_end():
    assert BatchRamp(first=2, last=8, until=0).at(0) == 8


def test_reach_doubles_at_an_even_pace():
    reach = Reach(first=32, last=256, until=3000)
    assert [reach.at(tokens) for tokens in (0, 1000, 2000, 3000, 9000)] == pytest.approx(
        [32, 64, 128, 256, 256]
    )
    assert Reach(first=5, last=7, until=0).at(0) == 7


def test_lambda_and_gamma_at_their_breakpoints():
    assert PAPER.mtp_weight.at(0) == PAPER.mtp_weight.at(9.999 * T) == 0.3
    assert PAPER.mtp_weight.at(10 * T) == PAPER.mtp_weight.at(14.8 * T) == 0.1
    assert PAPER.bias_speed.at(0) == PAPER.bias_speed.at(14.299 * T) == 0.001
    assert PAPER.bias_speed.at(14.3 * T) == PAPER.bias_speed.at(14.8 * T) == 0


@pytest.mark.parametrize("total", [300, 7.5e6, 29.6e12])
def test_scaled_keeps_proportions(total):
    mine = PAPER.scaled(total, peak=1e-3, warmup_steps=7, batch_first=3, batch_last=6)
    assert mine.total == total
    assert mine.learning_rate.at(0, 0) == pytest.approx(1e-3 / 7)
    assert mine.learning_rate.at(6, 0) == mine.learning_rate.at(7, 0) == 1e-3
    for percent in (1, 30, 67, 68, 80, 90, 96, 97, 98, 99):
        there, here = 14.8 * T * percent / 100, total * percent / 100
        assert rate(here, mine) / 1e-3 == pytest.approx(rate(there) / 2.2e-4)
        assert mine.mtp_weight.at(here) == PAPER.mtp_weight.at(there)
        assert mine.bias_speed.at(here) == PAPER.bias_speed.at(there)
    assert mine.batch.at(0) == 3
    assert mine.batch.at(total * 469 / 14800 / 2) == pytest.approx(4.5, abs=0.5)
    assert mine.batch.at(total * 470 / 14800) == mine.batch.at(total) == 6


def test_recipe_scales_the_reports_schedules():
    recipe = Recipe(tokens=1480, learning_rate=1.0, warmup=10, batch_first=1, batch_last=2)
    schedules = recipe.schedules
    assert [rate(t, schedules) for t in (0, 999, 1430, 1463, 1464)] == pytest.approx(
        [1, 1, 0.1, 0.1, 7.3 / 220]
    )
    assert schedules.learning_rate.at(4, 0) == 0.5
    assert (schedules.batch.at(0), schedules.batch.at(47)) == (1, 2)
    assert (schedules.mtp_weight.at(999), schedules.mtp_weight.at(1000)) == (0.3, 0.1)
    assert (schedules.bias_speed.at(1429), schedules.bias_speed.at(1430)) == (0.001, 0)


@pytest.mark.parametrize(
    "field, value",
    [
        ("tokens", 0),
        ("seq_len", 0),
        ("batch_first", 0),
        ("micro_batch", -1),
        ("log_every", 0),
        ("eval_windows", 0),
        ("extension_batch", 0),
        ("extension_tokens", -1),
    ],
)
def test_impossible_recipes_are_refused_by_name(field, value):
    with pytest.raises(DSV3Error, match=field):
        Recipe(**{field: value})


def test_recipe_survives_json_and_refuses_other_versions():
    recipe = Recipe(tokens=5, betas=(0.8, 0.9), shares={"code": 1.0})
    stored = json.loads(json.dumps(asdict(recipe)))
    assert Recipe.from_dict(stored) == recipe
    with pytest.raises(DSV3Error, match="another version.*\n?.*steps"):
        Recipe.from_dict({**stored, "steps": 3})
    with pytest.raises(DSV3Error, match="clip"):
        Recipe.from_dict({name: value for name, value in stored.items() if name != "clip"})
