"""Experts shared out over ranks against all of them in one process.

What is expected is computed without the package's exchange: by the dense layer, and for bytes by
going through tokens and choices one by one.
"""

import json
import os
import re
import signal
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_cli import PROMPT, alive, dsv3, linux, members, one_line, pid_of_rank, start_endless

from dsv3 import ModelConfig, Transformer, cli, generate, load_model
from dsv3.checkpoint.contents import open_checkpoint
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.loading import rank_pieces
from dsv3.errors import DSV3Error
from dsv3.fp8 import QuantizedTensor, quantize_activation
from dsv3.moe import MoE
from dsv3.parallel.environment import Place
from dsv3.parallel.experts import ExpertGroup, Holding
from dsv3.parallel.join import neighbours
from dsv3.parallel.replicas import Plan, plan
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision
from dsv3.shipped import model_folder

pytestmark = pytest.mark.slow

CONFIG = ModelConfig.mini().but(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=128,
    moe_intermediate_size=128,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
)
NODES = {2: (2, 1), 4: (4, 2, 1)}  # of ranks: how many on a node
# Busy experts 0 and 5 lie twice: on 2 and 4 ranks; with 16 places on 2, some rank holds one twice.
COPIES = {
    2: Plan((0, 1, 2, 3, 5, 0, 4, 5, 6, 7), 2),
    4: Plan((0, 1, 2, 5, 0, 3, 4, 6, 5, 7, 0, 0), 4),
}

COPIES_16 = plan([float(1 + expert % 5) for expert in range(16)], 20, groups=4, nodes=1, gpus=4)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(precision: str, group: TensorGroup, bias: torch.Tensor) -> MoE:
    """The MoE layer with the same weights on every rank, or this rank's part of them."""
    made = []
    for one in (TensorGroup.single(), group):
        moe = MoE(CONFIG, Precision.of(precision, CONFIG), one)
        if made:
            moe.load_state_dict(made[0], strict=False)  # the others' experts are left over
        else:
            plain = MoE(CONFIG, Precision.of("fp32", CONFIG), one)
            for weight in plain.parameters():
                weight.data.normal_(0, 0.2, generator=random(weight.numel()))
            plain.gate.bias.copy_(bias)
            moe.load_state_dict(plain.state_dict())
            made.append(plain.state_dict())
            whole = moe
    return whole if group.everyone.size == 1 else moe


BIASES = {
    "strongly negative": torch.randn(8, generator=random(1)) * 0.3 - 5,
    "all choose the same experts": torch.tensor([9.0, 9, 0, 0, 0, 9, 0, 0]),
}
LENGTHS = (37, 3, 1)  # shared out evenly, and over more ranks than there are tokens


def outputs(group: TensorGroup) -> dict:
    """What the layer makes of every case, on all ranks."""
    found = {}
    for precision in ("fp32", "fp8"):
        for name, bias in BIASES.items():
            moe = layer(precision, group, bias)
            for length in LENGTHS:
                u = torch.randn(1, length, 128, generator=random(length))
                u = u.to(moe.precision.dtype)
                with torch.inference_mode():
                    found[precision, name, length] = moe(u).float().numpy()
    return found


def everything(ranks: TensorGroup) -> dict:
    """All that processes are needed for, in one start of them: by ranks on a node."""
    found = {}
    for per_node in NODES[ranks.size]:
        for copies in (None, COPIES[ranks.size]):
            experts = ExpertGroup(ranks, per_node=per_node, plans=copies)
            found["outputs", per_node, copies is None] = outputs(TensorGroup(experts=experts))
        for limit in (False, True):
            found["counted", per_node, limit] = counted(ranks, per_node, limit)
    for copies in (None, COPIES[ranks.size]):
        found["gaps", copies is None] = gradient_gaps(ranks, copies)
    found["one token"] = one_token(ranks) if ranks.size == 4 else None
    found["texts"] = [texts(group, precision) for group in groups(ranks) for precision in TEXTS]
    return found


@pytest.fixture(scope="module", params=[2, 4])
def found(request) -> list[dict]:
    """What each of 2 and 4 ranks found."""
    return run_ranks(everything, request.param)


def test_tokens_that_travel_equal_experts_in_one_place(found):
    # fact 53
    wanted = outputs(TensorGroup.single())
    for key in [key for key in found[0] if key[0] == "outputs"]:
        assert found[0][key].keys() == wanted.keys()
        for case, answer in found[0][key].items():
            gap = np.abs(answer - wanted[case]).max() / np.abs(wanted[case]).max()
            assert gap < 1e-6, (key, case)
            assert all((other[key][case] == answer).all() for other in found), (
                "ranks that go on with other numbers choose other tokens"
            )


# Text of the model that comes along --------------------------------------------------------------

TEXTS = ("fp8", "fp32")
PROMPTS = [[0, 401, 805, 771, 982, 588], [0, 12], [0, *range(300, 308)]]


def texts(group: TensorGroup | None, precision: str) -> list:
    """Greedy tokens, plain and drafted, and the logits of a ragged batch."""
    model = load_model("dsv3-mini", precision, group=group)
    options = dict(max_new_tokens=10)
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPTS[2], [*PROMPTS[0], 0, 0, 0]]), lengths=[9, 6])
    return [
        generate(model, PROMPTS, **options),
        generate(model, PROMPTS, speculative=True, num_draft_tokens=2, **options),
        logits.numpy(),
    ]


def groups(ranks: TensorGroup) -> list[TensorGroup]:
    """Attention whole, with experts in equal runs and with copies; attention cut over two."""
    loads = [float(1 + expert % 5) for expert in range(16)]
    copies = {layer: plan(loads[layer:] + loads[:layer], 20, 4, 1, ranks.size) for layer in (2, 4)}
    pair = neighbours(Place(ranks.rank, ranks.size, None), 2)
    return [
        TensorGroup(experts=ExpertGroup(ranks, per_node=1)),
        TensorGroup(experts=ExpertGroup(ranks, plans=copies)),
        TensorGroup(ranks.rank % 2, 2, pair, experts=ExpertGroup(ranks, per_node=2)),
    ]


@pytest.fixture(scope="module")
def texts_alone() -> list:
    return [texts(None, precision) for precision in TEXTS]


def test_text_does_not_depend_on_the_ranks(found, texts_alone):
    wanted = texts_alone * 3
    assert len(found[0]["texts"]) == len(wanted)
    for number, (plain, drafted, logits) in enumerate(wanted):
        for one in found:
            assert one["texts"][number][0] == plain
            assert one["texts"][number][1] == drafted
            assert (one["texts"][number][2] == found[0]["texts"][number][2]).all()
        gap = np.abs(found[0]["texts"][number][2] - logits).max() / np.abs(logits).max()
        assert gap < (1e-5 if number % 2 else 1e-6)


@pytest.mark.parametrize("plans", [None, {2: COPIES_16, 4: COPIES_16}], ids=["even", "copies"])
def test_a_rank_reads_its_experts_and_no_others(plans):
    config, reader, specs = open_checkpoint(model_folder("dsv3-mini"))
    reader.close()
    held: Counter = Counter()
    for rank in range(4):
        experts = ExpertGroup(TensorGroup(rank, 4), plans=plans)
        pieces = [*rank_pieces(specs, config, TensorGroup(experts=experts))]
        mine = {tuple(re.findall(r"(.*)[.]experts[.](\d+)[.]", p.name)) for p in pieces} - {()}
        for ((layer, expert),) in mine:
            number = 4 if layer.startswith("mtp") else int(layer.split(".")[1])
            assert int(expert) in experts.holding(16, number).held[rank]
            held[number, int(expert)] += 1
        others = [piece for piece in pieces if ".ffn.experts." not in piece.name]
        assert len(others) == len([s for s in specs if s.expert is None and not s.copy_of])
    copied = {2, 4} if plans else set()
    for layer in (2, 3, 4):
        for expert in range(16):
            assert held[layer, expert] == (
                COPIES_16.experts.count(expert) if layer in copied else 1
            )


# dsv3 generate --ep ------------------------------------------------------------------------------


def test_ranks_of_the_command(tiny_checkpoint, capsys):
    """One key more in the JSON than without, and a note of who holds how much."""
    words = ["generate", str(tiny_checkpoint), "--prompt", PROMPT, "--max-new-tokens", "8"]
    words.append("--speculative")
    assert cli.main([*words, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    done = json.loads(dsv3(*words, "--json", "--ep", 4, "--tp", 2).stdout)
    assert (done.pop("ep"), done["tp"]) == (4, 2)
    assert done.keys() == alone.keys() and done["results"] == alone["results"]
    assert cli.main([*words, "--ep", "1"]) == 0
    output, errors = capsys.readouterr()
    assert output == PROMPT + alone["results"][0]["text"] + "\n"
    assert "1 rank with 8 routed experts each on" in errors


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ep", "3"], "n_routed_experts: cannot be cut.*found 8, expected a multiple of 3"),
        (["--ep", "4", "--tp", "3"], r"--ep and --tp: .*choose --tp among \[1, 2, 4\]"),
        (["--ep", "8", "--tp", "4"], "cut over 4 ranks|split over 4 ranks"),
        (["--ep", "0"], "--ep: '0' is not a whole number"),
    ],
)
def test_numbers_of_ranks_that_cannot_be(tiny_checkpoint, capsys, words, message):
    assert cli.main(["generate", str(tiny_checkpoint), "--prompt", "x", *words]) == 2
    output, errors = capsys.readouterr()
    assert re.search(message, one_line(errors)) and output == ""


def test_a_converted_checkpoint_says_how_it_runs(tiny_checkpoint, tmp_path):
    convert(tiny_checkpoint, tmp_path / "cut", 2, progress=False)
    for size, tensor in ((2, 1), (2, 2)):
        experts = ExpertGroup(TensorGroup(0, size))
        with pytest.raises(DSV3Error, match="Run with --tp 2 and without --ep"):
            load_model(tmp_path / "cut", group=TensorGroup(0, tensor, experts=experts))


@linux
def test_a_killed_rank_is_named(tiny_checkpoint, tmp_path):
    process = start_endless(tiny_checkpoint, tmp_path, "--ep", "2")
    below = members(process.pid)
    os.kill(pid_of_rank(process, 1), signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "rank 1 of 2 was killed by SIGKILL; the other ranks were" in one_line(errors)
    assert not any(map(alive, below))


# Training -----------------------------------------------------------------------------------------


def own_text(rank: int) -> torch.Tensor:
    """Ragged: 2 * 1, 2 * 4, 2 * 7, ... tokens."""
    return torch.randint(CONFIG.vocab_size, (2, 3 * rank + 1), generator=random(rank))


def loss(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    logits, hidden = model(tokens, return_hidden=True)
    return logits.square().sum() + model.mtp_logits(hidden, tokens)[0].square().sum()


def gradient_gaps(ranks: TensorGroup, copies: Plan | None) -> dict[str, float]:
    """Of each weight, how far its gradient is from a whole model's over all ranks' tokens."""
    experts = ExpertGroup(ranks, per_node=2, own_tokens=True, plans=copies)
    precision = Precision.training("fp32", recompute=copies is not None)
    model = Transformer(CONFIG, precision, TensorGroup(experts=experts)).init_weights(1)
    whole = Transformer(CONFIG, precision).init_weights(1)
    loss(model, own_text(ranks.rank)).backward()
    for rank in range(ranks.size):
        loss(whole, own_text(rank)).backward()
    gaps = {}
    everywhere = dict(whole.named_parameters())
    for name, weight in model.named_parameters():
        mine, wanted = weight.grad, everywhere[name].grad
        if ".ffn.experts." in name:
            held = list(model.get_submodule(name.rpartition(".")[0]).held)
            if copies:  # one sees a part of its expert's tokens
                room = torch.zeros_like(wanted)
                room[held] = mine
                dist.all_reduce(room)
                mine = room
            else:
                wanted = wanted[held]
        else:
            dist.all_reduce(mine)
        gaps[name] = float((mine - wanted).norm() / wanted.norm())
    return gaps


def test_gradients_travel_back(found):
    # fact 53
    for one in found:
        for gaps in (one["gaps", True], one["gaps", False]):
            assert len(gaps) > 30
            assert max(gaps.values()) < 1e-6, gaps


# Nothing is lost, everything is counted -----------------------------------------------------------

WIDTH = 7168


def routed(rank: int, tokens: int, limit: bool) -> torch.Tensor:
    """Eight of 32 experts for each token; with the limit, those of two quarters."""
    scores = torch.rand(tokens, 32, generator=random(rank))
    if limit:
        quarters = torch.rand(tokens, 4, generator=random(rank + 9)).topk(2).indices
        open_ = torch.zeros(tokens, 4, dtype=torch.bool).scatter(1, quarters, True)
        scores = scores * open_.repeat_interleave(8, 1)
    return scores.topk(8).indices


def counted(ranks: TensorGroup, per_node: int, limit: bool) -> dict:
    """Two exchanges at V3's width, in which experts only count."""
    tokens = 5 * ranks.rank  # rank 0 has none
    group = ExpertGroup(ranks, per_node=per_node, own_tokens=True, combine=torch.bfloat16)
    holding = Holding.even(32, ranks.size)
    chosen = routed(ranks.rank, tokens, limit)
    x = torch.randint(1, 9, (tokens, WIDTH), generator=random(3)).float()
    codes = quantize_activation(x, "ue8m0")
    parts = (codes.data, codes.scale)
    arrived = group.dispatch(parts, torch.ones(tokens, 8), chosen, holding)
    mine = (arrived.slots // holding.width == ranks.rank).sum(1)
    codes = QuantizedTensor(*arrived.x, codes.block)
    back = group.combine(codes.dequantize() * mine[:, None], arrived)
    return dict(
        lost=float((back - 8 * x).abs().max()) if tokens else 0.0,
        arrived=int(mine.sum()),
        dispatched=group.dispatched,
        combined=group.combined,
        metadata=sum(group.metadata.bytes.values()),
        nodes=[leg.sent for leg in arrived.legs],
    )


def test_every_byte_is_as_the_formulae_say(found):
    # fact 54
    size = len(found)
    for per_node in NODES[size]:
        for limit in (False, True):
            check_bytes([one["counted", per_node, limit] for one in found], per_node, limit)


def check_bytes(found: list[dict], per_node: int, limit: bool) -> None:
    size = len(found)
    assert sum(one["arrived"] for one in found) == sum(5 * rank * 8 for rank in range(size))
    out = np.zeros((size, 2), int)  # vectors that each rank sends, inside and between
    back = np.zeros((size, 2), int)
    for source in range(size):
        for token in routed(source, 5 * source, limit).tolist():
            owners = {expert // (32 // size) for expert in token}
            nodes = {owner // per_node for owner in owners}
            if limit and per_node == 1:
                assert len(nodes) <= 2  # M
            for node in nodes:
                middle = node * per_node + source % per_node
                if middle != source:
                    out[source, 1] += 1
                    back[middle, 1] += 1
                for owner in owners:
                    if owner // per_node == node and owner != middle:
                        out[middle, 0] += 1
                        back[owner, 0] += 1
    for rank, one in enumerate(found):
        assert one["lost"] == 0
        assert [*one["dispatched"].bytes.values()] == [7392 * n for n in out[rank]]
        assert [*one["combined"].bytes.values()] == [14336 * n for n in back[rank]]
        # Numbers and weights of 8 choices a row, and one number for each rank asked.
        asked = 8 * sum(n - 1 for n in (size // per_node, per_node) if n > 1)
        assert one["metadata"] == 8 * (8 + 4) * out[rank].sum() + asked


def one_token(ranks: TensorGroup) -> list:
    group = ExpertGroup(ranks, per_node=1, own_tokens=True)
    rows = 1 if ranks.rank == 0 else 0
    chosen = torch.tensor([[0, 1, 8, 9, 16, 17, 24, 25]])[:rows]  # two on each of four nodes
    x, weights = torch.ones(rows, WIDTH), torch.ones(rows, 8)
    arrived = group.dispatch((x,), weights, chosen, Holding.even(32, 4))
    return [arrived.legs[0].sent, group.dispatched.messages["between"]]


def test_eight_experts_on_four_nodes_are_four_vectors(found):
    # fact 54
    if len(found) == 4:
        assert found[0]["one token"] == [[1, 1, 1, 1], 3]  # one of them stays at home
        assert [one["one token"] for one in found[1:]] == [[[0, 0, 0, 0], 0]] * 3


# Copies -------------------------------------------------------------------------------------------


def test_copies_of_an_expert_share_its_tokens():
    holding = Holding.planned(COPIES[4])
    chosen = torch.randint(8, (500, 3), generator=random(0))
    for rank in range(4):
        slots = holding.slots(chosen, rank)
        numbers = [
            expert for held in holding.held for expert in (*held, *[-1] * 9)[: holding.width]
        ]
        assert torch.equal(torch.tensor(numbers)[slots], chosen)
        counts = torch.bincount(slots.flatten(), minlength=len(numbers))
        for expert in range(8):
            shares = [int(counts[slot]) for slot, held in enumerate(numbers) if held == expert]
            assert len(shares) == {0: 3, 5: 2}.get(expert, 1)
            assert max(shares) - min(shares) <= 1


def test_the_papers_deployments():
    # fact 57
    loads = [float(1 + expert % 7) for expert in range(256)]
    prefill = Holding.planned(plan(loads, 256 + 32, groups=8, nodes=4, gpus=32))
    assert {len(held) for held in prefill.held} == {9}
    decode = Holding.planned(plan(loads, 256 + 64, groups=1, nodes=1, gpus=320))
    assert {len(held) for held in decode.held} == {1}


def test_what_cannot_be_shared_out_is_named():
    three = TensorGroup(rank=0, size=3)
    with pytest.raises(DSV3Error, match="n_routed_experts.*found 8"):
        Transformer(CONFIG, group=TensorGroup(experts=ExpertGroup(three)))
    with pytest.raises(DSV3Error, match="plan of layer 1.*8 experts on 4 GPUs"):
        Transformer(CONFIG, group=TensorGroup(experts=ExpertGroup(three, plans={1: COPIES[4]})))
    with pytest.raises(DSV3Error, match="cannot be trained"):
        Transformer(
            CONFIG,
            Precision.training("fp32"),
            TensorGroup(experts=ExpertGroup(TensorGroup(rank=0, size=2))),
        )
