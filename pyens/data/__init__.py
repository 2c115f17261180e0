"""Data sets as plain tensors, split by seed."""

from .digits import Digits, Split, load_digits

__all__ = ["Digits", "Split", "load_digits"]
