"""What a model costs, by arithmetic: bytes remembered, multiplications done, messages sent.

No tensor is made here, so the 671B model is counted as quickly as the small one. Two rules hold
everywhere. A multiplication with its addition counts as two floating-point operations (FLOPs).
Bytes are those that have to come from or go to a GPU's memory if everything else stays on chip.

* ``roofline``: time follows from both, whichever takes longer;
* ``attention``: what the cache of each kind of attention holds, and what the forms of MLA do;
* ``parameters``: how many there are, which of them work for a token, how they can be cut;
* ``experts``: where tokens go;
* ``training``: bytes on each GPU of a cluster that trains;
* ``serving``: time of a pass.
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
from dsv3.costs.experts import expected_groups
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
from dsv3.costs.serving import pass_milliseconds
from dsv3.costs.training import (
    PLAIN,
    REPORT,
    V3_LAYOUT,
    Formats,
    Layout,
    Memory,
    activation_bytes,
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
    "Formats",
    "H800_BYTES",
    "H800_FLOPS",
    "H800_MEMORY",
    "Layout",
    "Memory",
    "PEERS",
    "PLAIN",
    "REPORT",
    "V3_LAYOUT",
    "Weight",
    "activated_parameters",
    "activation_bytes",
    "as_gqa",
    "as_mha",
    "break_even_queries",
    "expected_groups",
    "gpus_needed",
    "latent_bytes_per_token",
    "latent_core",
    "layer_weights",
    "linear",
    "mean",
    "model_weights",
    "parameter_count",
    "pass_milliseconds",
    "plain_core",
    "ridge_point",
    "stage_layers",
    "training_memory",
    "worst",
]
