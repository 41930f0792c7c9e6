"""Many ranks against one process: gradients added up, moments shared out (ZeRO-1), bytes counted.

``pytest -s tests/test_data_parallel.py`` prints the largest differences that were found.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from training_cases import RECIPE, TINY, little_text, stop_at, window
from training_cases import little as little  # fixtures
from training_cases import texts as texts

from dsv3.model import Transformer
from dsv3.parallel.data import ALIGNED, Shards
from dsv3.parallel.tensor import TensorGroup
from dsv3.parallel.traffic import all_gather_bytes, all_reduce_bytes, reduce_scatter_bytes
from dsv3.precision import Precision
from dsv3.training import Run
from dsv3.training.balance import RouterWatch
from dsv3.training.optimizer import MOMENTS, AdamW, make_optimizer
from dsv3.training.resuming import CHECKPOINTS
from dsv3.training.sharing import cut
from dsv3.training.state import SafetensorsFile, latest_state
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
            assert sorted(name for name, _ in zero["whole"]) == sorted(MOMENTS * len(UNEVEN))
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
    return {"uneven": uneven(group, bucket), "steps": model_steps(group)}


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
    moments: str = "fp32",
    rows: int = 4,
    spoil: int | None = None,
) -> dict[str, np.ndarray]:
    """All that three steps leave: weights, biases and whole moments. spoil: in this step, one rank
    finds a gradient that is infinite."""
    model = Transformer(TINY, Precision.training("fp32")).init_weights(0)
    optimizer = make_optimizer(model, moments=moments, shards=cut(model, group) if zero else ())
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
    result = {name: value.detach().numpy() for name, value in model.named_parameters()}
    result |= {name: value.numpy() for name, value in model.named_buffers()}
    names = {value: name for name, value in model.named_parameters()}
    for weight, key, moment in optimizer.whole_moments():
        result[f"{names[weight]} {key}"] = moment.float().numpy()
    return result


CASES = {
    "one window a rank": (LOOSE, {"rows": None}),
    "clipped": (TIGHT, {}),
    "clipped, moments in bf16": (TIGHT, {"moments": "bf16"}),
    "5 windows": (TIGHT, {"rows": 5}),
    "a step that is not finite": (TIGHT, {"spoil": 2}),
}


def model_steps(group: TensorGroup) -> dict:
    return {
        (name, zero): steps(group, values, zero=zero, **rows_for(group.size, options))
        for name, (values, options) in CASES.items()
        for zero in (False, True)
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


def test_ranks_make_the_steps_of_one_process(together):
    ranks, together = len(together), [rank["steps"] for rank in together]
    for name, (values, options) in CASES.items():
        alone = steps(None, values, **rows_for(ranks, options))
        plain, zero = together[0][name, False], together[0][name, True]
        print(f"\n{ranks} ranks, {name}: apart from one process {apart(plain, alone):.1e}", end="")
        print(f" (DP), {apart(zero, alone):.1e} (ZeRO-1); the two {apart(zero, plain):.1e}", end="")
        for rank in together:
            for kind in (False, True):
                assert apart(rank[name, kind], plain) == 0.0, name  # bit for bit
        if name == "one window a rank":
            assert apart(plain, alone) == 0.0
        assert apart(plain, alone) < (1e-2 if "bf16" in name else 1e-5), name


# Runs -------------------------------------------------------------------------------------------

SHARED = replace(RECIPE, batch_first=3, batch_last=4, extension_batch=2, moments="bf16")
SHORT = replace(SHARED, tokens=200, extension_tokens=100)


def tensors_of(folder) -> dict[str, torch.Tensor]:
    with SafetensorsFile(latest_state(folder / CHECKPOINTS) / "state.safetensors") as file:
        return {name: file.read(name).float() for name in file.entries}


def runs(group: TensorGroup, folder, texts) -> list[int]:
    """The same run in several folders: never stopped, stopped and gone on with, and changed to and
    from ZeRO-1 on the way."""
    little_text()
    begun = []
    for name, first, then in (
        ("whole", True, None),
        ("again", True, True),
        ("changed", True, False),
        ("from one", None, True),
    ):
        if first is not None:
            run = Run(TINY, folder / name, SHORT, group=group, zero=first, **texts)
            run.go() if then is None else stop_at(run, 3, saved=2)
        if then is not None:
            run = Run(TINY, folder / name, SHORT, group=group, zero=then, **texts)
            begun.append(run.position.step)
            run.go()
    return begun


def test_checkpoints_are_complete_and_any_run_goes_on_from_them(texts, tmp_path):
    stop_at(Run(TINY, tmp_path / "from one", SHORT, **texts), 3, saved=2)
    run = Run(TINY, tmp_path / "one", SHORT, **texts)
    run.go()
    assert run_ranks(runs, 2, tmp_path, texts) == [[2, 2, 2]] * 2
    alone = tensors_of(tmp_path / "one")
    assert any(name.startswith("optimizer.exp_avg") for name in alone)
    whole = tensors_of(tmp_path / "whole")
    assert {n: v.shape for n, v in whole.items()} == {n: v.shape for n, v in alone.items()}
    for name in ("again", "changed"):  # as if never stopped, bit for bit
        found = tensors_of(tmp_path / name)
        assert all(torch.equal(found[key], value) for key, value in whole.items()), name
    for found in (whole, tensors_of(tmp_path / "from one")):
        for name, value in alone.items():
            assert (found[name] - value).norm() <= 1e-2 * value.norm(), name
    again = Run(TINY, tmp_path / "again", SHORT, **texts)  # by one process, why not
    assert again.position.step == run.position.step
