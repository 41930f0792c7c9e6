"""The routing explorer: where the model sends each token of a text, and what would change it."""

from __future__ import annotations

import ipywidgets
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.errors import DSV3Error
from dsv3.generation.tokenizer import Tokenizer
from dsv3.model import Transformer
from dsv3.moe import Router
from dsv3.viz.routing_scene import Routing, routing_scene
from dsv3.viz.scene import Scene
from dsv3.viz.widgets.panel import Panel, control


class Replay(Router):
    """A router that is given scores (on the CPU) instead of tokens; the rest is the router's."""

    def __init__(self, router: Router, strength: float, groups: int, top_k: int):
        config = router.config.but(topk_group=groups, num_experts_per_tok=top_k)
        super().__init__(config, router.precision, device="meta")
        if router.bias is not None:
            self.bias = nn.Parameter(strength * router.bias.cpu(), requires_grad=False)

    def scores(self, u: Float[Tensor, "n experts"]) -> Float[Tensor, "n experts"]:
        return u


@torch.inference_mode()
def reroute(
    router: Router,
    scores: Float[Tensor, "n experts"],
    strength: float = 1.0,
    groups: int | None = None,
    top_k: int | None = None,
) -> Routing:
    """What the router chooses for these scores with its bias multiplied by ``strength``,
    ``groups`` groups allowed and ``top_k`` experts a token (None: as trained).

    Raises DSV3Error for more experts than there are in so many groups.
    """
    c = router.config
    replay = Replay(router, strength, groups or c.topk_group, top_k or c.num_experts_per_tok)
    weights, chosen, _ = replay(scores)
    bias = torch.zeros_like(scores[0]) if replay.bias is None else replay.bias
    sums, is_open = replay.open_groups(scores + bias)
    return Routing(scores, bias, sums, is_open, chosen, weights)


@torch.inference_mode()
def router_scores(model: Transformer, ids: list[int]) -> dict[int, Float[Tensor, "n experts"]]:
    """Scores s_i,t of one text in each layer with experts: layer -> (n, N_r), on the CPU."""
    kept: dict[int, Tensor] = {}

    def watch(layer: int):
        def hook(router, inputs):
            kept[layer] = router.scores(inputs[0][0]).cpu()

        return hook

    hooks = [
        router.register_forward_pre_hook(watch(layer)) for layer, router in routers(model).items()
    ]
    try:
        model(torch.tensor([ids], device=model.device), last_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def routers(model: Transformer) -> dict[int, Router]:
    """Layer -> its router, of the layers that have experts."""
    return {
        number: layer.ffn.gate
        for number, layer in enumerate(model.layers)
        if model.config.is_moe(number)
    }


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """A token as it can be shown: spaces as ·, line ends as ⏎, tabs as ⇥, odd bytes in hex."""
    if tokenizer.is_special(id):
        return "<bos>" if id == tokenizer.bos_id else "<eos>" if id == tokenizer.eos_id else "<…>"
    raw = tokenizer.token_bytes(id)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return " ".join(f"{byte:02X}" for byte in raw)
    shown = text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(letter if letter.isprintable() else "�" for letter in shown)


class RoutingExplorer(Panel):
    """Choose a text, a token and a layer; move the bias, the groups allowed and top-k.

    The model reads a text once, when it is entered; every other change chooses anew from the
    scores it gave, by the router's own rule. Raises DSV3Error for a model without experts.
    """

    title = "Routing explorer"
    hint = (
        "Click a token to choose it, point at a bar to read its numbers; or Tab into the "
        "picture, use the arrow keys, and choose with Enter."
    )

    def __init__(self, model: Transformer, tokenizer: Tokenizer, text: str):
        self.model, self.tokenizer = model, tokenizer
        self.routers = routers(model)
        if not self.routers:
            raise DSV3Error(
                "this model has no layer with experts",
                where="first_k_dense_replace",
                found=model.config.first_k_dense_replace,
                expected=f"below {model.config.num_hidden_layers} layers",
            )
        self._refusal = ""
        self._read(text)
        c = model.config
        self.text = control(
            ipywidgets.Text, "Text, then Enter", value=text, continuous_update=False
        )
        layers = [(f"layer {layer}", layer) for layer in self.routers]
        self.layer = control(
            ipywidgets.SelectionSlider, "Layer", options=layers, value=layers[len(layers) // 2][1]
        )
        self.token = control(
            ipywidgets.IntSlider, "Token", value=len(self.ids) - 1, max=len(self.ids) - 1
        )
        self.strength = control(
            ipywidgets.FloatSlider,
            "Bias strength",
            value=1.0,
            min=-4.0,
            max=4.0,
            step=0.25,
            readout_format="+.2f",
            disabled=not c.gate_bias,
        )
        self.groups = control(
            ipywidgets.IntSlider,
            "Groups allowed",
            value=c.topk_group,
            min=1,
            max=c.n_group,
            disabled=c.n_group == 1,
        )
        self.top_k = control(
            ipywidgets.IntSlider,
            "Experts (top-k)",
            value=c.num_experts_per_tok,
            min=1,
            max=c.n_routed_experts,
        )
        super().__init__(
            [self.text, self.layer, self.token, self.strength, self.groups, self.top_k]
        )
        self.drawing.on_choose(self._choose)

    def routing(self) -> Routing:
        """The layer's choices for all tokens, at the controls' values."""
        return reroute(
            self.routers[self.layer.value],
            self._scores[self.layer.value],
            self.strength.value,
            self.groups.value,
            self._possible_k(),
        )

    def scene(self) -> Scene:
        return routing_scene(self.routing(), self.token.value, self.texts, self.layer.value)

    def message(self) -> str:
        wanted, possible = self.top_k.value, self._possible_k()
        too_many = (
            ""
            if wanted == possible
            else (
                f"{wanted} experts asked for, {possible} shown: "
                f"{self.groups.value} open group{'s hold' if self.groups.value > 1 else ' holds'} "
                f"no more."
            )
        )
        return " ".join(filter(None, [self._refusal, too_many]))

    def _possible_k(self) -> int:
        c = self.model.config
        return min(self.top_k.value, self.groups.value * (c.n_routed_experts // c.n_group))

    def _read(self, text: str) -> None:
        """Let the model read a text; one that it cannot read changes nothing but the message."""
        if not text.strip():
            raise DSV3Error("there is no text", where="text", fix="Type a few words")
        ids, most = self.tokenizer.encode(text), self.model.config.max_position_embeddings
        if len(ids) > most:
            raise DSV3Error(
                "the text is longer than the model's context",
                where="text",
                found=f"{len(ids)} tokens",
                expected=f"at most {most}",
            )
        self._scores = router_scores(self.model, ids)
        self.ids, self.texts = ids, [token_text(self.tokenizer, id) for id in ids]

    def _choose(self, key: str) -> None:
        self.token.value = int(key.removeprefix("token "))

    def _changed(self, change) -> None:
        if change["owner"] is self.text:
            self._refusal = ""
            try:
                self._read(self.text.value)
            except DSV3Error as error:
                self._refusal = (
                    f"{str(error).rstrip('.')}. The picture still shows the text before."
                )
            else:
                self.token.max = len(self.ids) - 1
        self.refresh()
