"""``python -m dsv3.viz FOLDER``: draw the figures that the README shows."""

import sys
from pathlib import Path

from dsv3.config import ModelConfig
from dsv3.viz import model_map

model_map(ModelConfig.deepseek_v3()).savefig(
    Path(sys.argv[1]) / "model_map.png", dpi=110, metadata={"Software": None})
