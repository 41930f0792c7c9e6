"""Many ranks against one process: gradients added up, moments shared out (ZeRO-1), bytes counted.

``pytest -s tests/test_data_parallel.py`` prints the largest differences that were found.
"""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from training_cases import RECIPE, TINY, little_text, stop_at, window
from training_cases import little as little  # fixtures
from training_cases import texts as texts

from dsv3 import cli, load_model
from dsv3.costs.training import Formats, Layout, data_parallel_bytes, training_memory
from dsv3.fp8 import Fp8Recipe, fp8_linear
from dsv3.model import Transformer
from dsv3.parallel.data import ALIGNED, Shards
from dsv3.parallel.experts import ExpertGroup, Holding
from dsv3.parallel.tensor import TensorGroup
from dsv3.parallel.traffic import all_gather_bytes, all_reduce_bytes, reduce_scatter_bytes
from dsv3.precision import Precision
from dsv3.training import Run
from dsv3.training.balance import RouterWatch
from dsv3.training.optimizer import MOMENTS, AdamW, make_optimizer
from dsv3.training.resuming import CHECKPOINTS
from dsv3.training.sharing import Sharing, cut
from dsv3.training.state import SafetensorsFile, latest_state, whole_state
from dsv3.training.step import StepValues, train_step

pytestmark = pytest.mark.slow

UNEVEN = [(7, 5), (1,), (33,), (300, 70), (0, 3), (2, 3, 4), (129,), (5000,)]
LOOSE = StepValues(learning_rate=1e-3, clip=1e9, micro_batch=16)  # nothing is clipped
TIGHT = replace(LOOSE, clip=0.5)  # everything is


def weights(seed: int = 0) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=random)) for shape in UNEVEN]


# The cut ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("bucket", [1, 1000, 1 << 22])
def test_every_number_has_one_owner(ranks, bucket):
    owned = [torch.zeros(weight.numel()) for weight in weights()]
    sizes = set()
    for rank in range(ranks):
        shards = Shards(weights(), TensorGroup(rank, ranks), bucket=bucket)
        sizes.add(shards.numel)
        assert sum(piece.numel() for piece in shards.pieces) <= shards.numel
        for piece, (index, place) in zip(shards.pieces, shards.spans, strict=True):
            owned[index][place] += 1
            assert place.start % ALIGNED == 0 and piece.numel() == place.stop - place.start
            assert place.stop % ALIGNED == 0 or place.stop == weights()[index].numel()
    assert len(sizes) == 1  # the shares are even
    assert all((count == 1).all() for count in owned)


def test_pieces_lie_in_the_weights():
    own = weights()
    shards = Shards(own, TensorGroup(1, 2))
    with torch.no_grad():
        for piece in shards.pieces:
            piece.fill_(7.0)
    for weight, first in zip(own, weights()):
        changed = weight != first
        assert (weight[changed] == 7.0).all()
    assert sum(int((weight == 7.0).sum()) for weight in own) == sum(
        piece.numel() for piece in shards.pieces
    )


# Weights without a model ------------------------------------------------------------------------


def gradient(index: int, rank: int, step: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(1000 * step + 10 * index + rank)
    return torch.randn(UNEVEN[index], generator=random) * 10.0 ** (rank - 2)


def uneven(group: TensorGroup, bucket: int) -> dict:
    """Three steps over uneven weights with and without ZeRO, and what was sent for them."""
    found = {}
    for moments in ("fp32", "bf16"):
        for zero in (False, True):
            own = weights()
            shards = Shards(own, group, bucket=bucket)
            params = shards.pieces if zero else own
            optimizer = AdamW(
                [{"params": params}],
                lr=1e-2,
                weight_decay=0.1,
                moments=moments,
                shards=[shards] if zero else (),
            )
            before = group.bytes_sent
            for step in range(3):
                for index, weight in enumerate(own):
                    if not (group.rank == 1 and index == 3):  # a weight that no window reached
                        weight.grad = gradient(index, group.rank, step)
                shards.reduce_gradients()
                assert all(weight.grad is None for weight in own)
                if zero:
                    optimizer.step()
                    shards.gather_weights()
                else:
                    shards.gather_gradients()
                    optimizer.step()
                optimizer.zero_grad()
            sent, states = group.bytes_sent - before, optimizer.state.values()
            found[moments, zero] = {
                "weights": [weight.detach().numpy() for weight in own],
                "sent": sent / 3,
                "numel": shards.numel,
                "moments": sum(state[name].nbytes for state in states for name in MOMENTS),
                "whole": [
                    (name, moment.float().numpy()) for _, name, moment in optimizer.whole_moments()
                ],
            }
    return found


def test_uneven_weights_and_the_bytes_of_a_step(together):
    ranks, together = len(together), [rank["uneven"] for rank in together]
    numbers = sum(weight.numel() for weight in weights())
    for moments in ("fp32", "bf16"):
        own = weights()
        optimizer = AdamW([{"params": own}], lr=1e-2, weight_decay=0.1, moments=moments)
        for step in range(3):
            for index, weight in enumerate(own):
                parts = [gradient(index, rank, step) for rank in range(ranks)]
                if index == 3:
                    parts[1] = torch.zeros_like(parts[1])
                weight.grad = sum(parts[1:], parts[0])
            optimizer.step()
        for rank in together:
            whole, zero = rank[moments, False], rank[moments, True]
            for mine, his, theirs in zip(whole["weights"], zero["weights"], own, strict=True):
                assert np.array_equal(mine, theirs.detach().numpy())  # bit for bit
                assert np.array_equal(his, theirs.detach().numpy())
            kept = [(n, optimizer.state[w][n].float().numpy()) for n in MOMENTS for w in own]
            for (name, mine), (wanted, theirs) in zip(zero["whole"], kept, strict=True):
                assert name == wanted and np.array_equal(mine, theirs)
            line = 4 * zero["numel"] * ranks  # bytes of all weights, with what fills the parts up
            assert whole["sent"] == zero["sent"] == all_reduce_bytes(line, ranks)
            assert zero["sent"] == reduce_scatter_bytes(line, ranks) + all_gather_bytes(line, ranks)
            size = 8 if moments == "fp32" else 4
            assert whole["moments"] == size * numbers
        kept = [rank[moments, True]["moments"] for rank in together]
        assert (
            sum(kept) == size * numbers and max(kept) <= size * together[0][moments, True]["numel"]
        )


# The ranks are started once for all of it --------------------------------------------------------


def everything(group: TensorGroup, bucket: int) -> dict:
    return {
        "uneven": uneven(group, bucket),
        "steps": model_steps(group),
        "journey": journey(group),
        "held": held(group),
    }


@pytest.fixture(scope="module", params=[(2, 1 << 22), (4, 1000)], ids=["2 ranks", "4 ranks"])
def together(request):
    ranks, bucket = request.param
    return run_ranks(everything, ranks, bucket)


# Steps of a model -------------------------------------------------------------------------------


def steps(
    group: TensorGroup | None,
    values: StepValues,
    *,
    zero: bool = False,
    experts: bool = False,
    moments: str = "fp32",
    precision: str = "fp32",
    recompute: bool = False,
    rows: int = 4,
    spoil: int | None = None,
) -> dict[str, np.ndarray]:
    """All that three steps leave: weights, biases and moments, in their whole. spoil: in this step,
    one rank finds a gradient that is infinite."""
    sharing = Sharing.of(group, zero=zero, experts=experts)
    if sharing.experts is not None:  # two nodes
        nodes = ExpertGroup(sharing.group, per_node=sharing.group.size // 2, own_tokens=True)
        sharing = replace(sharing, experts=nodes)
    kind = Precision.training(precision, recompute=recompute)
    model = Transformer(TINY, kind, sharing.for_model).init_weights(0)
    optimizer = make_optimizer(
        model, moments=moments, shards=cut(model, sharing.group) if zero else ()
    )
    watch = RouterWatch(model)
    for step in range(3):
        hook = None
        if step == spoil and (group is None or group.rank == 1):
            hook = model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
        found = train_step(model, optimizer, window(rows, seed=step), values, watch, group)
        if hook:
            hook.remove()
        assert np.isfinite(found["grad_norm"]) == (step != spoil)
        assert all(weight.grad is None for weight in model.parameters())
    tensors = whole_state(model, optimizer, 3)
    del tensors["random.torch"]
    return {name: value.float().numpy() for name, value in tensors.items()}


WAYS = {
    "DP": {},
    "ZeRO-1": {"zero": True},
    "EP": {"experts": True},
    "EP and ZeRO-1": {"experts": True, "zero": True},
}
ALL = tuple(WAYS)
CASES = {
    "one window a rank": (LOOSE, {"rows": None}, ALL),
    "clipped, moments in bf16": (TIGHT, {"moments": "bf16"}, ALL),
    "5 windows": (TIGHT, {"rows": 5}, ALL),
    "1 window": (TIGHT, {"rows": 1}, ("ZeRO-1", "EP")),
    "a step that is not finite": (TIGHT, {"spoil": 2}, ("ZeRO-1", "EP and ZeRO-1")),
    "recomputed": (TIGHT, {"rows": 5, "recompute": True}, ("EP",)),
    "fp8": (TIGHT, {"precision": "fp8"}, ("DP", "EP")),
}
ON_FOUR = ("one window a rank", "5 windows", "1 window", "fp8")
# How far from one process: sums are rounded in another order; where a tensor is rounded further,
# some of its numbers come to lie on the other side.
BOUNDS = {"clipped, moments in bf16": 5e-3, "fp8": 5e-2}


def model_steps(group: TensorGroup) -> dict:
    cases = CASES if group.size == 2 else {name: CASES[name] for name in ON_FOUR}
    return {
        (name, way): steps(group, values, **WAYS[way], **rows_for(group.size, options))
        for name, (values, options, ways) in cases.items()
        for way in ways
    }


def rows_for(ranks: int, options: dict) -> dict:
    return {**options, "rows": ranks} if options.get("rows", 0) is None else options


def apart(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The largest difference of a tensor and the one that it should be, by the latter's length."""
    assert found.keys() == wanted.keys()
    return max(
        float(np.linalg.norm(found[name] - value) / max(np.linalg.norm(value), 1e-30))
        for name, value in wanted.items()
    )


def weights_apart(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The same for all weights as one vector."""
    names = [name for name in wanted if name.startswith("model.")]
    one, other = (np.concatenate([x[n].ravel() for n in names]) for x in (found, wanted))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def test_ranks_make_the_steps_of_one_process(together):
    ranks, together = len(together), [rank["steps"] for rank in together]
    for name in CASES if ranks == 2 else ON_FOUR:
        values, options, ways = CASES[name]
        measure = weights_apart if name == "fp8" else apart
        alone = steps(None, values, **rows_for(ranks, options))
        found = {way: together[0][name, way] for way in ways}
        gaps = {way: measure(found[way], alone) for way in ways}
        print(f"{ranks} ranks, {name}:", ", ".join(f"{w} {gap:.1e}" for w, gap in gaps.items()))
        assert max(gaps.values()) < BOUNDS.get(name, 1e-5), name
        for rank in together:
            for way in ways:  # whole tensors are the same on all ranks, bit for bit
                assert apart(rank[name, way], found[way]) == 0.0, (name, way)
        if ways == ALL:
            assert apart(found["ZeRO-1"], found["DP"]) == 0.0, name
            assert apart(found["EP and ZeRO-1"], found["EP"]) == 0.0, name
        if name == "one window a rank":
            assert gaps["DP"] == gaps["ZeRO-1"] == 0.0
    # An expert meets the tokens of all ranks at once, and groups of 128 of them share a scale. So
    # one process differs from itself as far when more windows go through it at once.
    other = steps(None, replace(TIGHT, micro_batch=32), precision="fp8")
    assert gaps["DP"] < 1e-5 < gaps["EP"] < 2 * weights_apart(other, alone)


# What a rank holds and sends --------------------------------------------------------------------


def held(group: TensorGroup) -> dict:
    """In each way: bytes of weights and of moments on this rank, and bytes sent for a step."""
    found = {}
    for way, how in WAYS.items():
        sharing = Sharing.of(group, **{"zero": False, "experts": False, **how})
        model = Transformer(TINY, Precision.training("fp32"), sharing.for_model).init_weights(0)
        cuts = cut(model, group)
        optimizer = make_optimizer(model, shards=cuts if sharing.zero else ())
        watch, before = RouterWatch(model), group.bytes_sent
        train_step(model, optimizer, window(4), LOOSE, watch, group)
        small = 4 + sum(len(load) for load in watch.load.values())  # losses, norm, loads: float64
        found[way] = {
            "weights": sum(value.nbytes for value in (*model.parameters(), *model.buffers())),
            "moments": sum(s[name].nbytes for s in optimizer.state.values() for name in MOMENTS),
            "sent": group.bytes_sent - before - all_reduce_bytes(8 * small, group.size),
            "line": 4 * cuts[0].numel * group.size,
        }
    return found


BIASES = 2 * 8  # of the routers, which costs counts among the weights; no gradient moves them


def test_memory_and_traffic_are_as_costs_has_them(together):
    """Exact but for the zeros that make shares even; they are more in a tiny model."""
    ranks, together = len(together), [rank["held"] for rank in together]
    formats = Formats("fp32", "fp32", "fp32", "fp32")
    for way, how in WAYS.items():
        layout = Layout(dp=ranks, ep=ranks if "experts" in how else 1, zero=int("zero" in how))
        [memory] = training_memory(TINY, layout, formats)
        [sent] = data_parallel_bytes(TINY, layout, formats)
        print(f"{ranks} ranks, {way}: {together[0][way]} bytes")
        kept = sum(rank[way]["moments"] for rank in together)
        assert kept == ranks * memory.moments - BIASES * (8 if "zero" in how else 8 * ranks)
        for rank in together:
            assert rank[way]["weights"] == memory.weights
            assert rank[way]["moments"] == pytest.approx(memory.moments, rel=0.02)
            assert rank[way]["sent"] == all_reduce_bytes(rank[way]["line"], ranks)
            assert rank[way]["sent"] == pytest.approx(sent, rel=0.05)


# What travels in FP8 ----------------------------------------------------------------------------

WIDTH = 7168


def journey(group: TensorGroup) -> dict:
    """Three tokens go to an expert on every rank, and their gradients come back."""
    experts = ExpertGroup(group, own_tokens=True)
    wire = Precision.training("fp8").wire
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(group.rank)).bfloat16()
    x.requires_grad_()
    chosen = torch.arange(group.size).expand(3, -1)
    weights_ = torch.ones(3, group.size)
    arrived = experts.dispatch((x,), weights_, chosen, Holding.even(group.size, group.size), wire)
    out = dict(experts.dispatched.bytes)["inside"]
    arrived.x[0].sum().backward()
    return {
        "out": out,
        "back": dict(experts.combined.bytes)["inside"],
        "same": torch.equal(
            arrived.x[0][3 * group.rank : 3 * group.rank + 3], wire.unpack(*wire.pack(x.detach()))
        ),
        "gradient": x.grad.unique().tolist(),
    }


def test_tokens_travel_in_fp8_and_gradients_in_bfloat16(together):
    # fact 54
    others = 3 * (len(together) - 1)
    wanted = {
        "out": 7392 * others,
        "back": 14336 * others,
        "same": True,
        "gradient": [len(together)],
    }
    assert [rank["journey"] for rank in together] == [wanted] * len(together)


def test_a_product_finds_the_same_codes_in_what_has_travelled():
    random = torch.Generator().manual_seed(0)
    wire = Precision.training("fp8").wire
    x = torch.randn(300, 320, generator=random) * 10.0 ** torch.randint(-5, 3, (300, 1))
    w = torch.randn(64, 320, generator=random)
    results = []
    for rows in (x.bfloat16(), wire.unpack(*wire.pack(x.bfloat16()))):
        weight = w.clone().requires_grad_()
        y = fp8_linear(rows, weight)
        y.square().sum().backward()
        results.append((y.detach(), weight.grad))
    for here, travelled in zip(*results, strict=True):
        assert torch.equal(here, travelled)
    assert Precision.training("fp8", Fp8Recipe(activation_scales="float32")).wire is None


# Runs -------------------------------------------------------------------------------------------

SHARED = replace(RECIPE, batch_first=3, batch_last=4, extension_batch=2, moments="bf16")
SHORT = replace(SHARED, tokens=200, extension_tokens=100)


def tensors_of(folder) -> dict[str, torch.Tensor]:
    with SafetensorsFile(latest_state(folder / CHECKPOINTS) / "state.safetensors") as file:
        return {name: file.read(name).float() for name in file.entries}


# Of each folder, what is shared out until the run is stopped, and after it.
ZERO, EXPERTS = WAYS["ZeRO-1"], WAYS["EP and ZeRO-1"]
FOLDERS = {
    "whole": (ZERO, None),
    "changed": (ZERO, {}),
    "experts": (EXPERTS, None),
    "experts again": (EXPERTS, EXPERTS),
    "experts from one": (None, {"experts": True}),
    "experts no more": ({"experts": True}, ZERO),
}


def runs(group: TensorGroup, folder, texts) -> list[int]:
    """The same run in several folders; the steps from which it went on."""
    little_text()
    begun = []
    for name, (first, then) in FOLDERS.items():
        if first is not None:
            run = Run(TINY, folder / name, SHORT, group=group, **first, **texts)
            run.go() if then is None else stop_at(run, 3, saved=2)
        if then is not None:
            run = Run(TINY, folder / name, SHORT, group=group, **then, **texts)
            begun.append(run.position.step)
            run.go()
    return begun


def test_checkpoints_are_complete_and_any_run_goes_on_from_them(texts, tmp_path):
    stop_at(Run(TINY, tmp_path / "experts from one", SHORT, **texts), 3, saved=2)
    run = Run(TINY, tmp_path / "one", SHORT, **texts)
    figures = run.go()
    assert run_ranks(runs, 2, tmp_path, texts) == [[2] * 4] * 2
    alone = tensors_of(tmp_path / "one")
    assert any(name.startswith("optimizer.exp_avg") for name in alone)
    for name in FOLDERS:
        found = tensors_of(tmp_path / name)
        assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in alone.items()}
        gap = max(float((found[n] - v).norm() / v.norm().clamp(1e-30)) for n, v in alone.items())
        print(f"{name}: {gap:.1e}")
        assert gap < 1e-2, name
    for name, as_if in (("changed", "whole"), ("experts again", "experts")):
        found = tensors_of(tmp_path / name)  # as if never stopped, bit for bit
        for key, value in tensors_of(tmp_path / as_if).items():
            assert torch.equal(found[key], value), (name, key)
    again = Run(TINY, tmp_path / "experts", SHORT, **texts)  # by one process, why not
    assert again.position.step == run.position.step
    for by_domain, wanted in zip(again.go().values(), figures.values(), strict=True):
        assert by_domain == pytest.approx(wanted, rel=1e-3)
    one, other = (load_model(tmp_path / name, precision="fp32") for name in ("one", "experts"))
    text = window()[:, :16]
    with torch.no_grad():
        assert (one(text) - other(text)).norm() < 1e-2 * one(text).norm()


@pytest.mark.parametrize(
    "options, found",
    [
        ("--ranks 3 --ep", "n_routed_experts: cannot be cut over the ranks (found 16"),
        ("--ep 3", "n_routed_experts: cannot be cut over the ranks (found 16"),
        ("--ranks 4 --ep 2", "--ep: experts are shared out over all ranks (found 2, expected 4"),
        ("--ep 0", "--ep: '0' is not a whole number"),
    ],
)
def test_experts_that_cannot_be_shared_out_so(options, found, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        sys.exit(cli.main(["train", "--preset", "mini", "--out", str(tmp_path), *options.split()]))
    assert end.value.code == 2 and found in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
