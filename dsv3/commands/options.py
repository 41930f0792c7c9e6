"""Kinds of values that several commands take: each turns a word of the command line into a value.

argparse shows the message of what they raise behind the option's name.
"""

from __future__ import annotations

from argparse import ArgumentTypeError

from dsv3.shipped import model_folder


def folder(text: str) -> str:
    """A folder's name; an empty one (a shell variable that is not set) would be the folder here."""
    if not text:
        raise ArgumentTypeError("an empty name, expected a folder (. is the one here)")
    return text


def model(text: str) -> str:
    """A model's folder; the name of the shipped model stands for its own."""
    return str(model_folder(folder(text)))


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def minutes(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return value
