"""Figures: they follow the config, carry their alt text, and leave matplotlib as they found it."""

import matplotlib
import pytest
import torch

from dsv3 import ModelConfig, viz


def texts(figure) -> str:
    return "\n".join(text.get_text() for axes in figure.axes for text in axes.texts)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig.mini(),
        ModelConfig.deepseek_v3(),
        ModelConfig.mini().but(
            q_lora_rank=None, num_nextn_predict_layers=0, first_k_dense_replace=0
        ),
    ],
)
def test_the_map_shows_the_sizes_of_its_config(config):
    shown = texts(viz.model_map(config))
    for size in (
        f"{config.vocab_size:,} × {config.hidden_size:,}",
        f"{config.latent_dim} values a token",
        f"{config.num_experts_per_tok} of {config.n_routed_experts}",
        f"{config.topk_group} of {config.n_group} groups",
    ):
        assert size in shown
    assert ("MTP" in shown) == bool(config.num_nextn_predict_layers)
    assert ("wq_b" in shown) == bool(config.q_lora_rank)


def test_only_lit_parts_keep_their_colour():
    def colours(lit):
        return {
            patch.get_edgecolor()
            for patch in viz.model_map(ModelConfig.mini(), lit).axes[0].patches
        }

    assert len(colours(["router"])) < len(colours(viz.PARTS))
    with pytest.raises(ValueError, match="heads"):
        viz.model_map(ModelConfig.mini(), ["heads"])


def test_one_dot_for_each_choice():
    weights = torch.zeros(2, 3, 8)
    weights[0, 0, 5], weights[0, 2, 1], weights[1, 1, 7] = 0.5, 1.0, 0.25
    figure = viz.routing_figure(weights, ["a", "b\n", "c"], 4, ["one", "two"])
    places = [
        [tuple(dot.get_offsets()[0].tolist()) for dot in axes.collections] for axes in figure.axes
    ]
    assert places == [[(5, 0), (1, 2)], [(7, 1)]]


def test_an_image_has_its_alt_text_and_a_light_card():
    figure = viz.memory_per_rank_figure({8: 87.4, 16: 44.5}, 9.2, {"H100": 80})
    before = dict(matplotlib.rcParams)
    image = viz.show(figure, "two bars")
    assert image.data.startswith(b"\x89PNG") and image.alt == "two bars"
    assert repr(image) == "[Figure: two bars]"
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(ValueError, match="alt"):
        viz.show(figure, " ")
