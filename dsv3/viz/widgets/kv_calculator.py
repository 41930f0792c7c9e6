"""The KV-cache calculator: how many bytes each kind of attention remembers, and what fits."""

from __future__ import annotations

import ipywidgets

from dsv3.viz.cache_scene import cache_rows, cache_scene, size
from dsv3.viz.scene import Scene
from dsv3.viz.widgets.panel import Panel, control

TOKENS = [2**power for power in range(8, 18)] + [163_840]
TEXTS = [2**power for power in range(11)]
ITEMSIZES = {"4 (FP32)": 4, "2 (BF16)": 2, "1 (FP8)": 1}
MEMORY = [gb * 10**9 for gb in (10, 20, 40, 80, 160, 320, 640)]


class KVCacheCalculator(Panel):
    """Choose the length of the texts, how many there are, the bytes of a value and the memory."""

    title = "KV-cache calculator"

    def __init__(self):
        self.rows = cache_rows()
        slider = ipywidgets.SelectionSlider
        self.tokens = control(
            slider,
            "Tokens a text",
            value=32_768,
            options=[(f"{tokens:,}", tokens) for tokens in TOKENS],
        )
        self.texts = control(
            slider, "Texts at a time", value=1, options=[(f"{texts:,}", texts) for texts in TEXTS]
        )
        self.itemsize = control(slider, "Bytes a value", value=2, options=ITEMSIZES.items())
        self.memory = control(
            slider,
            "Memory for it",
            value=80 * 10**9,
            options=[(size(memory), memory) for memory in MEMORY],
        )
        super().__init__([self.tokens, self.texts, self.itemsize, self.memory])

    def scene(self) -> Scene:
        return cache_scene(
            self.tokens.value, self.texts.value, self.itemsize.value, self.memory.value, self.rows
        )
