"""The version of pyens. This is the only place: pyproject.toml, setup.py and `pyens.__version__` read it."""

__version__ = "0.1.0"
