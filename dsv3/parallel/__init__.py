"""Several processes, one model: who I am, what I hold, what I send."""

from dsv3.parallel.tensor import TensorGroup

__all__ = ["TensorGroup"]
