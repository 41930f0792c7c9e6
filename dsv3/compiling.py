"""Decoding as compiled code: ``model.compile()``.

A step of decoding is hundreds of small operations, and on small models, or on a GPU, Python needs
longer to name them than the processor to do them. ``torch.compile`` writes one program for a layer
instead. This keeps it cheap:

* *Layers, not the model.* All layers of a kind (dense, experts, MTP) run the same program, with
  other weights: seconds of compiling, however many layers there are.
* *Few shapes.* Rows of the batch and keys are variables of the program; one row, or one token a
  row, are programs of their own. Keys are rounded up to a multiple of 256, masked where there are
  none, so that a graph captured on a GPU serves 256 steps.
* *One launch a pass.* On a GPU a whole pass is captured as a CUDA graph, and launched in one call;
  not where something in it waits for the GPU (experts one by one, where no kernel serves them).
* *Decoding alone.* Prefill is limited by arithmetic, which nobody computes faster, and each length
  would be another shape.

It is the same text: what rounds, rounds at the same points. In bf16 and fp32, sums may be taken in
another order. Several ranks are refused: a compiler would have to take their sums over all ranks
for operations too, and no test holds that to anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3.block import Block
from dsv3.cache import LatentCache, OneLayer, Step
from dsv3.errors import DSV3Error
from dsv3.moe import Experts
from dsv3.mtp import MTPModule

Run = Callable[[Tensor, Step, LatentCache], Tensor]

# Tokens a row in a pass that counts as decoding: the last token and drafts.
MOST_TOKENS = 8
# Keys that a pass sees are rounded up to a multiple of this.
KEYS = 256
# Programs of one function: for each kind of layer and each form of a pass. torch expects 8.
_MOST_PROGRAMS = 32


def check_can_compile(ranks: int) -> None:
    """Raise DSV3Error for a model on several ranks."""
    if ranks > 1:
        raise DSV3Error(
            "compiled code runs on one rank",
            where="compile",
            found=f"{ranks} ranks",
            expected="1",
            fix="Leave it out, or use one rank",
        )


def can_capture(model: nn.Module, device: torch.device) -> bool:
    """Whether a pass of decoding can be captured: on a GPU, where it waits for nothing."""
    experts = (module for module in model.modules() if isinstance(module, Experts))
    return device.type == "cuda" and not any(each.waits for each in experts)


class CompiledLayers:
    """Runs layers as compiled code. backend: torch.compile's. captures: whether whole passes are
    captured, too (``can_capture``)."""

    def __init__(self, backend: str, captures: bool):
        self.backend = backend
        self._block = _program(Block.forward, backend)
        self._module = _program(MTPModule.forward, backend)
        self.captured = CapturedPasses() if captures else None

    def fitting_rows(self, texts: int) -> int:
        """How many rows a batch of so many texts had better have. Each number of rows is a pass to
        be captured, so these are few: powers of two."""
        return texts if self.captured is None else 1 << (texts - 1).bit_length()

    @staticmethod
    def serves(cache: LatentCache | None, width: int) -> bool:
        """Whether a pass over so many tokens a row is decoding."""
        return (
            cache is not None
            and width <= MOST_TOKENS
            and 0 not in cache.lengths
            and not torch.is_grad_enabled()
        )

    def __call__(
        self, layer: nn.Module, *states: Float[Tensor, "b s d"], step: Step, kept: OneLayer
    ) -> Float[Tensor, "b s d"]:
        """layer(*states, step, kept)."""
        program = self._module if isinstance(layer, MTPModule) else self._block
        try:
            with torch._dynamo.config.patch(recompile_limit=_MOST_PROGRAMS):
                return program(layer, *states, _without_complex(step), kept)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise DSV3Error(
                "the model cannot be compiled here",
                where="compile",
                found=str(error.__cause__ or error).strip().splitlines()[0],
                fix="Install a C++ compiler (g++), or leave --compile out",
            ) from None


def _program(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    options: dict[str, str | int | bool | Callable] = {}
    if backend == "inductor":  # what is rounded between two operations is, too, where they are one
        options["emulate_precision_casts"] = True
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend, options=options)


def _without_complex(step: Step) -> Step:
    return replace(step, rotation=torch.view_as_real(step.rotation))


class CapturedPasses:
    """Passes over a model as CUDA graphs: one for a cache, a number of rows, of tokens and of keys.

    A captured pass reads and writes where it did when it was captured. So tokens and step are
    copied there, and a cache stays where it is. What comes once is not captured. All captured
    passes share the memory of what lies between their operations: one runs at a time, and its
    result is copied before the next. (No GPU has run this yet; a test replays passes on a CPU.)
    """

    def __init__(self):
        self._made: WeakKeyDictionary[LatentCache, dict] = WeakKeyDictionary()
        self._pool = None

    def __call__(
        self, run: Run, tokens: Int[Tensor, "b s"], step: Step, cache: LatentCache
    ) -> Float[Tensor, "b s d"]:
        """run(tokens, step, cache), of which nothing asks a tensor for a number."""
        made, key = self._made.setdefault(cache, {}), (tuple(tokens.shape), step.total)
        if key not in made:  # once: compiled here, if it has to be
            made[key] = None
            return run(tokens, step, cache)
        if made[key] is None:
            with torch.inference_mode(False):  # whoever comes next can write to them
                inputs = [value.clone() for value in _tensors(tokens, step)]
            there = Step(step.total, *inputs[1:])
            made[key] = inputs, *self._capture(partial(run, inputs[0], there, cache))
        inputs, replay, result = made[key]
        for place, value in zip(inputs, _tensors(tokens, step), strict=True):
            place.copy_(value)
        replay()
        return result.clone()

    def _capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What repeats a call, and where its result will lie. Called before, on a stream of its
        own: what is done once (choosing kernels) must not be captured."""
        own, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        own.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(own):
            run()
        torch.cuda.current_stream().wait_stream(own)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                result = run()
        except RuntimeError as error:
            raise DSV3Error(
                "a pass of decoding cannot be captured as a CUDA graph",
                where="compile",
                found=str(error).strip().splitlines()[0],
                fix="Leave --compile out",
            ) from None
        return graph.replay, result


def _tensors(tokens: Tensor, step: Step) -> tuple[Tensor, ...]:
    assert step.mask is not None  # keys that are rounded up are masked
    return tokens, step.rotation, step.mask, step.row, step.place
