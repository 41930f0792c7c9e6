"""``python -m dsv3.viz FOLDER MODEL``: draw the figures that the README shows.

MODEL: the folder of the small model, whose routing one of them shows.
"""

import sys
from pathlib import Path

from dsv3 import load_model, load_tokenizer
from dsv3.config import ModelConfig
from dsv3.viz import house_map, model_map
from dsv3.viz.scene import still
from dsv3.viz.widgets import RoutingExplorer

folder, model = map(Path, sys.argv[1:])
explorer = RoutingExplorer(
    load_model(model, precision="fp32"), load_tokenizer(model), "To be, or not to be"
)
for name, figure in (
    ("model_map", model_map(ModelConfig.deepseek_v3())),
    ("routing_explorer", still(explorer.scene())),
):
    figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
house_map.save(folder / "house_map.svg")
