"""Data sets as plain tensors: bundled ones, the user's own files, and made-up ones."""

from pyens.data.arrow import ArrowRows
from pyens.data.clicks import Clicks, ClickStream
from pyens.data.criteo import Criteo, load_criteo
from pyens.data.criteo_rows import CriteoRows, convert_criteo
from pyens.data.digits import Digits, Split, load_digits
from pyens.data.idx import Mnist, load_idx, load_mnist, read_idx
from pyens.data.iterable import IterableRows
from pyens.data.movielens import MovieLens, load_movielens
from pyens.data.rows import ArrayRows, RowSource
from pyens.data.table import Rows, Table
from pyens.data.uci import Uci, load_uci

__all__ = [
    "ArrayRows",
    "ArrowRows",
    "ClickStream",
    "Clicks",
    "Criteo",
    "CriteoRows",
    "Digits",
    "IterableRows",
    "Mnist",
    "MovieLens",
    "RowSource",
    "Rows",
    "Split",
    "Table",
    "Uci",
    "convert_criteo",
    "load_criteo",
    "load_digits",
    "load_idx",
    "load_mnist",
    "load_movielens",
    "load_uci",
    "read_idx",
]
