"""What is compared with what.

``BASE`` is a DeepSeek-V3 of 3.3 million parameters: three layers, the first dense, 16 routed
experts of which a token uses 2, one shared expert, latent attention, one MTP module. An arm names
what it has instead. Where an arm changes the size of something, another size is changed with it so
that what the question holds equal stays nearly equal; ``size`` in the stored results says how
nearly. What is not held equal stands beside the arm. One learning rate serves all arms; it was
not tuned for any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from dsv3.config import ModelConfig
from dsv3.fp8 import Fp8Recipe
from dsv3.training.recipe import Recipe

_TOKENS = 900_000
_FP8_TOKENS = 300_000  # emulated on a CPU, FP8 is several times slower

BASE = ModelConfig.mini().but(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=384,
    moe_intermediate_size=128,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=4,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=16,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    rope_scaling=None,
    max_position_embeddings=256,
)

RECIPE = Recipe(
    tokens=_TOKENS,
    seq_len=128,
    batch_first=16,
    batch_last=16,
    micro_batch=2048,
    learning_rate=2.5e-3,
    warmup=40,
    extension_tokens=0,
    shares={"plays": 0.4, "code": 0.35, "arithmetic": 0.25},
    fim_rate=0.0,
    precision="fp32",
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model and how it is trained, as differences from ``BASE`` and ``RECIPE``.

    config: fields of the model; precision: of its products; fp8: how those are quantised; kv_heads:
    plain attention with so many key and value heads in place of latent attention; head_dim: of
    those; shared: whether there are shared experts; bias: a step of the routing bias, in times the
    recipe's gamma, 0 for none; balance: alpha, of the sequence-wise loss (eq. 17).
    """

    config: Mapping[str, int] = field(default_factory=dict)
    precision: str = "fp32"
    fp8: Fp8Recipe = Fp8Recipe()
    kv_heads: int | None = None
    head_dim: int = 32
    shared: bool = True
    bias: float = 1.0
    balance: float = 1e-4

    @property
    def model(self) -> ModelConfig:
        """The config of this arm's model."""
        return BASE.but(**self.config)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question, its arms, and what their figures can and cannot say.

    base: the arm that the others are compared with; tokens: that each run reads; report: where
    and what the report says about it.
    """

    question: str
    arms: Mapping[str, Arm]
    base: str
    report: str
    limit: str
    tokens: int = _TOKENS


_USUAL = Arm()

EXPERIMENTS: Mapping[str, Experiment] = MappingProxyType(
    {
        "fp8": Experiment(
            question="Does training in FP8 cost anything against BF16?",
            arms={"bf16": Arm(precision="bf16"), "fp8": Arm(precision="fp8")},
            base="bf16",
            tokens=_FP8_TOKENS,
            report="TR B.1: relative loss error below 0.25 % at 16B and 230B",
            limit="0.3 million tokens: errors that build up over a trillion cannot show. Sums are "
            "FP32, not those of a tensor core.",
        ),
        "balance": Experiment(
            question="What keeps experts busy, and what does it cost?",
            arms={
                "bias rule": _USUAL,
                "bias rule, gamma x 10": Arm(bias=10.0),
                "auxiliary loss": Arm(bias=0.0, balance=0.01),
                "nothing": Arm(bias=0.0, balance=0.0),
            },
            base="bias rule",
            report="TR 4.5.2, 4.5.3: validation loss 2.253 by the bias rule and by a loss over the "
            "batch, 2.258 by a sequence-wise loss (1B)",
            limit="16 experts and 440 steps: with gamma 0.001 no bias gets beyond 0.44, and a "
            "collapse that takes longer does not show.",
        ),
        "mtp": Experiment(
            question="Does predicting a token further ahead help the next one?",
            arms={"with MTP": _USUAL, "without": Arm(config={"num_nextn_predict_layers": 0})},
            base="without",
            report="TR 4.5.1: better on most benchmarks; on Pile 0.729 bits a byte both (15.7B)",
            limit="The report's gain is in tasks, which are beyond these models.",
        ),
        "sparse": Experiment(
            question="What do experts buy: against a dense model that works as much, or weighs as "
            "much?",
            arms={
                "experts": _USUAL,
                "dense, as active": Arm(
                    config={"first_k_dense_replace": 4, "intermediate_size": 384}
                ),
                "dense, as large": Arm(
                    config={"first_k_dense_replace": 4, "intermediate_size": 1584}
                ),
            },
            base="experts",
            report="TR 2.1.2 gives no such ablation; DeepSeekMoE (2401.06066) does",
            limit="Equal tokens, not equal time: on a CPU, experts of width 128 are slow.",
        ),
        "blocks": Experiment(
            question="May gradients share a scale with their neighbours of 128 tokens?",
            arms={
                "tiles": Arm(precision="fp8"),
                "blocks": Arm(precision="fp8", fp8=Fp8Recipe(gradients="block")),
            },
            base="tiles",
            tokens=_FP8_TOKENS,
            report="TR B.2: with blocks a 16B model diverged after about 300B tokens",
            limit="147 steps of a small model; the report supposes outliers of some tokens, and "
            "whether these have any was not asked.",
        ),
        "attention": Experiment(
            question="What does a smaller cache cost?",
            arms={
                "MLA": _USUAL,
                "MHA": Arm(kv_heads=4, head_dim=36),
                "GQA": Arm(kv_heads=2, head_dim=48),
                "MQA": Arm(kv_heads=1, head_dim=58),
            },
            base="MLA",
            report="V2 (2405.04434), tables 8, 9: MHA above GQA above MQA (7B); MLA above MHA in "
            "seven tests of eight",
            limit="Windows of 128 tokens leave attention little to do. MLA's keys are rotated in a "
            "third of their width, the others' in all of it.",
        ),
        "experts": Experiment(
            question="Shared expert or none? A few large experts or many small ones?",
            arms={
                "1 shared, 2 of 16": _USUAL,
                "none shared, 3 of 16": Arm(shared=False, config={"num_experts_per_tok": 3}),
                "2 shared, 4 of 32 halves": Arm(
                    config={
                        "n_shared_experts": 2,
                        "n_routed_experts": 32,
                        "num_experts_per_tok": 4,
                        "moe_intermediate_size": 64,
                    }
                ),
            },
            base="1 shared, 2 of 16",
            report="TR 2.1.2 builds on DeepSeekMoE (2401.06066), where both help",
            limit="Three domains of text leave little to specialise in. Without a shared expert "
            "there are 4 % fewer parameters; as many work for a token.",
        ),
    }
)
