"""``--prune``: outputs of photos that SRC no longer has are removed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.archive.output import output_place, remove_output
from pipelines.jobs.changes import DELETED, DELETED_SCHEMA, PATHS_SHOWN
from pipelines.run.folder import Run


@dataclass
class Pruned:
    """What `prune` did: paths removed from OUT (gone already counts), and paths that stay, each with why."""

    removed: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """For summary.json."""
        kept = dict(list(self.kept.items())[:PATHS_SHOWN])
        return {"removed": len(self.removed), "removed_paths": self.removed[:PATHS_SHOWN], "kept": kept}


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
