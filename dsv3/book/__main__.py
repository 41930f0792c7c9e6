"""``python -m dsv3.book NOTEBOOK ...``: run chapters and store outputs and measured budgets.

``python -m dsv3.book --reset NOTEBOOK ...``: bring chapters back as they were shipped.

``python -m dsv3.book --count NOTEBOOK ...``: print their words, pictures and exercises.
"""

import sys
from pathlib import Path

from dsv3.errors import DSV3Error


def main(arguments: list[str]) -> int | str:
    back = arguments[:1] == ["--reset"]
    counts = arguments[:1] == ["--count"]
    names = arguments[back or counts :]
    if not names or any(name.startswith("-") for name in names):
        print(__doc__)
        return 2
    if counts:
        from dsv3.book.count import table

        print(table([Path(name) for name in names]))
        return 0
    for name in names:
        try:
            print(f"{name}: {_reset(Path(name)) if back else _run(Path(name))}")
        except DSV3Error as error:
            return str(error) if back else f"{name}: {error.what}\n{error.found}"
    return 0


def _reset(path: Path) -> str:
    from dsv3.book.saved import reset

    yours = reset(path)
    return (
        "as shipped"
        if yours is None
        else (
            f"as shipped again; what you had is in {path.with_name(yours.name)} "
            "(rename it to end in .ipynb to open it)"
        )
    )


def _run(path: Path):
    from dsv3.book.notebook import run

    return run(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
