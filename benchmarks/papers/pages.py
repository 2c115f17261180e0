"""What the result pages share: aggregates kept in JSON, provenance, tables, publishing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness


class Results:
    """Aggregates of several runs in one JSON file: what a run did not make anew stays as it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def merge(self, section: str, entries: dict[str, Any]) -> None:
        """Puts entries into a section and saves the file.

        An entry that does not say by what machine and commit it was `made`, and when, was made here and now.
        """
        stamp = provenance()
        for name, entry in entries.items():
            self.content.setdefault(section, {})[name] = {"made": stamp, **entry}
        text = json.dumps(self.content, indent=1, sort_keys=True) + "\n"
        harness.write(self.path, text)

    def section(self, name: str) -> dict[str, Any]:
        return self.content.get(name, {})

    def has(self, section: str, names: Iterable[str]) -> bool:
        """Whether a section has all of these entries: then they need not be made again."""
        return set(names) <= self.section(section).keys()


def provenance() -> str:
    """Machine, torch, commit and date, for a page of results."""
    machine = harness.machine_info()
    return f"{machine['cpu']}, {machine['threads']} threads, {harness.versions(machine)}"


def publish(text: str, path: Path) -> None:
    """Writes a result page, atomically, and prints it."""
    harness.write(path, text)
    print(text)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]
