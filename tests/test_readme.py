"""README.md and docs/: their code runs, their links lead somewhere, their figures are the saved ones."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import pyens
from benchmarks import results_page

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_the_code_of_readme_runs_from_top_to_bottom():
    torch.manual_seed(0)
    names = {}
    for block in blocks(README):
        exec(compile(block, "README.md", "exec"), names)
    x, y = names["x"], names["y"]
    assert names["outputs"].shape == (100, 2048, 1) and names["moments"].std.shape == (2048, 1)
    torch.testing.assert_close(names["serve"](x[:1]), names["outputs"][:, :1])
    for outputs in (names["outputs"], *(names[own](x) for own in ("members",) if own in names)):
        assert ((outputs - y).square().mean((1, 2)) < 0.9 * y.square().mean()).all()  # it was trained


PAGES_WITH_CODE = [page for page in PAGES[1:] if blocks(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: page.name)
def test_the_code_of_docs_runs(page):
    for block in blocks(page.read_text(encoding="utf-8")):
        exec(compile(block, page.name, "exec"), {})


def test_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 130 and max(map(len, lines)) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert links or page.name in ("devices.md", "references.md")
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_pyens_exist(page):
    for name in set(re.findall(r"`pyens\.([\w.]+)", page.read_text(encoding="utf-8"))):
        found = pyens
        for part in name.split("."):
            if isinstance(found, type(pyens)) and not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)


def test_sources_and_the_citation_are_in_the_list_of_references():
    root = Path(pyens.__file__).parents[1]
    references = (root / "docs" / "references.md").read_text(encoding="utf-8")
    names = set(re.findall(r'^\| "(.+?)" \|', references, re.M))
    assert len(names) == 6
    others = {
        "The MovieLens Datasets: History and Context",
        "Fair scores for ensemble forecasts",
        "SNIP: Single-shot network pruning based on connection sensitivity",
        "To prune, or not to prune",
    }
    found = set()
    for path in (root / "pyens").rglob("*.py"):
        text = re.sub(r"\s+", " ", path.read_text(encoding="utf-8"))
        assert "the paper" not in text.lower(), path
        found |= set(re.findall(r'Source:[^".:;]* "([^"]+)"', text))
    assert names & found == names and found <= names | others
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {pyens.__version__}\n" in citation
    titles = re.findall(r'^    title: "?([^"\n]+)"?$', citation, re.M)
    assert len(titles) == 5 and all(f"*{title}*" in references for title in titles)


def test_readme_shows_the_saved_times():
    start = README.index("| work | best peer | pyens | ratio |")
    assert README[start:].split("\n\n")[0].splitlines()[2:] == results_page.shown()
