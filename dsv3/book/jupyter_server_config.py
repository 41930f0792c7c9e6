"""JupyterLab's settings for the book, copied by make into the environment's etc/jupyter/.

Chapters are saved clean (``dsv3.book.saved``). Jupyter runs this file with ``get_config`` defined.
"""

from dsv3.book.saved import keep_clean

get_config().FileContentsManager.pre_save_hook = keep_clean  # noqa: F821
