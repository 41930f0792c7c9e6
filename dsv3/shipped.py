"""The small trained model that comes with the package.

In a checkout it lies in ``assets/dsv3-mini``; a wheel carries it along (``dsv3/assets`` holds a
link to it, and a build follows the link). So its name, or the path that README writes, stands for
it where there is no folder of that name: ``load_model("dsv3-mini")`` and
``dsv3 generate dsv3-mini`` work from any place, installed in any way.
"""

from __future__ import annotations

from pathlib import Path

from dsv3.errors import DSV3Error

NAME = "dsv3-mini"


def model_folder(path: str | Path) -> Path:
    """The folder that ``path`` names: itself, or the shipped model's.

    Raises DSV3Error when the shipped model is asked for and this installation has none.
    """
    path = Path(path)
    if path not in (Path(NAME), Path("assets") / NAME) or path.exists():
        return path
    shipped = Path(__file__).resolve().parent / "assets" / NAME
    if not (shipped / "config.json").exists():
        raise DSV3Error(
            "the small model is not here, and this installation has none",
            where=path,
            fix=f"It is the folder assets/{NAME} of the repository: "
            "clone it, or build the wheel from a whole checkout",
        )
    return shipped
