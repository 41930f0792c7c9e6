"""Figures of the book: drawn by code from a config or from plain tensors.

A picture that is drawn by hand goes stale when the model changes; these cannot. Each function
returns a matplotlib figure; ``show`` turns it into an image for a notebook, together with the
sentence that says what is to be seen in it. Nothing in the model's own code imports this package.
"""

from dsv3.viz.attention import (
    attention_maps_figure,
    cache_bars_figure,
    cache_lines_figure,
    relative_figure,
    roofline_figure,
    rotation_figure,
    stream_figure,
)
from dsv3.viz.cost_curves import cost_curves_figure
from dsv3.viz.drafts import acceptance_figure, gain_figure
from dsv3.viz.experts import (
    balance_price_figure,
    choice_figure,
    dispatch_figure,
    domain_figure,
    load_history_figure,
    nodes_figure,
    overlap_figure,
    violation_figure,
)
from dsv3.viz.figure import new_figure, show
from dsv3.viz.latent import (
    break_even_figure,
    energy_figure,
    forms_figure,
    kept_directions_figure,
    loss_by_position_figure,
    rank_error_figure,
    rotation_in_between_figure,
    yarn_figure,
)
from dsv3.viz.memory import memory_per_rank_figure
from dsv3.viz.model_map import PARTS, model_map
from dsv3.viz.numbers import (
    accumulation_figure,
    error_map_figure,
    measured_roofline_figure,
    outlier_figure,
    relative_error_figure,
)
from dsv3.viz.routing import routing_figure
from dsv3.viz.scene import draw

__all__ = [
    "PARTS",
    "acceptance_figure",
    "accumulation_figure",
    "attention_maps_figure",
    "balance_price_figure",
    "break_even_figure",
    "cache_bars_figure",
    "cache_lines_figure",
    "choice_figure",
    "cost_curves_figure",
    "dispatch_figure",
    "domain_figure",
    "draw",
    "energy_figure",
    "error_map_figure",
    "forms_figure",
    "gain_figure",
    "kept_directions_figure",
    "load_history_figure",
    "loss_by_position_figure",
    "measured_roofline_figure",
    "memory_per_rank_figure",
    "model_map",
    "new_figure",
    "nodes_figure",
    "outlier_figure",
    "overlap_figure",
    "rank_error_figure",
    "relative_error_figure",
    "relative_figure",
    "roofline_figure",
    "rotation_figure",
    "rotation_in_between_figure",
    "routing_figure",
    "show",
    "stream_figure",
    "violation_figure",
    "yarn_figure",
]
