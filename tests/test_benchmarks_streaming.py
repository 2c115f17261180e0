"""The benchmark of rows that need not fit into memory runs, and says what it has measured."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import streaming

pytest.importorskip("pyarrow", reason="no pyarrow: pip install 'pyens[arrow]'")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: memory is read there")
def test_quick(tmp_path, capsys):
    output, work = tmp_path / "results", tmp_path / "work"
    assert streaming.main(["--quick", "--work", str(work), "--output", str(output)]) == 0
    found = json.loads((output / "streaming.json").read_text())
    ways = found["rows"]["5000"]
    assert set(ways) == set(streaming.WAYS)
    assert all(run["rows_per_second"] > 0 and np.isfinite(run["memory"]) for run in ways.values())
    assert len(found["places"]) == 4 and min(found["places"].values()) > 1e5
    page = (output / "streaming.md").read_text()
    assert all(f"| 5,000 | {way} |" in page for way in ways) and (output / "streaming.png").exists()
    assert f"| {ways['Parquet']['rows_per_second']:,.0f} |" in capsys.readouterr().out


def test_all_ways_train_on_the_same_rows(tmp_path):
    from pyens.data import ArrayRows, ArrowRows

    streaming.make(tmp_path, 300)
    maps = streaming.arrays(tmp_path, 300)
    parquet = ArrowRows(tmp_path / "rows.parquet", *streaming.NAMES)
    for found, expected in zip(parquet.read(0), [ArrayRows(*maps)], strict=True):
        for one, other in zip(found.columns, expected.columns, strict=True):
            assert np.array_equal(one, other)
