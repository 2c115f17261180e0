"""Data sets as plain tensors: bundled ones, the user's own files, and made-up ones."""

from pyens.data.digits import Digits, Split, load_digits
from pyens.data.idx import load_idx, read_idx
from pyens.data.sinusoids import Points, two_sinusoids

__all__ = ["Digits", "Points", "Split", "load_digits", "load_idx", "read_idx", "two_sinusoids"]
