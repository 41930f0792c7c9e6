"""Checkpoints: from the table of all tensors to a model in memory, and between forms on the disk.

``layout`` lists what a config calls for, ``reader`` opens what is there, ``contents`` holds one
against the other. On these stand ``loading`` and ``saving``, and the jobs that turn one folder into
another: ``convert`` and ``cast``. Nothing here is imported before it is asked for, so that looking
at a table does not load a model.
"""

from importlib import import_module

_HOME = {"load_model": "dsv3.checkpoint.loading", "save_model": "dsv3.checkpoint.saving"}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dsv3.checkpoint' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
