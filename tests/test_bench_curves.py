"""Cost curves: their slopes, their file, their figure. No time is asserted."""

import json
import math
from pathlib import Path

import nbformat
import pytest
import torch
from test_bench import SMALL

from dsv3.bench import curves
from dsv3.bench.curves import Curve
from dsv3.bench.rounds import ENOUGH
from dsv3.book import measured
from dsv3.cli import main
from dsv3.viz import cost_curves
from dsv3.viz.cost_curves import cost_curves_figure


def curve(exponent, group="decoding", name="fp32", bottom=0.0):
    points = tuple((x, *[bottom + 0.5 * x**exponent] * 3) for x in (8.0, 16.0, 32.0, 64.0, 128.0))
    return Curve(group, name, "tokens", "ms", points)


@pytest.mark.parametrize("exponent", [0, 0.5, 1, 2])
def test_the_slope_is_the_exponent(exponent):
    assert curve(exponent).slopes() == pytest.approx((exponent, exponent))
    assert curves.slope([(4, 3.0)]) == 0


def test_what_is_always_paid_flattens_the_beginning():
    overall, last = curve(1, bottom=20.0).slopes()
    assert 0 < overall < last < 1
    exact = math.log(84 / 36) / math.log(4)  # between the ends of the last three points
    assert last == pytest.approx(exact, abs=0.05)


def test_a_curve_in_its_file_and_in_words():
    told = json.loads(json.dumps(curve(2).to_dict()))
    assert [tuple(point) for point in told["points"]] == list(curve(2).points)
    assert (told["slope"], told["slope_at_the_end"], told["fitted"]) == (2, 2, 3)
    assert "slope 2.00, at the end 2.00" in curve(2).in_words()


@pytest.fixture
def few_points(monkeypatch):
    for name, sizes in dict(
        CONTEXTS=(2, 4), LENGTHS=(2, 4), TOKENS=(1, 2, 3), EXPERTS=(4, 8)
    ).items():
        monkeypatch.setattr(curves, name, sizes)
    monkeypatch.setattr(curves, "MEMORY", {"write": (8, 16), "read": (8, 16), "experts": (4, 8)})
    monkeypatch.setattr(curves, "apart", lambda kind, *told: {"peak": 1000 * told[0]})


def test_all_curves_are_measured(few_points):
    said = []
    found = list(curves.measure("cpu", 0.001, said.append, SMALL))
    groups = [(each.group, each.name) for each in found]
    assert groups[:4] == [
        ("decoding", "fp32"),
        ("decoding", "fp8"),
        ("prefill", "fp32"),
        ("prefill", "fp8"),
    ]
    assert len(found) == 12 and [group for group, _ in groups[8:]] == ["memory"] * 4
    for each in found:
        assert all(0 < low <= middle <= high for _, low, middle, high in each.points)
    assert [size for size, *_ in found[0].points] == [2, 4] and found[0].rounds >= 1
    assert found[8].slopes() == pytest.approx((1, 1))
    assert any("2 tokens of context" in text for text in said)


def test_memory_jobs_measure_this_process(monkeypatch):
    from dsv3.bench import memory

    monkeypatch.setattr(memory, "CONFIG", SMALL)
    for job in (
        ("read", "40", "fp8"),
        ("write", "40", "fp32"),
        ("experts", "8", "5"),
        ("tokens", "8", "5"),
    ):
        assert memory.job(*job)["peak"] >= 0
    pytest.importorskip("transformers")
    for kind in ("read", "write"):
        assert memory.job(kind, "40", "transformers")["peak"] >= 0


def test_the_command_writes_the_curves(monkeypatch, capsys, few_points, tmp_path):
    monkeypatch.setattr(
        curves, "measure", lambda suite, minutes, say: iter([curve(1), curve(2, "memory")])
    )
    assert main(["bench", "--curves", str(tmp_path / "curves.json")]) == 0
    out = capsys.readouterr().out
    assert out.count("slope") == 2
    found = json.loads((tmp_path / "curves.json").read_text())
    assert found["machine"]["torch"] == torch.__version__ and len(found["curves"]) == 2
    words = cost_curves.in_words(found)
    assert found["machine"]["cpu"] in words and words.count("slope") == 2


def test_the_figure_has_a_panel_for_each_group_and_tells_slopes():
    given = [curve(1), curve(0.5, name="fp8"), curve(2, "prefill"), curve(1, "memory")]
    figure = cost_curves_figure({"curves": [each.to_dict() for each in given]})
    shown = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in shown] == ["decoding", "prefill", "memory"]
    labels = [text.get_text() for text in shown[0].get_legend().get_texts()]
    assert labels == ["fp32: slope 1.00, at the end 1.00", "fp8: slope 0.50, at the end 0.50"]
    measured, fitted = shown[1].lines
    assert list(measured.get_ydata()) == [y for _, _, y, _ in given[2].points]
    assert list(fitted.get_ydata()) == pytest.approx(list(measured.get_ydata())[-3:])
    assert shown[0].get_xscale() == shown[0].get_yscale() == "log"


# What is committed, and what chapter 8 says of it -----------------------------------------------


@pytest.fixture(scope="module")
def told():
    """Curves of the committed file by group and name."""
    return {(each["group"], each["name"]): each for each in measured.cost_curves()["curves"]}


def of(told, group):
    """The curves of a panel."""
    found = [curve for (panel, _), curve in told.items() if panel == group]
    assert found, group
    return found


def test_what_is_committed_is_whole(told):
    """All curves, at all sizes, with slopes that are those of their points."""
    assert "cpu" in measured.cost_curves()["machine"]
    assert [len(of(told, group)) for group in dict.fromkeys(group for group, _ in told)] == [
        2, 2, 2, 2, 4
    ]  # fmt: skip
    for (group, _), each in told.items():
        sizes = [size for size, *_ in each["points"]]
        if group == "decoding":
            assert tuple(sizes) == curves.CONTEXTS and sizes[-1] == 8192
        again = Curve(each["group"], each["name"], "", "", tuple(map(tuple, each["points"])))
        assert again.slopes() == pytest.approx((each["slope"], each["slope_at_the_end"]), abs=0.005)
        assert all(0 < low <= middle <= high for _, low, middle, high in each["points"])


def test_what_the_chapter_says_of_slopes_is_measured(told):
    """Cell costs-answer of chapter 8, sentence by sentence. Measured anew, this says whether the
    words still hold."""
    timed = [curve for curve in told.values() if curve["quantity"] == "ms"]
    assert all(curve["rounds"] >= ENOUGH for curve in timed), "a trial is not measured"
    for curve in of(told, "decoding"):
        (first, _, short, _), (last, _, long, _) = curve["points"][0], curve["points"][-1]
        early = curves.slope([(size, middle) for size, _, middle, _ in curve["points"][:3]])
        assert abs(early) < 0.35 and curve["slope_at_the_end"] > max(early, 0) + 0.05
        assert curve["slope_at_the_end"] < 1
        assert last == 128 * first and long < 10 * short
    for curve in of(told, "prefill"):
        assert curve["slope_at_the_end"] > max(0.9, curve["slope"])
    for group in of(told, "MoE layer, 32 experts"), of(told, "MoE layer, 64 tokens"):
        assert all(curve["slope_at_the_end"] < 1 for curve in group)
    plain, codes = of(told, "MoE layer, 64 tokens")
    assert 0.1 < plain["slope"] < 1 and abs(codes["slope"]) < 0.2
    for name in ("writing one token, with its cache", "MoE layer, 64 tokens, with its weights"):
        assert told["memory", name]["slope"] == pytest.approx(1, abs=0.15)


def test_slopes_are_told_in_lines_that_fit(told):
    lines = measured.slopes(measured.cost_curves()).splitlines()
    assert max(map(len, lines)) <= 85
    assert sum("slope" in line for line in lines) == len(told)
    first = next(iter(told.values()))
    assert lines[0] == "decoding, 64 to 8,192 tokens of context"
    assert lines[1].split()[0] == "fp32" and f"slope {first['slope']:.2f}" in lines[1]


def test_the_chapter_shows_what_was_measured():
    chapter = Path(__file__).parents[1] / "chapters" / "08_full_model.ipynb"
    cells = {cell.id: cell for cell in nbformat.read(chapter, as_version=4).cells}
    found = measured.cost_curves()
    (printed,) = cells["costs-slopes"].outputs
    assert printed.text.strip() == measured.slopes(found).strip(), "run the chapter again"
    (figure,) = cells["costs-figure"].outputs
    assert cost_curves.in_words(found) in figure.data["text/plain"]
