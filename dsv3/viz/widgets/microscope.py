"""The scale microscope: the blocks of a quantised matrix, and the values in one of them."""

from __future__ import annotations

import re
from pathlib import Path

import ipywidgets
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.checkpoint.contents import open_checkpoint
from dsv3.checkpoint.loading import by_part, load_model, rank_pieces
from dsv3.errors import DSV3Error
from dsv3.fp8 import QuantizedTensor, decode_scale, quantize_activation
from dsv3.fp8.formats import E4M3
from dsv3.generation.tokenizer import Tokenizer, load_tokenizer
from dsv3.layers import SwiGLU
from dsv3.mla import MLA
from dsv3.model import Transformer
from dsv3.moe import MoE
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import unquantized
from dsv3.shipped import model_folder
from dsv3.viz.microscope_scene import SHOWS, microscope_scene
from dsv3.viz.scene import Scene
from dsv3.viz.specimen import Specimen
from dsv3.viz.widgets.panel import Panel, control

TEXT = (
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the "
    "slings and arrows of outrageous fortune"
)
MOST_TOKENS = 64
# Module of a layer -> which matrices read what it is given.
READERS = {
    "attn": "wq_a, wkv_a",
    "attn.wq_b": "wq_b",
    "attn.wo": "wo",
    "ffn": "w1, w3",
    "ffn.w2": "w2",
}


def stored_matrices(source: str | Path | Transformer) -> dict[str, QuantizedTensor]:
    """The FP8 matrices of a checkpoint's folder, or of a model that holds its weights in FP8, by
    the model's own names ("layers.0.attn.wq_a").

    A model has less than its files: it keeps wkv_b in plain numbers. Raises DSV3Error where there
    is none.
    """
    state: dict[str, Tensor] = {}
    if isinstance(source, Transformer):
        state, where = source.state_dict(), "the model"
    else:
        where = model_folder(source)
        config, reader, specs = open_checkpoint(where)
        with reader:
            pieces = rank_pieces(specs, config, TensorGroup())
            for part, some in by_part(reader, pieces):
                state |= {f"{part}.{name}": value for name, value in some.items()}
    found = {
        name.removesuffix(".weight"): QuantizedTensor(
            value, decode_scale(state[name.removesuffix("weight") + "scale"])
        ).to("cpu")
        for name, value in state.items()
        if value.dtype == E4M3
    }
    if not found:
        raise DSV3Error(
            "there are no FP8 matrices",
            where=where,
            expected="codes and scales",
            fix='Load the model with precision="fp8", or give the folder of an FP8 checkpoint',
        )
    return found


@torch.inference_mode()
def activations(model: Transformer, ids: list[int]) -> dict[str, Float[Tensor, "n channels"]]:
    """What the FP8 products of each layer read of one text, before it is quantised:
    "layers.0.attn" -> (n, channels) in the model's dtype, on the CPU; names as in ``READERS``."""
    kept: dict[str, Tensor] = {}

    def watch(name: str):
        def hook(_, inputs):
            kept[name] = unquantized(inputs[0]).flatten(0, -2).cpu()

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if _reads_activations(name, module)
    ]
    try:
        tokens = torch.tensor([ids], device=model.device)
        hidden = model(tokens, return_hidden=True)[1]
        if len(model.mtp) and len(ids) > 1:
            model.mtp_logits(hidden[:, :-1], tokens[:, 1:])
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def _reads_activations(name: str, module: nn.Module) -> bool:
    layer = re.fullmatch(r"(?:layers|mtp)\.\d+\.(.+)", name)
    if layer is None or layer[1] not in READERS:
        return False
    return isinstance(module, MLA | MoE | SwiGLU) or "." in layer[1]


class ScaleMicroscope(Panel):
    """Choose a layer and a matrix, then a block of it; colour its values by size or by error.

    source: the folder of an FP8 checkpoint ("dsv3-mini"), of which all FP8 matrices are shown, or
    a model in FP8. With a tokenizer (a folder brings its own) also the activations that the model
    reads for ``text``. Raises DSV3Error where nothing is stored in FP8.
    """

    title = "Scale microscope"
    hint = (
        "Click a block on the left to look into it, point at the picture to read its numbers; or "
        "Tab into the picture, use the arrow keys, and choose with Enter."
    )

    def __init__(
        self, source: str | Path | Transformer, tokenizer: Tokenizer | None = None, text: str = TEXT
    ):
        self.matrices = stored_matrices(source)
        self.source, self.tokenizer = source, tokenizer
        if tokenizer is None and not isinstance(source, Transformer):
            self.tokenizer = load_tokenizer(model_folder(source))
        self._refusal = ""
        self._ids: list[int] = []
        self._activations: dict[str, Tensor] = {}  # of these ids; none before they are wanted
        if self.tokenizer is not None:
            self._read(text)
        layers = list(dict.fromkeys(_layer(name) for name in self.matrices))
        self.layer = control(
            ipywidgets.SelectionSlider,
            "Layer",
            options=[(_layer_name(layer), layer) for layer in layers],
            value=layers[min(2, len(layers) - 1)],
        )
        self.matrix = control(ipywidgets.Dropdown, "Matrix", options=self._names())
        self.expert = control(ipywidgets.IntSlider, "Expert", value=0, max=0, disabled=True)
        self.show = control(
            ipywidgets.Dropdown, "Colour by", options=[(words, key) for key, words in SHOWS.items()]
        )
        self.text = control(
            ipywidgets.Text,
            "Text, then Enter",
            value=text,
            continuous_update=False,
            disabled=self.tokenizer is None,
        )
        self.place = (0, 0)
        self._settle()
        super().__init__([self.layer, self.matrix, self.expert, self.show, self.text])
        self.drawing.on_choose(self._choose)

    def specimen(self) -> Specimen:
        """The chosen matrix."""
        return self._specimen

    def scene(self) -> Scene:
        return microscope_scene(self._specimen, self.place, self.show.value)

    def message(self) -> str:
        return self._refusal

    def _make(self) -> Specimen:
        layer, name = self.layer.value, self.matrix.value
        where = f"{_layer_name(layer)}, {name}"
        if name.startswith("x of "):
            x = self._inputs()[f"{layer}.{self._read_by[name]}"]
            return Specimen(
                where, x.float(), quantize_activation(x), True, axes=("tokens", "channels")
            )
        key = name
        if self.expert.max:
            key = name.replace("experts.", f"experts.{self.expert.value}.")
            where = f"{_layer_name(layer)}, expert {self.expert.value}, {name.split('.')[-1]}"
        stored = self.matrices[f"{layer}.{key}"]
        return Specimen(where, stored.dequantize(), stored, False, axes=("rows", "columns"))

    def _names(self) -> list[str]:
        """Matrices of the layer, each kind of expert's once, and what they read."""
        layer = self.layer.value + "."
        stored = dict.fromkeys(
            re.sub(r"\bexperts\.\d+\.", "experts.", name.removeprefix(layer))
            for name in self.matrices
            if name.startswith(layer)
        )
        self._read_by = {
            f"x of {module.split('.')[0]}.{readers}": module
            for module, readers in READERS.items()
            if self._ids and self._has(layer + module)
        }
        return [*stored, *self._read_by]

    def _has(self, module: str) -> bool:
        """Whether this is an FP8 matrix or has one."""
        return any(f"{name}.".startswith(f"{module}.") for name in self.matrices)

    def _settle(self) -> None:
        """The controls' limits and the place follow what is chosen."""
        layer, name = self.layer.value, self.matrix.value
        pattern = re.compile(rf"{re.escape(layer)}\.ffn\.experts\.(\d+)\.")
        numbers = [int(found[1]) for key in self.matrices if (found := pattern.match(key))]
        of_experts = name.startswith("ffn.experts.")
        self.expert.max = max(numbers) if of_experts else 0
        self.expert.disabled = not of_experts
        self._specimen = self._make()
        self.place = tuple(min(at, many - 1) for at, many in zip(self.place, self._specimen.grid))

    def _read(self, text: str) -> None:
        """Take a text to be read; one that cannot be read changes nothing but the message."""
        if not text.strip():
            raise DSV3Error("there is no text", where="text", fix="Type a few words")
        ids = self.tokenizer.encode(text)
        if len(ids) > MOST_TOKENS:
            raise DSV3Error(
                "the text is longer than the picture",
                where="text",
                found=f"{len(ids)} tokens",
                expected=f"at most {MOST_TOKENS}",
            )
        self._ids, self._activations = ids, {}

    def _inputs(self) -> dict[str, Tensor]:
        """The activations of the text. A folder's model is loaded, and reads it, when they are
        first looked at."""
        if not self._activations:
            if not isinstance(self.source, Transformer):
                self.source = load_model(self.source, precision="fp8")
            self._activations = activations(self.source, self._ids)
        return self._activations

    def _choose(self, key: str) -> None:
        row, col = key.removeprefix("block ").split()
        self.place = int(row), int(col)
        self.refresh()

    def _changed(self, change) -> None:
        if self._settling:
            return
        self._settling = True
        try:
            if change["owner"] is self.text:
                self._take_text()
            if change["owner"] is self.layer:
                before = self.matrix.value
                self.matrix.options = names = self._names()
                self.matrix.value = before if before in names else names[0]
            self._settle()
        finally:
            self._settling = False
        self.refresh()

    _settling = False

    def _take_text(self) -> None:
        self._refusal = ""
        try:
            self._read(self.text.value)
        except DSV3Error as error:
            self._refusal = f"{str(error).rstrip('.')}. The picture still shows the text before."


def _layer(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _layer_name(layer: str) -> str:
    part, number = layer.split(".")
    return f"layer {number}" if part == "layers" else f"MTP module {number}"
