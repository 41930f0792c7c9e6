"""Set-up for all tests."""

import os

import torch

# Triton reads this when a kernel is decorated. Without a GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
