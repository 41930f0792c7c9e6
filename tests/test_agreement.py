"""Ranks that were not started alike, or read other files, are told apart before they hang."""

import torch
from ranks import run_ranks

from dsv3.errors import DSV3Error
from dsv3.generation.sampling import Chooser, Sampling
from dsv3.parallel.agreement import agree_on, digest
from dsv3.parallel.tensor import TensorGroup

SAME = {"words": ["a", 1, None], "weight": torch.arange(4.0), "step": 7}


def test_digests_differ_with_content_and_with_nothing_else():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    one = torch.arange(6.0).view(2, 3)
    assert digest(one) == digest(one.t().contiguous().t()) != digest(one + 1e-6)
    assert digest(torch.ones(2, dtype=torch.bfloat16)) == digest(
        torch.ones(2, dtype=torch.bfloat16)
    )


def compare(group: TensorGroup) -> list[str]:
    """Facts that are alike; then one that differs on the last rank, or that it alone has."""
    last, lines = group.rank == group.size - 1, []
    agree_on(group, SAME)
    for change in (
        {"step": 8},
        {"weight": torch.tensor([0.0, 1.0, 2.0, 3.5])},
        {"more": "than others"},
        {"step": "long " * 40},
    ):
        try:
            agree_on(group, SAME | (change if last else {}))
            lines.append("")
        except DSV3Error as error:
            lines.append(str(error))
    agree_on(group, SAME)  # all have said the same words to each other, and go on
    return lines


def choose(group: TensorGroup) -> list:
    """Three choices on logits that are alike up to rounding, then one on others."""
    choose = Chooser(group, 2, Sampling(), 8)
    draw = torch.Generator().manual_seed(0)
    ids, line = [], ""
    for _ in range(3):
        logits = torch.randn(2, 8, generator=draw)
        logits += 1e-3 * group.rank * torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
        ids.append([[choice.id for choice in row] for row in choose(logits)])
    logits = torch.zeros(2, 8)
    logits[1, 2 + group.rank] = 3.0
    try:
        choose(logits)
    except DSV3Error as error:
        line = str(error)
    return [ids, line]


def both(group: TensorGroup) -> list:
    return [compare(group), choose(group)]


def test_what_differs_is_named_on_all_ranks():
    (first, (ids, told)), (second, (others, line)) = run_ranks(both, 2)
    assert first == second
    step, weight, more, long = first
    assert step.startswith("step: not the same on all ranks (found 7 on rank 0 (host ")
    assert ", 8 on rank 1 (host " in step
    assert weight.startswith("weight: not the same") and weight.count("digest") == 2
    assert more.startswith("more: not the same") and "found nothing on rank 0" in more
    assert "digest" in long and "long long" not in long
    assert ids == others, "rank 0 chooses"
    assert told == "" and line.startswith(
        "choice 4, row 2 of 2: the ranks do not agree (found best"
    )
    assert "2 on rank 0, 3 on rank 1, where its logit is 3.0 higher" in line


def test_one_process_is_asked_nothing():
    agree_on(TensorGroup.single(), {"x": object()})
