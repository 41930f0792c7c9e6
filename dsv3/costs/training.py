"""Bytes on each GPU of a cluster that trains a model together (TR 3.1, 3.2).

Training keeps more than the weights. Adam needs two moments of every gradient; the sum of many
small steps needs a *master* copy of each weight with more digits than the products take. In plain
mixed precision that is 2 bytes for the weight, 2 for its gradient, 4 for the master copy and 4
for each moment: 16 bytes for every parameter, before the first activation.

Four ways to share it out, and they multiply:

* PP ranks of a *pipeline* have some layers each;
* DP ranks each train on data of their own with the same weights, PP x DP x TP ranks in all;
* EP of the DP x TP ranks of a stage share out the routed experts, so that DP x TP / EP of them have
  the same ones;
* TP ranks of a *tensor group* cut matrices. DeepSeek-V3 was trained without.

ZeRO takes back what data parallelism repeats. Ranks with the same weights hold, instead of
everything each, a part each: of master copies and moments (stage 1), of gradients too (2), of the
weights too (3), which then have to be gathered for every use.

Experts are on few ranks each, so ZeRO finds little to share among them and much among the rest.

DualPipe sends micro-batches into the pipeline at both ends, so a rank has two stages, its own and
that of the rank opposite. Every stage is then on two ranks; "2x parameters" in the report's table
2. The two add up their gradients as data-parallel ranks do, so ZeRO shares among them as well; the
report does not say whether DeepSeek's does.

A mean of the weights over time is kept as well, but in the CPU's memory (TR 3.2.3): none of it is
counted here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from math import ceil

from dsv3.config import ModelConfig
from dsv3.costs.parameters import Weight, embedding_weights, head_weights, layer_weights
from dsv3.costs.roofline import H800_MEMORY
from dsv3.errors import DSV3Error
from dsv3.fields import BLOCK

# Bytes of one number; FP8 with its share of a block's scale.
ITEM_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1 + 4 / BLOCK**2}


@dataclass(frozen=True)
class Formats:
    """In what everything is kept. weights: as the products read them; "fp8" leaves those in BF16
    that FP8 does not take. moments: each of the two. Raises DSV3Error for an unknown format."""

    weights: str
    gradients: str
    master: str
    moments: str

    def __post_init__(self):
        for name, value in vars(self).items():
            if value not in ITEM_BYTES:
                raise DSV3Error(
                    "unknown format", where=name, found=value, expected=" or ".join(ITEM_BYTES)
                )

    @property
    def bytes_per_parameter(self) -> float:
        """With all that belongs to it."""
        kept = (self.weights, self.gradients, self.master, self.moments, self.moments)
        return sum(ITEM_BYTES[name] for name in kept)


PLAIN = Formats("bf16", "bf16", "fp32", "fp32")  # 16 bytes a parameter
# TR 3.3.3: gradients and master weights in FP32, moments in BF16. In what the weights wait
# between the steps is not said; BF16 is the more expensive guess.
REPORT = Formats("bf16", "fp32", "fp32", "bf16")


@dataclass(frozen=True)
class Layout:
    """How a cluster shares out a training run; see above for the sizes.

    Raises DSV3Error for sizes that do not fit together.
    """

    pp: int = 1
    dp: int = 1
    ep: int = 1
    tp: int = 1
    zero: int = 0
    dualpipe: bool = False

    def __post_init__(self):
        for name in ("pp", "dp", "ep", "tp"):
            if getattr(self, name) < 1:
                raise _bad(name, getattr(self, name), "1 or more")
        if self.dp * self.tp % self.ep:
            raise _bad("ep", self.ep, f"a divisor of DP x TP = {self.dp * self.tp}")
        if self.zero not in range(4):
            raise _bad("zero", self.zero, "a stage, 0 (none) to 3")
        if self.dualpipe and self.pp % 2:
            raise _bad("pp", self.pp, "an even number: in DualPipe ranks stand opposite each other")

    @property
    def ranks(self) -> int:
        return self.pp * self.dp * self.tp

    def stages(self, rank: int) -> tuple[int, ...]:
        """Those of a rank of the pipeline."""
        return (rank, self.pp - 1 - rank) if self.dualpipe else (rank,)

    @property
    def copies(self) -> int:
        """How many ranks of a pipeline have the same stage."""
        return 2 if self.dualpipe else 1

    def replicas(self, weight: Weight) -> int:
        """How many ranks hold the same numbers: among so many ZeRO shares."""
        same = self.dp * self.tp // self.ep if weight.routed else self.dp
        return same * self.copies

    def held(self, weight: Weight) -> float:
        """How many numbers of a weight are on a rank that has its layer, without ZeRO."""
        if weight.routed:
            return weight.numel / self.ep
        return weight.numel / self.tp if weight.cut else weight.numel

    def live(self, rank: int) -> int:
        """Micro-batches whose activations a rank of the pipeline keeps at most (TR table 2): in
        1F1B one less with every stage, in DualPipe PP + 1 on every rank."""
        return self.pp + 1 if self.dualpipe else self.pp - rank


# TR 3.1, 3.2: 2,048 GPUs, 16 stages; experts over 64 ranks, which are 8 nodes.
V3_LAYOUT = Layout(pp=16, dp=128, ep=64, zero=1, dualpipe=True)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: float = 0.0
    gradients: float = 0.0
    master: float = 0.0
    moments: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        return sum(astuple(self))

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def __truediv__(self, by: float) -> Memory:
        return Memory(*(value / by for value in astuple(self)))


def worst(ranks: Iterable[Memory]) -> Memory:
    """That of the rank that needs most: it decides whether a layout fits."""
    return max(ranks, key=lambda memory: memory.total)


def mean(ranks: Iterable[Memory]) -> Memory:
    """That of the average rank."""
    ranks = list(ranks)
    return sum(ranks, Memory()) / len(ranks)


def gpus_needed(nbytes: float, memory: float = H800_MEMORY) -> int:
    """How many GPUs hold so many bytes, if nothing is held twice."""
    return ceil(nbytes / memory)


def stage_layers(config: ModelConfig, pp: int) -> list[range]:
    """The layers of each stage of a pipeline, MTP modules counted on from num_hidden_layers.

    As equal in number as can be; where some stages have one more, those in the middle, because
    the first has the embedding besides and the last the head. For the 671B model in 16 stages that
    is 3, 4 (14 times) and 3, and all three dense layers are in the first. The report does not say
    how DeepSeek's were cut. Raises DSV3Error for more stages than layers.
    """
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    if pp > layers:
        raise _bad("pp", pp, f"{layers} or fewer, one for each layer")
    each, more = divmod(layers, pp)
    first = (pp - more) // 2
    stages, start = [], 0
    for stage in range(pp):
        end = start + each + (first <= stage < first + more)
        stages.append(range(start, end))
        start = end
    return stages


def training_memory(
    config: ModelConfig,
    layout: Layout,
    formats: Formats = REPORT,
    *,
    tokens: int = 0,
    recompute: bool = True,
) -> list[Memory]:
    """Bytes on the ranks of a pipeline, first to last; all DP x TP ranks of a place are alike.

    tokens: of a micro-batch, for the activations; 0 leaves them out. recompute: as
    ``activation_bytes`` has it. Experts are taken to be equally busy. Raises DSV3Error where the
    model cannot be shared out so.
    """
    c, stages = config, stage_layers(config, layout.pp)
    for name, size in (("n_routed_experts", layout.ep), ("num_attention_heads", layout.tp)):
        if getattr(c, name) % size:
            raise _bad(name, getattr(c, name), f"a multiple of {size} ranks")
    if tokens and layout.tp > 1:
        raise _bad("tp", layout.tp, "1: activations are counted without tensor parallelism")
    ranks = []
    for rank in range(layout.pp):
        memory = Memory()
        for weight in _weights(c, layout, rank, stages):
            memory += _memory(weight, layout, formats)
        each = max(
            sum(_activations(config, layer, recompute) for layer in stages[stage])
            for stage in layout.stages(rank)
        )
        ranks.append(memory + Memory(activations=layout.live(rank) * tokens * each))
    return ranks


def data_parallel_bytes(
    config: ModelConfig, layout: Layout, formats: Formats = REPORT
) -> list[float]:
    """Bytes that a rank sends in each step to those that hold the same weights, by rank of the
    pipeline, over rings.

    Without ZeRO an all-reduce of the gradients, 2 (N - 1) / N of them for N such ranks. With
    stage 1 or 2 each rank gets the sums of its own part, (N - 1) / N of the gradients, and sends
    around the weights that it has made of them: no more than before. Stage 3 gathers weights in
    every pass and is not counted here; it raises DSV3Error.
    """
    if layout.zero == 3:
        raise _bad("zero", 3, "a stage from 0 to 2")
    stages, sent = stage_layers(config, layout.pp), []
    for rank in range(layout.pp):
        nbytes = 0.0
        for weight in _weights(config, layout, rank, stages):
            among = layout.replicas(weight)
            back = _products(weight, formats) if layout.zero else formats.gradients
            each = ITEM_BYTES[formats.gradients] + ITEM_BYTES[back]
            nbytes += (among - 1) / among * layout.held(weight) * each
        sent.append(nbytes)
    return sent


def activation_bytes(
    config: ModelConfig, layer: int, *, recompute: bool = True
) -> dict[str, float]:
    """What one layer keeps of one token from its forward to its backward pass, item by item.

    recompute: as the report does (3.2.3, 3.3.3): norms, the up-projections of MLA and the products
    of SwiGLU are computed again; what SwiGLU reads and what experts are sent is kept in FP8, what
    W^O reads in E5M6, 12 bits, all with a scale of 4 bytes for 128. Otherwise the inputs of
    every operation are kept, in BF16. The experts' share is that of a token at its K_r experts,
    wherever they are. Left out: M_k, embedding and head with the logits, and all buffers that are
    free again before the next layer.
    """
    c = config
    heads, scale = c.num_attention_heads, 4 / BLOCK
    latents = c.latent_dim + (c.q_lora_rank or 0)
    wide = heads * (2 * c.qk_head_dim + c.v_head_dim)  # queries, keys, values
    outputs, moe = heads * c.v_head_dim, c.is_moe(layer)
    busy = c.num_experts_per_tok + c.n_shared_experts
    inner = busy * c.moe_intermediate_size if moe else c.intermediate_size
    sent = c.num_experts_per_tok * c.hidden_size if moe else 0
    kept: dict[str, float] = {
        "states before the norms": 2 * 2 * c.hidden_size,
        "latents": 2 * latents,
        "sums of exponentials": 4 * heads,
        "router scores": 4 * c.n_routed_experts if moe else 0,
    }
    if recompute:
        kept["attention output"] = (1.5 + scale) * outputs
        kept["tokens at experts"] = (1 + scale) * sent
        kept["SwiGLU inputs"] = (1 + scale) * 2 * inner
    else:
        kept["attention output"] = 2 * outputs
        kept["tokens at experts"] = 2 * sent
        kept["SwiGLU inputs"] = 2 * 2 * inner
        kept["norms"] = 2 * (2 * c.hidden_size + latents - c.qk_rope_head_dim)
        kept["queries, keys, values"] = 2 * wide
        kept["SwiGLU products"] = 2 * inner
        kept["experts' answers"] = 2 * sent
    return {name: value for name, value in kept.items() if value}


def _activations(c: ModelConfig, layer: int, recompute: bool) -> float:
    return sum(activation_bytes(c, layer, recompute=recompute).values())


def _weights(c: ModelConfig, layout: Layout, rank: int, stages: list[range]) -> list[Weight]:
    """All that a rank of the pipeline has, whole."""
    last = layout.pp - 1
    own = layout.stages(rank)
    weights = [weight for s in own for layer in stages[s] for weight in layer_weights(c, layer)]
    if last in own:
        weights += head_weights(c)
    # The MTP modules read the main model's embedding, and a tied head is one. In DualPipe the
    # first and the last stage are on one rank and share it.
    if 0 in own or (last in own and (c.num_nextn_predict_layers or c.tie_word_embeddings)):
        weights += embedding_weights(c)
    return weights


def _products(weight: Weight, formats: Formats) -> str:
    """In what format a weight is multiplied."""
    return "bf16" if formats.weights == "fp8" and not weight.fp8 else formats.weights


def _memory(weight: Weight, layout: Layout, formats: Formats) -> Memory:
    held, among = layout.held(weight), layout.replicas(weight)

    def part(name: str, stage: int) -> float:
        return ITEM_BYTES[name] * held / (among if layout.zero >= stage else 1)

    return Memory(
        weights=part(_products(weight, formats), 3),
        gradients=part(formats.gradients, 2),
        master=part(formats.master, 1),
        moments=2 * part(formats.moments, 1),
    )


def _bad(name: str, found: int, expected: str) -> DSV3Error:
    return DSV3Error("a layout that cannot be", where=name, found=found, expected=expected)
