"""What a model costs, by arithmetic: bytes remembered, multiplications done, messages sent.

No tensor is made here, so the 671B model is counted as quickly as the small one. Two rules hold
everywhere. A multiplication with its addition counts as two floating-point operations (FLOPs).
Bytes are those that have to come from or go to a GPU's memory if everything else stays on chip.

* ``roofline``: time follows from both, whichever takes longer;
* ``attention``: what the cache of each kind of attention holds, and what the forms of MLA do;
* ``parameters``: how many there are, which of them work for a token, how they can be cut;
* ``experts``: what a token's way to its experts costs, and what cutting matrices would;
* ``training``: bytes on each GPU of a cluster that trains;
* ``serving``: layouts for serving, what fits, the least time for a token;
* ``budget``: hours, money, and the share of the peak: published, and recomputed.

Published figures are data with their source; what follows from a config is a function, and the
tests hold one to the other.
"""

from dsv3.costs.attention import (
    PEERS,
    CacheShape,
    as_gqa,
    as_mha,
    break_even_queries,
    latent_bytes_per_token,
    latent_core,
    plain_core,
)
from dsv3.costs.budget import (
    DAY,
    HOURS_PER_TRILLION,
    PRETRAINING_TOKENS,
    PRINTED_INCOME,
    PRINTED_MARGIN,
    TOKENS_PER_STEP,
    V3_BUDGET,
    V3_STEP,
    mfu,
    training_flops,
)
from dsv3.costs.experts import (
    EFFECTIVE_LINKS,
    NOMINAL_LINKS,
    REPORT_LINKS,
    Links,
    combine_bytes,
    dispatch_bytes,
    expected_groups,
    expert_bytes,
    expert_seconds,
    experts_at_no_cost,
    tensor_bytes,
    tensor_seconds,
)
from dsv3.costs.parameters import (
    Weight,
    activated_parameters,
    layer_weights,
    model_weights,
    parameter_count,
)
from dsv3.costs.roofline import (
    BF16_BYTES,
    H800_BYTES,
    H800_FLOPS,
    H800_MEMORY,
    Cost,
    linear,
    ridge_point,
)
from dsv3.costs.serving import (
    DEPLOYMENTS,
    Deployment,
    cache_tokens,
    exchange_seconds,
    layer_seconds,
    pass_milliseconds,
    serving_bytes,
    token_seconds,
)
from dsv3.costs.training import (
    PLAIN,
    REPORT,
    V3_LAYOUT,
    Formats,
    Layout,
    Memory,
    activation_bytes,
    data_parallel_bytes,
    gpus_needed,
    mean,
    stage_layers,
    training_memory,
    worst,
)

__all__ = [
    "BF16_BYTES",
    "CacheShape",
    "Cost",
    "DAY",
    "DEPLOYMENTS",
    "Deployment",
    "EFFECTIVE_LINKS",
    "Formats",
    "H800_BYTES",
    "H800_FLOPS",
    "H800_MEMORY",
    "HOURS_PER_TRILLION",
    "Layout",
    "Links",
    "Memory",
    "NOMINAL_LINKS",
    "PEERS",
    "PLAIN",
    "PRETRAINING_TOKENS",
    "PRINTED_INCOME",
    "PRINTED_MARGIN",
    "REPORT",
    "REPORT_LINKS",
    "TOKENS_PER_STEP",
    "V3_BUDGET",
    "V3_LAYOUT",
    "V3_STEP",
    "Weight",
    "activated_parameters",
    "activation_bytes",
    "as_gqa",
    "as_mha",
    "break_even_queries",
    "cache_tokens",
    "combine_bytes",
    "data_parallel_bytes",
    "dispatch_bytes",
    "exchange_seconds",
    "expected_groups",
    "expert_bytes",
    "expert_seconds",
    "experts_at_no_cost",
    "gpus_needed",
    "latent_bytes_per_token",
    "latent_core",
    "layer_seconds",
    "layer_weights",
    "linear",
    "mean",
    "mfu",
    "model_weights",
    "parameter_count",
    "pass_milliseconds",
    "plain_core",
    "ridge_point",
    "serving_bytes",
    "stage_layers",
    "tensor_bytes",
    "tensor_seconds",
    "token_seconds",
    "training_flops",
    "training_memory",
    "worst",
]
