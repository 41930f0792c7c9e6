"""A decode step waits for nothing: no layer asks a tensor for a number, and a compiler can follow a
whole pass. Where padding goes, and who leaves a batch."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3 import ModelConfig, Transformer, load_model
from dsv3.cache import LatentCache, Step, rows_without
from dsv3.cli import main
from dsv3.compiling import CapturedPasses, can_capture
from dsv3.errors import DSV3Error
from dsv3.fp8 import QuantizedTensor, quantize_weight
from dsv3.generation.loop import complete
from dsv3.grouped import one_by_one

SMALL = ModelConfig.mini().but(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    quantization_config=None,
)
CPU = torch.device("cpu")
# Methods by which the host asks a tensor for its values. On a CPU most of them pass no dispatcher.
WORDS = (
    *("tolist", "item", "cpu", "numpy", "nonzero", "__array__", "__contains__", "__format__"),
    *("__bool__", "__int__", "__float__", "__index__", "__complex__"),
)
# Operations whose answer, or whose answer's shape, the host has to know.
ASKS = {
    "_local_scalar_dense",
    "is_nonzero",
    "item",
    "equal",
    "allclose",
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "bincount",
    "repeat_interleave.Tensor",
}


# Who may ask in a step, all of them on a CPU alone: experts one by one, each with its own number of
# rows, and loops that read tensors as arrays.
ALLOWED = ("dsv3.grouped.one_by_one", "dsv3.grouped._with_the_others", "dsv3.kernels.cpu")


class Asks(TorchDispatchMode):
    """Counts what the host asks of tensors: which function of the house asks, and by what."""

    def __init__(self, allowed: tuple[str, ...] = ()):
        super().__init__()
        self.count: Counter[str] = Counter()
        self.allowed, self._answering = allowed, 0
        self._patches = pytest.MonkeyPatch()

    def __enter__(self):
        for word in WORDS:
            self._patches.setattr(torch.Tensor, word, self._listening(word), raising=False)
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.undo()
        return super().__exit__(*error)

    def _listening(self, word: str):
        asked = getattr(torch.Tensor, word)

        def ask(tensor, *arguments, **options):
            self.note(word)
            self._answering += 1  # what an answer takes is no other question
            try:
                return asked(tensor, *arguments, **options)
            finally:
                self._answering -= 1

        return ask

    def note(self, word: str) -> None:
        """Count a question, under the function of the house that asks it."""
        frame = sys._getframe(1)
        while frame.f_back and not frame.f_globals.get("__name__", "").startswith("dsv3"):
            frame = frame.f_back
        where = f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}"
        if not (where.startswith(self.allowed) or self._answering):
            self.count[f"{where}: {word}"] += 1

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function).removeprefix("aten.")
        index = arguments[1] if name.startswith(("index.", "index_put")) else ()
        if {name, name.partition(".")[0]} & ASKS or any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in index
        ):
            self.note(name)
        return function(*arguments, **(options or {}))


def test_the_counter_counts():
    x = torch.tensor([1.0, 0.0])
    with Asks() as asks, torch.inference_mode():
        x.sum().item(), bool(x[0] > 0), int(x[1]), x.nonzero(), x[x > 0], torch.equal(x, x)
        x.tolist(), x.cpu(), x.numpy(), float(x[0]), [0, 1][x[0].long()], 1.0 in x
        x[x > 0] = 2.0
        x + x, x.sort(), x.topk(1), x[torch.tensor([0])]
        if x[0]:
            one_by_one(torch.matmul, x[None], [x[:, None]], torch.tensor([1]))
    assert sum(asks.count.values()) == 15, asks.count
    assert asks.count["dsv3.grouped.one_by_one: tolist"] == 1
    assert isinstance(x.tolist(), list) and "ask" not in repr(torch.Tensor.tolist)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@torch.inference_mode()
def test_no_layer_asks_a_tensor_for_a_number(tiny_checkpoint, precision):
    """Decoding of even and of ragged rows, verification of drafts, drafting, and prefill."""
    model = load_model(tiny_checkpoint, precision)
    cache, drafts = model.new_cache(2, 40), model.new_draft_cache(2, 40)
    text = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(0))
    for width, lengths in ((9, None), (1, None), (3, [3, 1]), (1, None), (12, [0, 12])):
        tokens = text[:, :width]
        step, counts = model._step(tokens, cache, lengths)
        with Asks(ALLOWED) as asks:
            hidden = model._read(tokens, step, cache)
            model._logits(hidden, counts, last_only=True)
        assert not asks.count, f"{width} tokens"
        cache.advance(counts)
        step, counts = model._step(tokens, drafts, lengths, layers=1)
        with Asks(ALLOWED) as asks:
            model.mtp[0](hidden, model.embed(tokens), step, drafts.one(0))
        assert not asks.count, f"a draft behind {width} tokens"
        drafts.advance(counts)


@torch.inference_mode()
def test_a_step_of_generation_waits_twice_for_the_tokens_alone(tiny_checkpoint):
    """Whatever the number of rows: for whether the logits are numbers, and for the choice. Whether
    ids are in the vocabulary is asked at the door, on the CPU, where they are."""
    model = load_model(tiny_checkpoint, "fp32")
    for rows in (1, 5):
        with Asks(ALLOWED) as asks:
            complete(model, [[1, 2]] * rows, max_new_tokens=6, temperature=1.0, eos_ids=())
        sampling = "dsv3.generation.sampling"
        assert asks.count.pop("dsv3.model._step: __bool__") == 2 * 6
        assert asks.count == {
            f"{sampling}.probabilities: __bool__": 6,
            f"{sampling}.draw_each: tolist": 6,
        }


# Where things are kept ---------------------------------------------------------------------------


@torch.inference_mode()
def test_padding_never_touches_what_is_kept():
    """A full row beside a short one, a row that is fed nothing, and padding that would stand beyond
    the last place."""
    model = Transformer(SMALL).init_weights(0)
    text = torch.randint(96, (3, 12), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(3, 12)
    model(text[:, :11], cache=cache, lengths=[11, 5, 3])
    model(text[:, :1], cache=cache, lengths=[1, 0, 1])
    before, ids = cache.data.clone(), cache.ids.clone()
    fed = torch.randint(96, (3, 7), generator=torch.Generator().manual_seed(1))
    wide = model(fed, cache=cache, lengths=[0, 7, 1], last_only=True)
    assert cache.lengths == [12, 12, 5]
    for row, (kept, now) in enumerate(((12, 12), (5, 12), (4, 5))):
        assert torch.equal(cache.data[:, row, :kept], before[:, row, :kept])
        assert torch.equal(cache.ids[row, :kept], ids[row, :kept])
        assert cache.tokens(row) == [*ids[row, :kept].tolist(), *fed[row, : now - kept].tolist()]
    whole = torch.cat([text[1:2, :5], fed[1:2]], 1)
    torch.testing.assert_close(wide[1], model(whole)[0, -1], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_table_in_the_cache_turns_as_the_config_says():
    """Also beyond the length that YaRN stretches, and on copies that are longer."""
    config = ModelConfig.mini()
    cache = LatentCache(config, 1, 1, 700, torch.float32, "cpu")
    for made in (cache, cache.copies(2, 900)):
        step = Step.make(config, [680], [9], 9, CPU)
        assert torch.equal(made.turns[680:689], step.rotation[0])
    assert cache.data.nbytes == 700 * config.latent_dim * 4 and cache.max_seq_len == 700
    tables = 701 * (8 + 4 * config.qk_rope_head_dim)  # ids and turns, as padding's place has them
    assert cache.nbytes == 701 * config.latent_dim * 4 + tables


@torch.inference_mode()
@pytest.mark.parametrize("rows", [[0, 3], [3, 1], [1, 2, 3], [3, 0, 2, 1], [2]])
@pytest.mark.parametrize("kind", ["plain", "fp8"])
def test_rows_that_stay_stand_as_they_are_told(rows, kind):
    """Each with its own text behind it, and no more is copied than rows that move."""
    model = Transformer(SMALL).init_weights(0)
    text = torch.randint(96, (4, 9), generator=torch.Generator().manual_seed(0))
    cache, lengths = model.new_cache(4, 16, dtype=kind), [3, 9, 5, 7]
    model(text, cache=cache, lengths=lengths)
    others = [model.new_cache(1, 16, dtype=kind) for _ in rows]
    for row, other in zip(rows, others):
        model(text[row : row + 1, : lengths[row]], cache=other)
    where, width = cache.data.data_ptr(), cache.data.shape[-1]
    with Copies() as copies:
        cache.keep(rows)
    moved = [row for place, row in enumerate(rows) if place != row]
    longest = max([lengths[row] for row in moved], default=0)
    assert copies.count == len(moved) * longest * (SMALL.num_hidden_layers * width + 1)
    assert cache.data.data_ptr() == where
    assert [cache.tokens(place) for place in range(len(rows))] == [o.tokens(0) for o in others]
    fed = torch.arange(2 * len(rows)).view(-1, 2)
    logits = model(fed, cache=cache, lengths=[2] + [1] * (len(rows) - 1), last_only=True)
    for place, other in enumerate(others):
        wanted = model(fed[place : place + 1, : 2 if place == 0 else 1], cache=other)[0, -1]
        torch.testing.assert_close(logits[place], wanted, rtol=1e-4, atol=1e-4)


class Copies(TorchDispatchMode):
    """Counts the values that are written by index."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if "index_put" in str(function):
            self.count += arguments[2].numel()
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("rows", range(1, 7))
def test_who_leaves_is_replaced_by_the_last(rows):
    for picked in itertools.product((False, True), repeat=rows):
        leaving = [row for row in range(rows) if picked[row]]
        order = rows_without(leaving, rows)
        assert sorted(order) == [row for row in range(rows) if not picked[row]]
        moved = sum(place != row for place, row in enumerate(order))
        assert moved == sum(picked[: len(order)])  # as few as can be


@pytest.mark.parametrize(
    "options, kind",
    [
        ({}, "plain"),
        (dict(temperature=1.0), "plain"),
        (dict(speculative=True), "plain"),
        (dict(temperature=1.0, speculative=True), "fp8"),
    ],
)
def test_a_text_in_fp8_is_the_same_whoever_leaves(tiny_checkpoint, options, kind):
    """Rows end one after the other; each text is that of the row alone, draws included."""
    model = load_model(tiny_checkpoint, "fp8", cache=kind)
    prompts = [[7, 8, 9], [1], [5, 6, 7, 8, 9, 10], [3, 4], [11, 12, 13]]
    free = complete(model, prompts, max_new_tokens=20, eos_ids=(), seed=4, **options)
    eos = [free.ids[row][place] for row, place in ((0, 3), (2, 8), (4, 13))]
    together = complete(model, prompts, max_new_tokens=20, eos_ids=eos, seed=4, **options)
    assert len({len(ids) for ids in together.ids}) >= 3
    for whole, ids in zip(free.ids, together.ids):
        assert ids == whole[: len(ids)]
    caches = [model.new_cache(5, 30), model.new_draft_cache(5, 30)]
    given = dict(cache=caches[0], draft_cache=caches[1] if "speculative" in options else None)
    stayed = complete(model, prompts, max_new_tokens=20, eos_ids=eos, seed=4, **given, **options)
    assert stayed.ids == together.ids  # a cache that is given keeps its rows


# Questions that are asked at the door ------------------------------------------------------------


def test_scales_whose_values_overflow_are_refused_when_a_weight_is_taken():
    config = SMALL.but(num_nextn_predict_layers=0)
    codes = quantize_weight(torch.randn(64, 96))
    large = QuantizedTensor(codes.data, torch.full_like(codes.scale, 2.0**120))
    with pytest.raises(DSV3Error, match="^w: a scale is so large that values overflow"):
        large.check("w")
    assert large.dequantize().isfinite().any()  # its values can be looked at nevertheless
    model = Transformer(config, "fp8")
    state = Transformer(config).init_weights(0).state_dict()
    state["layers.0.ffn.w2.weight"], state["layers.0.ffn.w2.scale"] = large.data, large.scale
    with pytest.raises(DSV3Error, match="w2.weight: a scale is so large"):
        model.load_state_dict(state)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_a_captured_pass_is_replayed_on_what_is_new(first, monkeypatch):
    """Of every shape one pass is captured, when it comes again; each replay reads this pass's
    tokens and places, and writes into this cache, whether or not it is inference that goes on. What
    stands in for a GPU's graph runs the same call again."""
    captured = []

    def capture(_, run):
        result = run()
        captured.append(run)

        @torch.inference_mode()
        def replay():
            result.copy_(run())

        return replay, result

    monkeypatch.setattr(CapturedPasses, "_capture", capture)
    model, replayed = Transformer(SMALL).init_weights(0), CapturedPasses()
    text = torch.randint(96, (3, 20), generator=torch.Generator().manual_seed(0))
    caches = [model.new_cache(3, 24), model.new_cache(3, 24), model.new_cache(3, 24)]
    starts = [[9, 2, 5], [9, 2, 5], [4, 4, 4]]
    with first():
        for cache, lengths in zip(caches, starts):
            model(text[:, :9], cache=cache, lengths=lengths)
    for place, mode in enumerate([first] * 4 + [torch.no_grad, torch.inference_mode]):
        tokens = text[:, 9 + place : 10 + place]
        for number, cache in enumerate(caches):
            counts = [1, int(place < 3), 1]
            with mode():
                if number == 0:
                    wanted = model(tokens, cache=cache, lengths=counts, return_hidden=True)[1]
                    continue
                step = Step.make(SMALL, cache.lengths, counts, 1, CPU, cache.turns, total=24)
                hidden = replayed(model._read, tokens, step, cache)
            cache.advance(counts)
            if number == 1:
                torch.testing.assert_close(hidden[[0, 2]], wanted[[0, 2]], rtol=1e-4, atol=1e-4)
        assert len(captured) == (0 if place == 0 else 2)
    assert caches[1].tokens(0) == caches[0].tokens(0)
    assert caches[1].tokens(1) == caches[0].tokens(1) and caches[2].lengths == [10, 7, 10]


# What a compiler sees ----------------------------------------------------------------------------

PROGRAM = """
import json, sys, torch
from torch._dynamo.utils import counters
from dsv3 import load_model
from dsv3.generation.loop import complete
torch.set_num_threads(1)
told = {}
for precision in ("fp32", "bf16", "fp8"):
    model = load_model(sys.argv[1], precision)
    options = dict(max_new_tokens=9, eos_ids=(), speculative=precision == "fp8")
    wanted = complete(model, [[7, 8, 9]], **options)
    model.compile("eager")  # no code is written, but all is followed; a break would be an error
    graphs = []
    for times in range(2):
        run = complete(model, [[7, 8, 9]], **options)
        graphs.append(counters["stats"]["unique_graphs"])
    told[precision] = [run.ids == wanted.ids, graphs, sum(counters["graph_break"].values())]
print(json.dumps(told))
"""


def test_a_decode_step_has_no_graph_break(tiny_checkpoint):
    """In a process whose annotations are not checked: a compiler would follow the checks. A pass
    over one token has two programs, dense and experts; verifying and drafting have theirs."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_checkpoint)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before = 0
    for precision, (same, graphs, breaks) in json.loads(done.stdout).items():
        assert same and breaks == 0, precision
        assert 2 <= graphs[0] - before <= 7, "programs of a kind of layer, not of a step"
        assert graphs[1] == graphs[0], "a second text finds all its programs"
        before = graphs[1]


CAPTURED = """
import json, sys, torch
from dsv3 import load_model
from dsv3.compiling import CapturedPasses
from dsv3.generation.loop import complete
torch.set_num_threads(1)
shapes, passes = [], 0

def capture(_, run):  # a GPU's graph repeats a call
    global passes
    result = run()
    shapes.append(run.args[0].shape[0])
    def replay():
        global passes
        passes += 1
        with torch.inference_mode():
            result.copy_(run())
    return replay, result

CapturedPasses._capture = capture
model = load_model(sys.argv[1], "fp8")
prompts, options = [[7, 8, 9], [1], [5, 6, 7, 8], [3, 4], [11, 12]], dict(max_new_tokens=20)
free = complete(model, prompts, eos_ids=(), **options)
eos = [free.ids[row][place] for row, place in ((0, 3), (2, 8), (4, 13))]
wanted = complete(model, prompts, eos_ids=eos, **options)
model.compile("eager")
untouched = model._compiled.captured  # nothing is captured on a CPU
model._compiled.captured = CapturedPasses()
found = complete(model, prompts, eos_ids=eos, **options)
before = model._compiled.captured
model.to("cpu")
print(json.dumps([untouched, wanted.ids == found.ids, [len(ids) for ids in found.ids], shapes,
                  passes, before is model._compiled.captured]))
"""


def test_a_text_by_captured_passes_is_the_same(tiny_checkpoint):
    """Through the door, compiled and captured, while rows end: the batch shrinks to powers of two,
    since each number of rows is a pass of its own. A model that is moved forgets its passes."""
    done = subprocess.run(
        [sys.executable, "-c", CAPTURED, str(tiny_checkpoint)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    untouched, same, lengths, shapes, passes, kept = json.loads(done.stdout)
    assert untouched is None and same and not kept
    assert len(set(lengths)) >= 3 and len(shapes) == len(set(shapes)) and passes > 10
    assert set(shapes) <= {5, 4, 2, 1}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_pass_is_captured_where_nothing_in_it_waits(precision, monkeypatch):
    """Experts one by one have to know their rows on the host; kernels and grouped products not."""
    pytest.importorskip("triton")
    model, gpu = Transformer(SMALL, precision), torch.device("cuda")
    assert not can_capture(model, CPU)
    monkeypatch.setattr("dsv3.moe.can_group", lambda row, stack: True)
    monkeypatch.setattr("dsv3.fp8.experts.pick_backend", lambda device, backend: "triton")
    assert can_capture(model, gpu)
    monkeypatch.setattr("dsv3.kernels.experts.is_hopper", lambda device: False)
    assert can_capture(model, gpu) == (precision != "fp8")
    monkeypatch.setattr("dsv3.moe.can_group", lambda row, stack: stack.shape[-1] != 32)  # of w2
    assert not can_capture(model, gpu)


def test_compiling_for_several_ranks_is_refused(tiny_checkpoint, capsys):
    arguments = ["generate", str(tiny_checkpoint), "--prompt", "a", "--compile", "--tp", "2"]
    assert main(arguments) != 0
    assert "compile: compiled code runs on one rank (found 2 ranks" in capsys.readouterr().err
