"""The draft explorer: a text, who proposed each token, and every pass step by step."""

from __future__ import annotations

import ipywidgets
import torch

from dsv3.errors import DSV3Error
from dsv3.generation.tokenizer import Tokenizer
from dsv3.model import Transformer
from dsv3.viz.draft_scene import STAGES, draft_scene
from dsv3.viz.drafted import Drafted, record
from dsv3.viz.scene import Scene
from dsv3.viz.widgets.explorer import token_text
from dsv3.viz.widgets.panel import Panel, control

TOKENS = 40


class DraftExplorer(Panel):
    """Choose a prompt, the temperature, the drafts of a pass and a seed; step through the passes.

    The model writes a text when one of these four changes and is let go; stepping shows what was
    kept of it. Raises DSV3Error for a model without MTP module, and for a prompt that it cannot
    read.
    """

    title = "Draft explorer"
    hint = (
        "Click a token to see its pass, a stage to see how far it has come; or Tab into the "
        "picture, use the arrow keys, and choose with Enter."
    )

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        prompt: str = "To be, or not to be",
        *,
        temperature: float = 0.8,
        drafts: int = 2,
        seed: int = 0,
        tokens: int = TOKENS,
    ):
        self.model, self.tokenizer, self.tokens = model, tokenizer, tokens
        self._refusal, self._busy = "", False
        at_release = dict(continuous_update=False)
        self.prompt = control(ipywidgets.Text, "Prompt + Enter", value=prompt, **at_release)
        self.temperature = control(
            ipywidgets.FloatSlider,
            "Temperature",
            value=temperature,
            max=1.5,
            step=0.1,
            readout_format=".1f",
            **at_release,
        )
        self.drafts = control(
            ipywidgets.IntSlider, "Drafts a pass", value=drafts, min=1, max=4, **at_release
        )
        self.seed = control(ipywidgets.IntSlider, "Seed", value=seed, max=20, **at_release)
        self._drafted = self._write()
        self.number = control(
            ipywidgets.IntSlider, "Pass", value=1, min=1, max=max(len(self._drafted.rounds), 1)
        )
        self.stage = control(
            ipywidgets.SelectionSlider,
            "Stage",
            options=[(f"{at + 1} {name}", at) for at, name in enumerate(STAGES)],
            value=len(STAGES) - 1,
        )
        super().__init__(
            [self.prompt, self.temperature, self.drafts, self.seed, self.number, self.stage]
        )
        self.drawing.on_choose(self._choose)

    def drafted(self) -> Drafted:
        """The text of the picture and the record of its passes."""
        return self._drafted

    def scene(self) -> Scene:
        return draft_scene(self._drafted, self.number.value - 1, self.stage.value, self._word)

    def message(self) -> str:
        return self._refusal

    def _word(self, id: int) -> str:
        return token_text(self.tokenizer, id)

    @torch.inference_mode()
    def _write(self) -> Drafted:
        """Let the model write; DSV3Error for a prompt that it cannot continue."""
        if not self.prompt.value.strip():
            raise DSV3Error("there is no text", where="prompt", fix="Type a few words")
        ids = self.tokenizer.encode(self.prompt.value)
        most = self.model.config.max_position_embeddings - self.tokens
        if len(ids) > most:
            raise DSV3Error(
                "the prompt leaves no room for a text",
                where="prompt",
                found=f"{len(ids)} tokens",
                expected=f"at most {most}",
            )
        return record(
            self.model,
            ids,
            self.tokens,
            self.drafts.value,
            tokenizer=self.tokenizer,
            temperature=self.temperature.value,
            seed=self.seed.value,
        )

    def _changed(self, change) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            if change["owner"] not in (self.number, self.stage):
                self._refusal = ""
                try:
                    self._drafted = self._write()
                except DSV3Error as error:
                    self._refusal = (
                        f"{str(error).rstrip('.')}. The picture still shows the text before."
                    )
                else:
                    self.number.max = max(len(self._drafted.rounds), 1)
        finally:
            self._busy = False
        self.refresh()

    def _choose(self, key: str) -> None:
        what, _, which = key.partition(" ")
        if what == "stage":
            self.stage.value = int(which)
        elif what == "token":
            token = int(which)
            self.number.value = next(
                at + 1
                for at, each in reversed(list(enumerate(self._drafted.rounds)))
                if each.start <= token
            )
        else:
            self.number.value += 1 if what == "later" else -1
