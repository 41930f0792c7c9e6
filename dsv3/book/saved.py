"""Notebooks as they are stored: clean, also after a reader's work in them, and as shipped again.

An editor leaves much in a notebook that is not for the reader: versions, ids of widgets that die
with their kernel, counts of how often a cell was run. ``clean`` takes it out. ``keep_clean`` does
so at every save of JupyterLab (``make lab`` puts ``jupyter_server_config.py`` where it looks for
its settings). So reading a chapter and running it changes nothing that version control would show,
but for the few outputs that differ from run to run, and a chapter opened the next day shows the
still pictures of its widgets. ``reset`` brings a chapter back as it was shipped.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nbformat

from dsv3.errors import DSV3Error

WIDGET = "application/vnd.jupyter.widget-view+json"
# Beside the chapters, where there is no version control: each as it was before its first save.
_SHIPPED = ".as_shipped"


def clean(notebook) -> None:
    """Take out, in place, what is not for the reader.

    A live widget needs its kernel: stored, its output would only say that it cannot be shown. The
    still picture and the plain text beside it stay.
    """
    notebook.metadata = {
        "kernelspec": {
            "display_name": "Python 3 (ipykernel)",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    count = 0
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type != "code":
            continue
        count += bool(cell.source.strip())
        cell.execution_count = count if cell.source.strip() else None
        cell.outputs = list(_joined(cell.outputs))
        for output in cell.outputs:
            if "data" in output:
                output.data.pop(WIDGET, None)
            if output.output_type == "execute_result":
                output.execution_count = count


def _joined(outputs) -> Iterator:
    """Outputs, with neighbouring pieces of one stream made one: where a stream is cut depends on
    how busy the machine was."""
    last = None
    for output in outputs:
        if (
            last is not None
            and output.output_type == last.output_type == "stream"
            and output.name == last.name
        ):
            last.text += output.text
            continue
        if last is not None:
            yield last
        last = output
    if last is not None:
        yield last


def keep_clean(model: dict, path: str, contents_manager, **_) -> None:
    """Before JupyterLab saves (its ``pre_save_hook``): a notebook that was clean stays clean.

    One that was not, a reader's own, is left alone. model: of the contents API, changed in place.
    """
    if model["type"] != "notebook":
        return
    file = Path(contents_manager._get_os_path(path))
    if not file.is_file():
        return
    before = file.read_text(encoding="utf-8")
    was = nbformat.reads(before, as_version=4)
    clean(was)
    if nbformat.writes(was) != before.rstrip("\n"):
        return
    kept = file.parent / _SHIPPED / file.name
    if not kept.exists() and not any((folder / ".git").exists() for folder in file.parents):
        kept.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, kept)
    now = nbformat.from_dict(model["content"])
    clean(now)
    model["content"] = now


def reset(path: Path) -> Path | None:
    """Bring a chapter back as it was shipped: from version control, or from the copy that its
    first save has left. What it replaces is kept; returns where, or None if nothing differed.

    Raises DSV3Error if the chapter was shipped by neither.
    """
    path = path.resolve()
    kept = path.parent / _SHIPPED / path.name
    try:
        shown = subprocess.run(
            ["git", "show", f"HEAD:./{path.name}"], cwd=path.parent, capture_output=True, timeout=30
        )
        shipped = shown.stdout if shown.returncode == 0 else None
    except OSError:  # no git, or no such folder
        shipped = None
    if shipped is None and kept.is_file():
        shipped = kept.read_bytes()
    if shipped is None:
        raise DSV3Error(
            "there is nothing to reset it to",
            where=path,
            expected="a file under git, or one that JupyterLab has saved before",
            fix="If it was never saved, it is as shipped; if not, take it from the "
            "project's archive again",
        )
    beside = path.with_name(path.name + ".yours")
    if path.is_file():
        if path.read_bytes() == shipped:
            return None
        path.replace(beside)
    new = path.with_name(path.name + ".new")
    new.write_bytes(shipped)
    new.replace(path)
    return beside if beside.is_file() else None
