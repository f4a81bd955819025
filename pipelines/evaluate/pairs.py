"""Which protected photo belongs to which original, and which other photo shows the same person.

Pairs go by the relative path without its suffix (formats may differ); where several files share it, the same whole
path goes first, and what is left undecided is AMBIGUOUS, not guessed.  Where protected names have an end of their own
(`drop`), files that have it go before files that lack it, which are copies of the original then.  Trees may hold more
photos than the memory: listings are spread over files by a hash of what they are to be joined by, and joined file by
file (a Grace hash join).
"""

from __future__ import annotations

import hashlib
import heapq
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from cluster import hash_key
from pipelines.archive.paths import photo_id
from pipelines.archive.source import list_photos
from pipelines.evaluate.errors import EvaluateError

OK, MISSING, AMBIGUOUS, UNREADABLE = "ok", "missing", "ambiguous", "unreadable"
MATES = 3  # photos of the same person offered to a probe: the first that shows a face counts (docs/evaluate.md)

_BUCKETS = 64
_ROWS_AT_ONCE = 100_000  # held before they are written to their files
_ONE_PIECE = 10_000  # photos whose faces are added up at a time: a face may have a thousand columns


def text_fields(names: str) -> list[pa.Field]:
    """Columns of text, in order; one whose name is followed by `?` may be null."""
    return [pa.field(name.removesuffix("?"), pa.string(), name.endswith("?")) for name in names.split()]


PAIR_SCHEMA = pa.schema(
    [
        *text_fields("key photo_id path url protected_path? protected_url? person_id?"),
        pa.field("mates", pa.list_(pa.string())),
        *text_fields("status reason?"),
    ]
)
_LISTED = pa.schema(text_fields("stem? path? url? version? person? error?"))
_PAIRED = pa.schema([*_LISTED, *text_fields("protected_path? protected_url? protected_version? status? reason?")])
_NAMED = pa.schema(text_fields("stem? path? person?"))
Row = dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """A person of the gallery, with photos in the order in which they are tried: (url, version)."""

    person: str
    photos: tuple[tuple[str, str], ...]


@dataclass
class Counts:
    """`originals`: photos listed. `photos`: of them those to be measured (`--limit`). `extra`: protected photos
    without an original. `skipped`: other files, by code. `people`: of the photos measured. `people_rows_unused`: rows
    of the table of people whose photo is not there. `gallery_photos`: of named people, and readable as far as the
    listing tells; `gallery_unusable`: those of --gallery that are not."""

    originals: int = 0
    photos: int = 0
    protected: int = 0
    extra: int = 0
    extra_examples: list[str] = field(default_factory=list)
    unnamed: int = 0
    people: int = 0
    people_rows_unused: int = 0
    gallery_photos: int = 0
    gallery_unusable: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


def stem(path: str, drop: str = "") -> str:
    """A relative path without its suffix, and without `drop` at the end of what is left (`_cloaked`, say).

    A name that starts with a dot and has no other has no suffix.
    """
    folder, _, name = path.rpartition("/")
    base = os.path.splitext(name)[0]
    if drop and base.endswith(drop) and base != drop:
        base = base[: -len(drop)]
    return f"{folder}/{base}" if folder else base


def _ends_in(path: str, drop: str) -> bool:
    """Whether `stem` drops something of this path."""
    return stem(path, drop) != stem(path)


def _number(*fields: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(fields).encode("utf-8", "surrogatepass"), digest_size=8).digest())


class Spread:
    """Rows spread over files by the hash of one of their fields; rows with equal values come back together.

    Args:
        folder: for the files, which must not exist yet.
        schema: of the rows.
        by: the field.
    """

    def __init__(self, folder: Path, name: str, schema: pa.Schema, by: str) -> None:
        self.schema, self.by, self.rows = schema, by, 0
        self._files = [folder / f"{name}-{i:02d}.parquet" for i in range(_BUCKETS)]
        self._writers: dict[int, pq.ParquetWriter] = {}
        self._waiting: list[list[Row]] = [[] for _ in range(_BUCKETS)]
        self._held = 0

    def add(self, row: Row) -> None:
        self._waiting[_number(row[self.by]) % _BUCKETS].append(row)
        self.rows += 1
        self._held += 1
        if self._held >= _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        for i, rows in enumerate(self._waiting):
            if rows:
                if i not in self._writers:
                    self._writers[i] = pq.ParquetWriter(self._files[i], self.schema, compression="zstd")
                self._writers[i].write_table(pa.Table.from_pylist(rows, self.schema))
                rows.clear()
        self._held = 0

    def close(self) -> None:
        self._flush()
        for writer in self._writers.values():
            writer.close()

    def read(self, bucket: int) -> list[Row]:
        """One file's rows; call `close` before."""
        if bucket not in self._writers:
            return []
        return pq.ParquetFile(self._files[bucket]).read(use_threads=False).to_pylist()

    def drop(self) -> None:
        """Delete the files."""
        for i in self._writers:
            self._files[i].unlink()


def _people(table: str) -> Iterator[Row]:
    """Rows of a CSV or Parquet table with columns `path` (relative to ORIGINALS, suffix optional) and `person_id`.

    Raises:
        EvaluateError: BAD_PEOPLE.
    """

    try:
        if table.lower().endswith(".csv"):
            options = pyarrow.csv.ConvertOptions(column_types={"path": pa.string(), "person_id": pa.string()})
            found = pyarrow.csv.read_csv(table, convert_options=options)
        else:
            found = pq.ParquetFile(table).read(use_threads=False)
        for batch in found.select(["path", "person_id"]).to_batches():
            for row in batch.to_pylist():
                if row["path"] and row["person_id"] is not None and row["person_id"] != "":
                    yield {"path": posixpath.normpath(str(row["path"])), "person": str(row["person_id"])}
    except (OSError, KeyError, pa.ArrowException) as error:
        raise EvaluateError(
            "BAD_PEOPLE", f"{table}: a table with columns path and person_id is needed: {error}"
        ) from error


class Pairing:
    """Lists and joins the trees; `tables` then gives the rows, `references` the people of the gallery.

    Args:
        originals, protected: folders, globs, lists or tables, as for `scol protect`.
        gallery: photos of the same and of other people, none of them protected, a folder for each person or a table
            with `person_id`; None: the originals themselves.
        people_from: `folder`, a table (see `_people`), or None: nobody is named.
        folder: for the files of the joins; it must exist and be empty.
        limit: measure so many photos at most, drawn by `seed`; the gallery comes from all.
        references: people of the gallery at most. The probes' own people go first.
        drop: end of the protected files' names, before the suffix, that the originals' lack.
        only: measure none but these paths; the gallery comes from all.
        stop: asked now and then; where it says true, it ends as by Ctrl-C.

    Raises:
        SourceError: a tree cannot be listed.
        EvaluateError: EMPTY, NO_PAIRS, BAD_PEOPLE.
    """

    def __init__(
        self,
        originals: str,
        protected: str,
        *,
        gallery: str | None,
        people_from: str | None,
        folder: Path,
        limit: int | None = None,
        seed: int = 0,
        references: int = 1000,
        drop: str = "",
        only: Collection[str] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.counts, self._folder, self._stop, self._drop = Counts(), folder, stop, drop
        self._seed, self._limit, self._only = seed, limit, only
        self._skipped: Counter[str] = Counter()
        same = drop != "" and originals.rstrip("/") == protected.rstrip("/")  # protected files beside their originals
        one = self._list_originals(originals, "folder" if people_from == "folder" else None, same)
        two = Spread(folder, "protected", _LISTED, "stem")
        for row in self._listing(protected, None, drop):
            if not same or _ends_in(row["path"], drop):
                two.add(row)
        two.close()
        self.counts.originals, self.counts.protected = one.rows, two.rows
        joined = self._join(one, two, None if people_from in (None, "folder") else self._list_people(people_from))
        if not self.paired:
            raise EvaluateError(
                "NO_PAIRS", f"no photo of {protected} has the path of one of {originals}, whatever the suffix"
            )
        others = None if gallery is None else self._list_gallery(gallery, gallery.rstrip("/") == protected.rstrip("/"))
        self.counts.skipped = dict(self._skipped)
        self._finish(joined, others, references)

    def _listing(self, url: str, people_from: str | None, drop: str = "") -> Iterator[Row]:
        for row in list_photos(url, people_from=people_from):
            if self._stop():
                raise KeyboardInterrupt
            if row.skipped:
                self._skipped[row.code] += 1
                continue
            yield {"stem": stem(row.path, drop), "path": row.path, "url": row.url} | {
                "version": f"{row.size}/{row.modified}",
                "person": row.person_id,
                "error": row.error,
            }

    def _list_originals(self, originals: str, people_from: str | None, same: bool) -> Spread:
        """`same`: protected files lie beside them."""
        found = Spread(self._folder, "originals", _LISTED, "stem")
        chosen: list[int] = []  # the smallest hashes, negated: a heap
        wanted = 0
        for row in self._listing(originals, people_from):
            if same and _ends_in(row["path"], self._drop):
                continue
            found.add(row)
            if self._only is not None and row["path"] not in self._only:
                continue
            wanted += 1
            if self._limit is not None:
                number = -self._draw(row["path"])
                if len(chosen) < self._limit:
                    heapq.heappush(chosen, number)
                elif number > chosen[0]:
                    heapq.heapreplace(chosen, number)
        self._cut = -chosen[0] if chosen else None
        if not found.rows:
            raise EvaluateError("EMPTY", f"no photo at {originals}")
        if not wanted:
            raise EvaluateError("EMPTY", f"none of the run's photos is below {originals}")
        found.close()
        return found

    def _list_people(self, table: str) -> Spread:
        found = Spread(self._folder, "people", _NAMED, "stem")
        for row in _people(table):
            self.counts.people_rows_unused += 1
            # Without a suffix it may be what looks like one: both are looked for.
            for name in {stem(row["path"]), row["path"]}:
                found.add(row | {"stem": name})
        found.close()
        return found

    def _join(self, one: Spread, two: Spread, named: Spread | None) -> Spread:
        """Originals with their protected photos and their people; the listings' files go."""
        joined = Spread(self._folder, "joined", _PAIRED, "person")
        self.paired = used = 0
        for bucket in range(_BUCKETS):
            if self._stop():
                raise KeyboardInterrupt
            rows, extra = pair_up(one.read(bucket), two.read(bucket))
            if named is not None:
                used += name_photos(rows, named.read(bucket))
            for row in rows:
                self.counts.unnamed += row["person"] is None
                # Photos of nobody in particular are people of one photo.
                row["person"] = _label(row["person"], row["path"])
                self.paired += row["status"] == OK
                joined.add(row)
            self.counts.extra += len(extra)
            self.counts.extra_examples = (self.counts.extra_examples + extra)[:5]
        self.counts.people_rows_unused = max(0, self.counts.people_rows_unused - used)
        for spread in (one, two, *(() if named is None else (named,))):
            spread.drop()
        joined.close()
        return joined

    def _list_gallery(self, gallery: str, same: bool) -> Spread:
        """`same`: protected files lie in it."""
        found = Spread(self._folder, "gallery", _LISTED, "person")
        for row in self._listing(gallery, "folder"):
            if same and _ends_in(row["path"], self._drop):
                continue
            if row["error"] is None and row["person"] is not None:
                row["person"] = _label(row["person"], row["path"])
                found.add(row)
            else:
                self.counts.gallery_unusable += 1
        found.close()
        return found

    def _draw(self, path: str) -> int:
        return _number("sample", str(self._seed), path)

    def _measured(self, path: str) -> bool:
        wanted = self._only is None or path in self._only
        return wanted and (self._limit is None or self._draw(path) <= self._cut)

    def _finish(self, joined: Spread, others: Spread | None, references: int) -> None:
        """Choose mates and references, person by person; the files of the joins go."""
        best: list[tuple[tuple[int, int], str, tuple]] = []  # a heap of the people that are wanted least
        self._final: list[Path] = []
        for bucket in range(_BUCKETS):
            if self._stop():
                raise KeyboardInterrupt
            rows = joined.read(bucket)
            pool: dict[str, list[Row]] = {}
            for row in others.read(bucket) if others is not None else rows:
                if row["error"] is None and row["person"][0] == "=":
                    pool.setdefault(row["person"], []).append(row)
            for photos in pool.values():
                photos.sort(key=lambda r: _number(str(self._seed), r["path"]))
                self.counts.gallery_photos += len(photos)
            probes = [row for row in rows if self._measured(row["path"])]
            own = {row["person"] for row in probes}
            self.counts.people += len(own)
            out = [self._pair(row, pool.get(row["person"], []), others is None) for row in probes]
            out.sort(key=lambda r: r["path"])
            self.counts.photos += len(out)
            self._write(bucket, out)
            for person, photos in pool.items():
                rank = (0 if person in own else 1, _number("reference", str(self._seed), person))
                offered = tuple((p["url"], p["version"]) for p in photos[:MATES])
                entry = ((-rank[0], -rank[1]), person[1:], offered)
                if len(best) < references:
                    heapq.heappush(best, entry)
                elif entry > best[0]:
                    heapq.heapreplace(best, entry)
        self.references = sorted((Reference(person, photos) for _, person, photos in best), key=lambda r: r.person)
        for spread in (joined, *(() if others is None else (others,))):
            spread.drop()

    def _write(self, bucket: int, rows: list[Row]) -> None:
        if rows:
            path = self._folder / f"source-{bucket:02d}.parquet"
            pq.write_table(pa.Table.from_pylist(rows, PAIR_SCHEMA), path, compression="zstd")
            self._final.append(path)

    def _pair(self, row: Row, photos: list[Row], one_tree: bool) -> Row:
        """A row of the source table. Mates: other photos of the person, not this one under another name. `one_tree`:
        they are of the originals, where one stem in two formats is one photo; in another tree names start anew."""
        size = row["version"].split("/")[0]
        name = row["path"].rsplit("/", 1)[-1]
        mates = [
            p
            for p in photos
            if not (one_tree and p["stem"] == row["stem"])
            and p["url"] != row["url"]
            and not (p["path"].rsplit("/", 1)[-1] == name and p["version"].split("/")[0] == size)
        ][:MATES]
        person = row["person"][1:] if row["person"][0] == "=" else None
        fields = (
            row["path"],
            row["url"],
            row["version"],
            row["protected_url"] or "",
            row["protected_version"] or "",
            "" if person is None else "=" + person,
            row["status"],
            row["reason"] or "",
            *(f for p in mates for f in (p["url"], p["version"])),
        )
        kept = {name: row[name] for name in ("path", "url", "protected_path", "protected_url", "status", "reason")}
        key, mates_urls = hash_key("pair", *fields), [p["url"] for p in mates]
        return kept | {"key": key, "photo_id": photo_id(row["path"]), "person_id": person, "mates": mates_urls}

    def tables(self) -> Iterator[pa.Table]:
        """The source table in pieces (`PAIR_SCHEMA`): all photos of a person are in one, each piece is sorted by
        path. The same trees give the same pieces in the same order."""
        if self.counts.photos <= _ONE_PIECE:  # a single piece, so that everything is in the order of paths
            yield pa.concat_tables([self._read(path) for path in self._final]).sort_by("path")
        else:
            yield from map(self._read, self._final)

    def rows(self) -> Iterator[Row]:
        """Of `tables`."""
        return (row for table in self.tables() for row in table.to_pylist())

    @staticmethod
    def _read(path: Path) -> pa.Table:
        return pq.ParquetFile(path).read(use_threads=False)


def _label(person: str | None, path: str) -> str:
    return "?" + path if person is None else "=" + person


def name_photos(photos: Iterable[Row], rows: Iterable[Row]) -> int:
    """Give photos their person (`person`, None for nobody): by the whole path, or by a path that has no suffix.

    Args:
        photos: listed, all of some stems.
        rows: of the table of people, `stem` being one of its two readings: the path itself where it has no suffix.

    Returns:
        how many rows' photos were found.

    Raises:
        EvaluateError: BAD_PEOPLE, two people for one photo.
    """
    known: dict[tuple[bool, str], str] = {}
    for row in rows:
        place = (row["stem"] == row["path"], row["path"])
        if known.setdefault(place, row["person"]) != row["person"]:
            raise EvaluateError("BAD_PEOPLE", f"{row['path']}: the table names two people for it")
    used = set()
    for photo in photos:
        found = [place for place in ((False, photo["path"]), (True, photo["stem"])) if place in known]
        if len({known[place] for place in found}) > 1:
            raise EvaluateError("BAD_PEOPLE", f"{photo['path']}: the table names two people for it")
        photo["person"] = known[found[0]] if found else None
        used.update(found)
    return len(used)


def pair_up(originals: list[Row], protected: list[Row]) -> tuple[list[Row], list[str]]:
    """Originals with their protected photos, and the paths of protected ones that belong to none.

    Args:
        originals, protected: listings (`_LISTED`), all rows of a stem together in both.
    """
    candidates: dict[str, list[Row]] = {}
    extra: list[str] = []
    for row in protected:
        candidates.setdefault(row["stem"], []).append(row)
    for name, rows in candidates.items():
        own = [row for row in rows if stem(row["path"]) != name]  # whose names had the end of protected files
        if own and len(own) < len(rows):  # the others are unprotected copies
            extra += [row["path"] for row in rows if row not in own]
            candidates[name] = own
    groups: dict[str, list[Row]] = {}
    for row in originals:
        groups.setdefault(row["stem"], []).append(row)
    out = []
    for name, group in groups.items():
        left = {name + os.path.splitext(row["path"])[1]: row for row in candidates.pop(name, [])}
        exact = {row["path"]: left.pop(row["path"]) for row in group if row["path"] in left}
        rest = [row for row in group if row["path"] not in exact]
        for row in group:
            partner = exact.get(row["path"])
            status, reason = OK, None
            if partner is None and len(rest) == len(left) == 1:
                partner = next(iter(left.values()))
            elif partner is None and left:
                status, reason = (
                    AMBIGUOUS,
                    f"AMBIGUOUS: {len(rest)} originals and {len(left)} protected photos share this name",
                )
            elif partner is None:
                status, reason = MISSING, "MISSING: no protected photo of this path"
            if row["error"] is not None:
                status, reason = UNREADABLE, row["error"]
            elif partner is not None and partner["error"] is not None:
                status, reason = UNREADABLE, f"{partner['error']} (the protected photo)"
            protected_fields = {f"protected_{name}": (partner or {}).get(name) for name in ("path", "url", "version")}
            out.append(row | protected_fields | {"status": status, "reason": reason})
        if not rest:  # else what is left is paired, or told of as ambiguous
            candidates[name] = list(left.values())
    extra += [row["path"] for rows in candidates.values() for row in rows]
    return out, sorted(extra)
