"""Data sets as plain tensors: bundled ones, the user's own files, and made-up ones."""

from pyens.data.digits import Digits, Split, load_digits
from pyens.data.idx import load_idx, read_idx
from pyens.data.movielens import MovieLens, load_movielens
from pyens.data.sinusoids import Points, two_sinusoids
from pyens.data.table import Rows, Table

__all__ = [
    "Digits",
    "MovieLens",
    "Points",
    "Rows",
    "Split",
    "Table",
    "load_digits",
    "load_idx",
    "load_movielens",
    "read_idx",
    "two_sinusoids",
]
