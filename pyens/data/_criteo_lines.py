"""Lines of Criteo's data as numbers."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyens.data._text import Block, Fields

INTEGERS = 13
CATEGORIES = 26
FIELDS = 1 + INTEGERS + CATEGORIES
LAYOUT = f"label, {INTEGERS} integers, {CATEGORIES} hex categories"


class Lines(NamedTuple):
    """What N lines say."""

    label: np.ndarray  # int64 [N], 0 or 1
    counts: np.ndarray  # int64 [N, 13], 0 where missing
    counted: np.ndarray  # bool [N, 13], whether there is one
    category: np.ndarray  # int64 [N, 26], 0 where missing
    categorized: np.ndarray  # bool [N, 26], whether there is one


def parsed(function: str, path: Path, block: Block) -> Lines:
    """The lines of a block.

    Raises:
        ValueError: a line of another form, naming file and line.
    """
    fields = Fields(function, path, block.first, block.content, "\t", FIELDS, LAYOUT)
    label, _ = fields.integers(0)
    fields.require((label == 0) | (label == 1), 0, "a label 0 or 1")
    counts, counted = fields.integers(slice(1, 1 + INTEGERS), optional=True)
    category, categorized = fields.hexadecimal(slice(1 + INTEGERS, None))
    return Lines(label, counts, counted, category, categorized)
