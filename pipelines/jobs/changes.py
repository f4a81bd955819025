"""What of SRC is new, changed or gone since the last run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.keys import pack
from pipelines.archive.listing import packed_ids
from pipelines.run.folder import Run, plan_about
from pipelines.run.schemas import SOURCE

DELETED = "deleted.parquet"
DELETED_SCHEMA = pa.schema([(name, pa.string()) for name in ("photo_id", "path", "source")])
PATHS_SHOWN = 100  # paths in summary.json


@dataclass
class Changes:
    """Photos of a listing against those of the last run.

    Attributes:
        compared: there was a last run, and it was of the same SRC. Else every photo is `new`, and none `deleted`.
        new, changed, unchanged: number of photos of this run. Changed: another file, by size and modification time or
            by content (`--verify-content`), another person, or another place that it is read from.
        deleted: paths of photos of the last run that the listing does not have.
        unlisted: how many more are missing only because a folder above them could not be listed; they are not deleted.
        waiting: photos deleted in this or an earlier run of this SRC, whose outputs have not been pruned.
        evidence_changed: the last run went by other evidence, so all photos have other keys.
    """

    compared: bool = False
    new: int = 0
    changed: int = 0
    unchanged: int = 0
    deleted: list[str] = field(default_factory=list)
    unlisted: int = 0
    waiting: list[str] = field(default_factory=list)
    evidence_changed: bool = False

    def words(self) -> str:
        """One line for people; empty for a first run."""
        if not self.compared:
            return ""
        text = f"since the last run: {self.new} new, {self.changed} changed, {self.unchanged} unchanged"
        text += f", {len(self.deleted)} deleted"
        return text + (f", {self.unlisted} in folders that could not be listed" if self.unlisted else "")

    def to_dict(self) -> dict:
        """For summary.json."""
        return {
            "compared": self.compared,
            "new": self.new,
            "changed": self.changed,
            "unchanged": self.unchanged,
            "deleted": len(self.deleted),
            "deleted_paths": self.deleted[:PATHS_SHOWN],
            "unlisted": self.unlisted,
        }


def compare(
    run: Run, src: str, source: Iterable[pa.Table], listed: np.ndarray, failed: Iterable[str], evidence: str
) -> Changes:
    """Compare a listing with the last run's plan, and note what has been deleted in RUN/deleted.parquet.

    Args:
        src: SRC, absolute.
        source: the new source table, in pieces.
        listed: uint64 (n,), ids of all photos of the listing, also of those that `--limit` leaves out.
        failed: paths of entries that could not be used; they may be folders.
        evidence: `stat` or `content`, what the keys of `source` go by.

    Raises:
        RunError: the plan, or the record of deleted photos, is unreadable.
    """
    changes = Changes()
    noted = run.read_table(DELETED) if run.has(DELETED) else DELETED_SCHEMA.empty_table()
    listed = np.sort(listed)
    if run.has("plan.parquet"):
        about = plan_about(run.plan_schema())
        changes.compared = about.get("source") == src
        changes.evidence_changed = about.get("evidence", evidence) != evidence
    old, keys = _last_plan(run) if changes.compared else (np.empty(0, np.uint64), np.empty((0, 2), np.uint64))
    for table in source:
        ids = packed_ids(table["photo_id"])
        known = _among(ids, old)
        place = np.searchsorted(old, ids[known])
        same = int((keys[place] == pack(table["key"])[known]).all(axis=1).sum())
        changes.new += len(ids) - int(known.sum())
        changes.unchanged += same
        changes.changed += int(known.sum()) - same
    if changes.compared and not _among(old, listed).all():
        blocked = set(failed)
        rows = []
        for table in run.read_tables("plan.parquet", ["photo_id", "path"]):
            for row in table.filter(pa.array(~_among(packed_ids(table["photo_id"]), listed))).to_pylist():
                if blocked and any(row["path"][:i] in blocked for i, c in enumerate(row["path"]) if c == "/"):
                    changes.unlisted += 1
                else:
                    rows.append(row | {"source": src})
        changes.deleted = [row["path"] for row in rows]
        noted = pa.concat_tables([noted, pa.Table.from_pylist(rows, DELETED_SCHEMA)])
    if noted.num_rows:
        here = pa.array(_among(packed_ids(noted["photo_id"]), listed))
        noted = noted.filter(pc.invert(pc.and_(pc.equal(noted["source"], src), here)))
        noted = noted.group_by(DELETED_SCHEMA.names, use_threads=False).aggregate([])
    if noted.num_rows or run.has(DELETED):
        run.write_table(DELETED, noted.select(DELETED_SCHEMA.names))
    changes.waiting = noted.filter(pc.equal(noted["source"], src))["path"].to_pylist()
    return changes


def _last_plan(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the photos of the last run, ascending, and their keys at the source (n, 2)."""
    ids, keys = [np.empty(0, np.uint64)], [np.empty((0, 2), np.uint64)]
    for table in run.read_tables("plan.parquet", ["photo_id", SOURCE]):
        ids.append(packed_ids(table["photo_id"]))
        keys.append(pack(table[SOURCE]))
    found = np.concatenate(ids)
    order = np.argsort(found, kind="stable")
    return found[order], np.concatenate(keys)[order]


def _among(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which ids are among `known`, which is sorted."""
    if not len(known):
        return np.zeros(len(ids), bool)
    return known[np.minimum(np.searchsorted(known, ids), len(known) - 1)] == ids
