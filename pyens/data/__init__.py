"""Data sets as plain tensors, split by seed."""

from pyens.data.digits import Digits, Split, load_digits

__all__ = ["Digits", "Split", "load_digits"]
