"""Ranks that were not started alike, or read other files, are told apart before they hang."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_cases
from ranks import run_ranks
from training_cases import RECIPE, TINY, little_text, stop_at

from dsv3.checkpoint.generation_config import GenerationConfig
from dsv3.checkpoint.loading import load_model
from dsv3.commands.answers import Job
from dsv3.commands.terminal import Terminal
from dsv3.errors import DSV3Error
from dsv3.generation.sampling import Chooser, Sampling
from dsv3.generation.tokenizer import load_tokenizer
from dsv3.parallel.agreement import agree_on, digest
from dsv3.parallel.tensor import TensorGroup
from dsv3.training import Run

pytestmark = pytest.mark.slow
texts, little = training_cases.texts, training_cases.little

SHARED = replace(RECIPE, extension_batch=2)
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
    """Three choices on logits that are alike up to rounding, then two on others: of both texts, and
    of the second alone, when the first has ended."""
    choose = Chooser(group, 2, Sampling(), 8)
    draw = torch.Generator().manual_seed(0)
    ids, lines = [], []
    for _ in range(3):
        logits = torch.randn(2, 8, generator=draw)
        logits += 1e-3 * group.rank * torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
        ids.append([[choice.id for choice in row] for row in choose(logits)])
    logits = torch.zeros(2, 8)
    logits[1, 2 + group.rank] = 3.0
    for rows in ([0, 1], [1]):
        try:
            choose(logits[rows], rows)
        except DSV3Error as error:
            lines.append(str(error))
    return [ids, lines]


def both(group: TensorGroup) -> list:
    return [compare(group), choose(group)]


def test_what_differs_is_named_on_all_ranks():
    (first, (ids, told)), (second, (others, lines)) = run_ranks(both, 2)
    assert first == second
    step, weight, more, long = first
    assert step.startswith("step: not the same on all ranks (found 7 on rank 0 (host ")
    assert ", 8 on rank 1 (host " in step
    assert weight.startswith("weight: not the same") and weight.count("digest") == 2
    assert more.startswith("more: not the same") and "found nothing on rank 0" in more
    assert "digest" in long and "long long" not in long
    assert ids == others, "rank 0 chooses"
    assert told == [] and len(lines) == 2
    for line in lines:
        assert line.startswith("choice 4, row 2 of 2: the ranks do not agree (found best")
        assert "2 on rank 0, 3 on rank 1, where its logit is 3.0 higher" in line


def load_otherwise(group: TensorGroup, folder: str) -> list[str]:
    """``dsv3 generate`` with another option on rank 1, then with another weight."""
    args, lines = Namespace(precision="fp32", cache="plain"), []
    model, tokenizer = load_model(folder, "fp32", group=group), load_tokenizer(folder)
    for length, shift in ((8, 0), (8 + group.rank, 0), (8, group.rank)):
        model.layers[1].ffn_norm.weight.data += 1e-3 * shift
        sampling = Sampling(max_new_tokens=length)
        job = Job(args, model, tokenizer, Terminal(group), sampling, GenerationConfig())
        try:
            job.check_agreement()
            lines.append("")
        except DSV3Error as error:
            lines.append(str(error))
    return lines


def test_another_option_and_an_older_file_are_told_before_the_first_token(tiny_checkpoint):
    first, second = run_ranks(load_otherwise, 2, str(tiny_checkpoint))
    assert first == second
    alike, option, weight = first
    assert alike == ""
    assert option.startswith("max_new_tokens: not the same on all ranks (found 8 on rank 0")
    assert weight.startswith("layers.1.ffn_norm.weight: not the same on all ranks (found digest")


def resume_apart(group: TensorGroup, folder: str, texts: dict) -> str:
    """Rank 1's machine does not see the folder that rank 0 writes to."""
    with pytest.MonkeyPatch.context() as patch:
        little_text(patch.setattr)
        try:
            Run(TINY, Path(folder) / str(group.rank), SHARED, group=group, **texts)
        except DSV3Error as error:
            return str(error)
    return ""


def test_a_folder_that_not_all_ranks_see_is_told_before_the_first_step(texts, tmp_path):
    _, line = run_ranks(resume_apart, 2, str(tmp_path / "new"), texts)
    assert "tokenizer.json: not the tokenizer that rank 0 has just written" in line
    stop_at(Run(TINY, tmp_path / "0", SHARED, **texts), step=2)
    first, second = run_ranks(resume_apart, 2, str(tmp_path), texts)
    assert first == second
    assert first.startswith("checkpoint: not the same on all ranks (found")
    assert '"step 2" on rank 0' in first and '"none" on rank 1' in first


def test_one_process_is_asked_nothing():
    agree_on(TensorGroup.single(), {"x": object()})
