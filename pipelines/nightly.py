"""What changed in SRC since the last run, and `--prune`: outputs of photos that SRC no longer has.

The last run's plan is compared with the new listing; no photo is read. Photos that have gone are noted in
RUN/deleted.parquet before the plan is replaced, and stay there until a run with `--prune` has removed their outputs or
they have come back; so a night without `--prune`, or one that was interrupted, forgets none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.keys import pack
from pipelines.listing import packed_ids
from pipelines.manifests import SOURCE, Run, plan_about
from pipelines.sources import output_place, remove_output

DELETED = "deleted.parquet"
DELETED_SCHEMA = pa.schema([(name, pa.string()) for name in ("photo_id", "path", "source")])
_SHOWN = 100  # paths in summary.json


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
            "deleted_paths": self.deleted[:_SHOWN],
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


@dataclass
class Pruned:
    """What `prune` did: paths removed from OUT (gone already counts), and paths that stay, each with why."""

    removed: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """For summary.json."""
        kept = dict(list(self.kept.items())[:_SHOWN])
        return {"removed": len(self.removed), "removed_paths": self.removed[:_SHOWN], "kept": kept}


def written_files(run: Run, out: str, wanted: Callable[[pa.Table], pa.Array]) -> dict[str, set[str]]:
    """What this run's manifests say was written into OUT: path -> SHA-256 of every version.

    Args:
        out: OUT, absolute; files that were written to another one are left out.
        wanted: rows of `publish` (columns `photo_id`, `path`) -> boolean mask.

    Raises:
        StoreError: unreadable parts.
    """
    found: dict[str, set[str]] = {}
    for table in run.store.each_part("publish", ["photo_id", "path", "action", "out_path", "sha256"]):
        for row in table.filter(wanted(table)).to_pylist():
            if row["action"] in ("protected", "copied") and row["out_path"] == output_place(out, row["path"]):
                found.setdefault(row["path"], set()).add(row["sha256"])
    return found


def prune(run: Run, src: str, out: str, live: Iterable[pa.Array]) -> Pruned:
    """Remove the outputs of photos that SRC no longer has: files that this run wrote and nobody has changed since.

    A file stays where its bytes are none that the manifests know, where something else has taken its place, or where a
    photo that SRC has is published under the same name (a file system that takes `A.jpg` for `a.jpg`).

    Args:
        src, out: absolute.
        live: paths of the photos that SRC has, in pieces.

    Raises:
        StoreError: unreadable parts.  OutputError: OUT cannot be written to.
    """
    done = Pruned()
    if not run.has(DELETED):
        return done
    noted = run.read_table(DELETED)
    mine = noted.filter(pc.equal(noted["source"], src))
    if not mine.num_rows:
        return done
    ids = mine["photo_id"].combine_chunks()
    written = written_files(run, out, lambda rows: pc.is_in(rows["photo_id"], value_set=ids))
    alike = _alike(mine["path"].to_pylist(), live)
    for path in mine["path"].to_pylist():
        if path in written:
            if any(_one_file(output_place(out, path), output_place(out, other)) for other in alike.get(path, ())):
                done.kept[path] = "a photo of SRC is published under this name"
                continue
            why = remove_output(out, path, written[path])
            if why is not None:
                done.kept[path] = why
                continue
        done.removed.append(path)
    left = [row for row in noted.to_pylist() if row["source"] != src or row["path"] in done.kept]
    run.write_table(DELETED, pa.Table.from_pylist(left, DELETED_SCHEMA))
    return done


def _alike(paths: list[str], live: Iterable[pa.Array]) -> dict[str, list[str]]:
    """By path, the live paths that a file system may take for the same: equal but for case and Unicode form."""

    def plain(values):
        return pc.utf8_lower(pc.utf8_normalize(values, form="NFC"))

    found: dict[str, list[str]] = {}
    keys = plain(pa.array(paths, pa.string()))
    by_key: dict[str, list[str]] = {}
    for piece in live:
        same = piece.filter(pc.is_in(plain(piece), value_set=keys))
        for path, key in zip(same.to_pylist(), plain(same).to_pylist(), strict=True):
            by_key.setdefault(key, []).append(path)
    for path, key in zip(paths, keys.to_pylist(), strict=True):
        if key in by_key:
            found[path] = by_key[key]
    return found


def _one_file(a: str, b: str) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:  # one is not there, or they are URLs of a store, whose names are exact
        return False
