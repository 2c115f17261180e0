"""csrc/README.md, the map of csrc: every file and folder that it names is there."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
NAME = re.compile(r"[\w./-]+(?:\.(?:cpp|h|cuh|cu|py|md)|/)|Makefile")


def names_of_tree(block: str) -> Iterator[str]:
    """Paths from the root, of a tree that is drawn by indentation."""
    folders: list[str] = []
    for line in block.strip("\n").splitlines():
        names = re.split(r" {2,}", line.strip())[0].split(", ")
        del folders[(len(line) - len(line.lstrip())) // 2 :]
        yield from ("".join([*folders, name]) for name in names if "<" not in name)
        if names[0].endswith("/"):
            folders.append(names[0])


def test_every_file_that_it_names_is_there():
    text = (CSRC / "README.md").read_text()
    _, tree, prose = text.split("```")
    in_tree = list(names_of_tree(tree))
    assert all(name.startswith("csrc/") for name in in_tree) and len(in_tree) > 30
    in_prose = [name for name in re.findall(r"`([^`\n]+)`", prose) if NAME.fullmatch(name)]
    assert len(in_prose) > 40
    missing = [name for name in in_tree if not (ROOT / name).exists()]
    for name in in_prose:
        found = (ROOT / name).exists() or (CSRC / name).exists()
        if "/" not in name:  # of a kernel that the text is about
            found = found or any(CSRC.rglob(name))
        if not found:
            missing.append(name)
    assert not missing
