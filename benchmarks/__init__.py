"""Benchmarks of pyens against the ways people do the same today. See README.md in this folder."""
