"""What changed in SRC since the last run, and `--prune`: outputs of photos that SRC no longer has.

The last run's plan is compared with the new listing; no photo is read. Photos that have gone are noted in
RUN/deleted.parquet before the plan is replaced, and stay there until a run with `--prune` has removed their outputs or
they have come back; so a night without `--prune`, or one that was interrupted, forgets none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

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


def compare(run: Run, src: str, source: pa.Table, listed: pa.Array, failed: Iterable[str], evidence: str) -> Changes:
    """Compare a listing with the last run's plan, and note what has been deleted in RUN/deleted.parquet.

    Args:
        src: SRC, absolute.
        source: the new source table.
        listed: ids of all photos of the listing, also of those that `--limit` leaves out.
        failed: paths of entries that could not be used; they may be folders.
        evidence: `stat` or `content`, what the keys of `source` go by.

    Raises:
        RunError: the plan, or the record of deleted photos, is unreadable.
    """
    changes = Changes(new=source.num_rows)
    noted = run.read_table(DELETED) if run.has(DELETED) else DELETED_SCHEMA.empty_table()
    if run.has("plan.parquet"):
        old = run.plan(["photo_id", "path", SOURCE])
        about = plan_about(old)
        changes.compared = about.get("source") == src
        changes.evidence_changed = about.get("evidence", evidence) != evidence
    if changes.compared:
        place = pc.index_in(source["photo_id"], value_set=old["photo_id"].combine_chunks())
        same = pc.equal(source["key"], old[SOURCE].combine_chunks().take(place.combine_chunks()))
        changes.new = place.null_count
        changes.unchanged = pc.sum(same).as_py() or 0
        changes.changed = source.num_rows - changes.new - changes.unchanged
        gone = old.filter(pc.invert(pc.is_in(old["photo_id"], value_set=listed)))
        blocked = set(failed)
        rows = []
        for photo_id, path in zip(gone["photo_id"].to_pylist(), gone["path"].to_pylist(), strict=True):
            if blocked and any(path[:i] in blocked for i, c in enumerate(path) if c == "/"):
                changes.unlisted += 1
            else:
                rows.append({"photo_id": photo_id, "path": path, "source": src})
        changes.deleted = [row["path"] for row in rows]
        noted = pa.concat_tables([noted, pa.Table.from_pylist(rows, DELETED_SCHEMA)])
    back = pc.and_(pc.equal(noted["source"], src), pc.is_in(noted["photo_id"], value_set=listed))
    noted = noted.filter(pc.invert(back)).group_by(DELETED_SCHEMA.names, use_threads=False).aggregate([])
    if noted.num_rows or run.has(DELETED):
        run.write_table(DELETED, noted.select(DELETED_SCHEMA.names))
    changes.waiting = noted.filter(pc.equal(noted["source"], src))["path"].to_pylist()
    return changes


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
    for table in run.store.scan("publish", None, ["photo_id", "path", "action", "out_path", "sha256"]):
        for row in table.filter(wanted(table)).to_pylist():
            if row["action"] in ("protected", "copied") and row["out_path"] == output_place(out, row["path"]):
                found.setdefault(row["path"], set()).add(row["sha256"])
    return found


def prune(run: Run, src: str, out: str, live: pa.ChunkedArray) -> Pruned:
    """Remove the outputs of photos that SRC no longer has: files that this run wrote and nobody has changed since.

    A file stays where its bytes are none that the manifests know, where something else has taken its place, or where a
    photo that SRC has is published under the same name (a file system that takes `A.jpg` for `a.jpg`).

    Args:
        src, out: absolute.
        live: paths of the photos that SRC has.

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


def _alike(paths: list[str], live: pa.ChunkedArray) -> dict[str, list[str]]:
    """By path, the live paths that a file system may take for the same: equal but for case and Unicode form."""

    def plain(values):
        return pc.utf8_lower(pc.utf8_normalize(values, form="NFC"))

    found: dict[str, list[str]] = {}
    keys = plain(pa.array(paths, pa.string()))
    same = live.filter(pc.is_in(plain(live), value_set=keys))
    by_key: dict[str, list[str]] = {}
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
