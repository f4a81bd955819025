import threading
from pathlib import Path

import pyarrow as pa
import pytest
from arithmetic import VERSIONS, chain, expected_total, source_table, stages

from cluster import Engine, PartStore

pytestmark = pytest.mark.usefixtures("ray_cluster")


def run(store, modes, *, log=None, salt="", versions=VERSIONS, settings=None, **split_settings):
    source = source_table(modes, salt)
    engine = Engine(store, stages(log, **split_settings), hard_margin=1.0, **(settings or {}))
    return engine.run(source, chain(source, versions)), source, chain(source, versions)


def assert_complete(store, source, keys):
    """Every item has rows in every stage, as many as it should and no more, with the right values where it is ok."""
    split = store.read_rows("split", keys["split"])
    totals = store.read_rows("total", keys["total"])
    assert totals["key"].to_pylist() == keys["total"]
    counts = {k: 0 for k in keys["split"]}
    for row in split.to_pylist():
        counts[row["key"]] += 1
    assert set(split["key"].to_pylist()) == set(keys["split"])
    for n, row in enumerate(totals.to_pylist()):
        if row["status"] == "ok":
            assert (row["n"], row["total"]) == (n, expected_total(n))
            assert counts[keys["split"][n]] == n % 3 + 1
        else:
            assert counts[keys["split"][n]] == 1
    return {n: row["reason"] for n, row in enumerate(totals.to_pylist()) if row["status"] != "ok"}


def test_every_item_has_its_rows_in_every_stage(tmp_path):
    store = PartStore(tmp_path)
    summary, source, keys = run(store, ["ok"] * 40)
    assert assert_complete(store, source, keys) == {}
    assert [s.done for s in summary.stages.values()] == [40] * 4
    assert summary.stages["split"].statuses == {"ok": sum(n % 3 + 1 for n in range(40))}
    assert summary.restarts == 0
