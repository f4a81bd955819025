"""`scol purge`: everything that a run holds or has published of some photos, or of a person's, is removed.

Removed are: the files in OUT that the run wrote and nobody has changed since; the photos' rows, with crops, codes and
pictures, at every stage and of every version; mentions of their faces among the similar codes of other photos; their
rows in the plan, in what waits for `--prune` and in retries; lines of logs in the run's folder; temporary files of
processes that died; and summary and report are made anew. Not touched: SRC, galleries elsewhere, logs elsewhere.

A part is never changed otherwise (`PartStore.replace_part` says how it is done here), so nobody may be at work on the
run meanwhile (`presence`). What is found through rows goes before the rows: outputs, and lines that name keys. The
source rows, from which a person's photos are known, go last. So a purge that dies half-way finds the rest when it is
called again.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gallery_index import GalleryError, GalleryNotFoundError, Store, open_gallery
from gallery_index.table import read_columns
from pipelines.archive.output import output_place, remove_output
from pipelines.archive.paths import OutputError, photo_id
from pipelines.config.names import STAGES
from pipelines.jobs.changes import DELETED
from pipelines.report.run_page import write_report
from pipelines.run.attempts import FOLDER as RETRIES
from pipelines.run.folder import Run, RunError, plan_about
from pipelines.run.presence import Presence
from pipelines.run.schemas import SOURCE
from pipelines.run.summary import summary

MENTION = "purged"  # stands for the id of a code that is gone, among the similar codes of another face
_TEMP = re.compile(r".*\.[0-9a-f]{32}\.tmp")
_OUT_TEMP = re.compile(r"\.scol-[0-9a-f]{32}\.part")
_HEX = re.compile(r"[0-9a-f]{32}|[0-9a-f]{16}")  # keys, and ids of photos, which those of faces begin with
_PASSES = 3


@dataclass
class Purged:
    """What was removed.

    Attributes:
        photos: paths.
        outputs: files in OUT that were removed (full paths or URLs); `kept`: those that stay, with why.
        rows: rows removed, by stage.
        crops, codes: how many of these rows held a crop of a face, a style code.
        mentions: rows of other photos in which an id among the similar codes was replaced by `purged`.
        parts: parts of the manifests that were written anew or deleted.
        log_lines: lines removed from logs in the run's folder.
        temporary: files of processes that died.
        notes: what is left elsewhere, in words.
    """

    photos: list[str]
    outputs: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)
    crops: int = 0
    codes: int = 0
    mentions: int = 0
    parts: int = 0
    log_lines: int = 0
    temporary: int = 0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return vars(self) | {"rows": dict(self.rows)}


def purge(
    url: str, photos: Sequence[str] = (), people: Sequence[str] = (), say: Callable[[str], None] = lambda text: None
) -> Purged:
    """Remove photos from a run, by path (as in the manifests) or by person.

    A photo counts as a person's if any of its versions did. What is still in SRC is made again by the next run.

    Raises:
        RunError: not a run's folder, a photo or person that it does not know (then nothing is changed), or rows that
            keep coming back.
        BusyError: somebody is at work on the run.
        StoreError, OutputError: something cannot be written or removed; the same purge again goes on.
    """
    run = Run(url)
    run.require()
    with Presence(run, "purge"):
        ids = _find(run, photos, people)
        done = Purged(sorted(ids.values()))
        chosen = pa.array(ids, pa.string())
        keys = _keys(run, chosen)
        _remove_outputs(run, chosen, done)
        _clean_files(run, ids, keys, done)
        _renew_reports(run, ids, say)
        done.temporary += len(run.store.collect_garbage(older_than=0))
        for stage in (*reversed(STAGES), SOURCE):
            _clean_stage(run, stage, chosen, done)
        _note_elsewhere(run, chosen, done)
    return done


def lines(done: Purged) -> list[str]:
    """What was removed, for people."""
    rows = ", ".join(f"{count} of {stage}" for stage, count in done.rows.items() if count) or "none"
    return [
        *(f"photo    {path}" for path in done.photos),
        *(f"removed  {place}" for place in done.outputs),
        *(f"STAYS    {place}: {why}" for place, why in done.kept.items()),
        f"rows     {rows}; with {done.crops} crops and {done.codes} codes; {done.parts} parts written anew or deleted",
        f"others   {done.mentions} mentions, {done.log_lines} log lines, {done.temporary} temporary files",
        *(f"note     {note}" for note in done.notes),
    ]


def _find(run: Run, photos: Sequence[str], people: Sequence[str]) -> dict[str, str]:
    """Photo ids and paths of what is meant."""
    by_path = {photo_id(path): path for path in photos}
    wanted_ids, wanted_people = pa.array(by_path, pa.string()), pa.array(people, pa.string())
    found: dict[str, str] = {}
    seen_people: set[str] = set()
    for name in run.store.parts(SOURCE):
        table = run.store.read_part(SOURCE, name, ["photo_id", "path", "person_id"])
        mine = pc.or_(
            pc.is_in(table["photo_id"], value_set=wanted_ids), pc.is_in(table["person_id"], value_set=wanted_people)
        )
        for row in table.filter(mine).to_pylist():
            found[row["photo_id"]] = row["path"]
            seen_people.add(row["person_id"])
    unknown = [path for photo, path in by_path.items() if photo not in found]
    unknown += [f"person {person}" for person in people if person not in seen_people]
    if unknown:
        raise RunError(f"{run.url} does not know {', '.join(unknown)}; nothing was removed")
    return found


def _keys(run: Run, ids: pa.Array) -> set[str]:
    """The photos' keys at all stages, of all versions."""
    keys: set[str] = set()
    for stage in (SOURCE, *STAGES):
        for name in run.store.parts(stage):
            table = run.store.read_part(stage, name, ["key", "photo_id"])
            keys.update(table["key"].filter(pc.is_in(table["photo_id"], value_set=ids)).to_pylist())
    return keys


def _remove_outputs(run: Run, ids: pa.Array, done: Purged) -> None:
    """The photos' files in OUT. What rows name elsewhere is not removed on their word alone, but reported."""
    out = run.read_json("run.json")["out"] if run.has("run.json") else None
    written: dict[str, set[str]] = {}
    for name in run.store.parts("publish"):
        table = run.store.read_part("publish", name, ["photo_id", "path", "out_path", "sha256"])
        for row in table.filter(pc.is_in(table["photo_id"], value_set=ids)).to_pylist():
            if row["out_path"] is None:
                continue
            if out is None or row["out_path"] != output_place(out, row["path"]):
                done.kept[row["out_path"]] = f"it was written to another OUT than {out}; remove it by hand"
            else:
                written.setdefault(row["path"], set()).add(row["sha256"])
    for path, digests in written.items():
        place = output_place(out, path)
        try:
            why = remove_output(out, path, digests)
        except OutputError as error:
            if error.code != "UNSAFE_PATH":
                raise
            why = str(error)
        if why is None:
            done.outputs.append(place)
        else:
            done.kept[place] = why
        folder = os.path.dirname(place)
        if os.path.isdir(folder):  # files of writers that were killed: nobody is writing now
            for name in os.listdir(folder):
                if _OUT_TEMP.fullmatch(name):
                    os.unlink(os.path.join(folder, name))
                    done.temporary += 1


def _clean_stage(run: Run, stage: str, ids: pa.Array, done: Purged) -> None:
    """Take the photos' rows out of all parts of a stage."""
    photos = set(ids.to_pylist())
    for _ in range(_PASSES):
        found = False
        for name in run.store.parts(stage):
            look = ["photo_id", "most_ids"] if stage == "fuse" else ["photo_id"]
            table = run.store.read_part(stage, name, look)
            mine = pc.is_in(table["photo_id"], value_set=ids)
            mentions: set[str] = set()
            if stage == "fuse":
                listed = pc.unique(table["most_ids"].combine_chunks().flatten()).to_pylist()
                mentions = {face for face in listed if _photo_of(face) in photos}
            if not pc.any(mine).as_py() and not mentions:
                continue
            found = True
            table = run.store.read_part(stage, name)
            gone, rest = table.filter(mine), table.filter(pc.invert(mine))
            done.rows[stage] += gone.num_rows
            if stage == "align":
                done.crops += gone.num_rows - gone["crop"].null_count
            if stage == "invert":
                done.codes += gone.num_rows - gone["code"].null_count
            if mentions:
                lists = rest["most_ids"].to_pylist()
                done.mentions += sum(not mentions.isdisjoint(names or ()) for names in lists)
                lists = [names and [MENTION if name in mentions else name for name in names] for names in lists]
                column = pa.array(lists, rest.schema.field("most_ids").type)
                rest = rest.set_column(rest.schema.get_field_index("most_ids"), "most_ids", column)
            run.store.replace_part(stage, name, rest)
            done.parts += 1
        if not found:
            return
    raise RunError(f"{run.url}: rows of {stage} come back: is a worker of a killed run still alive? Purge again")


def _photo_of(face: str) -> str:
    return face.rsplit("-", 1)[0]


def _clean_files(run: Run, ids: dict[str, str], keys: Collection[str], done: Purged) -> None:
    """The run's other files, but for summary and report."""
    chosen, their_keys = pa.array(ids, pa.string()), pa.array(sorted(keys), pa.string())
    if run.has("plan.parquet"):
        plan = run.plan()
        left = plan.filter(pc.invert(pc.is_in(plan["photo_id"], value_set=chosen)))
        if left.num_rows < plan.num_rows:
            run.write_plan(left, plan_about(plan))
    if run.has(DELETED):
        table = run.read_table(DELETED)
        run.write_table(DELETED, table.filter(pc.invert(pc.is_in(table["photo_id"], value_set=chosen))))
    for name in run.names(RETRIES):
        if name.endswith(".parquet"):
            table = run.read_table(f"{RETRIES}/{name}")
            left = table.filter(pc.invert(pc.is_in(table["key"], value_set=their_keys)))
            if left.num_rows < table.num_rows:
                run.write_table(f"{RETRIES}/{name}", left)
    words = {*ids, *keys}
    for name in run.names():
        if name.endswith(".jsonl"):
            lines = run.read(name).split(b"\n")
            left = [line for line in lines if not _speaks_of(line.decode("utf-8", "replace"), words, ids.values())]
            if len(left) < len(lines):
                run.write(name, b"\n".join(left))
                done.log_lines += len(lines) - len(left)
    for folder in ("", RETRIES, "drivers", "gallery"):
        for name in run.names(folder):
            if _TEMP.fullmatch(name):
                run.remove(f"{folder}/{name}" if folder else name)
                done.temporary += 1


def _speaks_of(line: str, words: set[str], paths: Iterable[str]) -> bool:
    """Whether a log's line has one of these ids and keys, or of these paths, as it stands or in a JSON string."""
    if not words.isdisjoint(_HEX.findall(line)):
        return True
    texts = [line]
    with suppress(ValueError):
        texts += _texts(json.loads(line))
    return any(path in text for path in paths for text in texts)


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *_texts(item))]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else [str(value)]


def _renew_reports(run: Run, ids: dict[str, str], say: Callable[[str], None]) -> None:
    """Summary and report from what is left; what only the last driver knew of itself stays in the summary."""
    if not run.has("plan.parquet"):
        return
    paths = set(ids.values())
    if run.has("summary.json"):
        old, new = run.read_json("summary.json"), summary(run)
        kept = ("skipped", "changes", "seconds", "engine", "operator_seconds", "interrupted")
        new |= {name: old[name] for name in kept if name in old}
        worked = sum(new["stage_seconds"].values())
        new["seconds_per_face"] = round(worked / new["faces"], 3) if new["faces"] else None
        changes = new.get("changes", {})
        if "deleted_paths" in changes:
            changes["deleted_paths"] = [path for path in changes["deleted_paths"] if path not in paths]
        if "pruned" in changes:
            pruned = changes["pruned"]
            pruned["removed_paths"] = [path for path in pruned["removed_paths"] if path not in paths]
            pruned["kept"] = {path: why for path, why in pruned["kept"].items() if path not in paths}
        run.write_json("summary.json", new)
    if run.has("report.html"):

        run.remove("report.html")  # first: if the new one fails, the old one must not stay
        try:
            write_report(run.url)
        except Exception as error:  # a report can be had later
            say(f"the report could not be written: {type(error).__name__}: {error}")


def _note_elsewhere(run: Run, ids: pa.Array, done: Purged) -> None:
    """Say where else the photos may be: SRC, and galleries made of them."""
    places = [run.url.rstrip("/").removesuffix(".run")] if run.url.rstrip("/").endswith(".run") else []
    if run.has("run.json"):
        record = run.read_json("run.json")
        done.notes.append(f"SRC is not touched: what {record['source']} still has, the next run makes again")
        gallery = record.get("gallery", {})
        places.append(gallery.get("store") or gallery.get("url") or "")
    for place in dict.fromkeys(places):
        if place and not place.startswith(run.url.rstrip("/") + "/"):
            try:
                count = _codes_in_gallery(place, ids)
            except GalleryNotFoundError:
                continue
            except (GalleryError, OSError) as error:
                done.notes.append(f"the gallery {place} could not be looked into: {error}")
                continue
            if count:
                note = (
                    f"the gallery {place} holds {count} code(s) of these photos: `scol gallery remove`, then "
                    "`scol gallery prune`"
                )
                done.notes.append(note)


def _codes_in_gallery(url: str, ids: pa.Array) -> int:
    """Codes of photos in a gallery, in all its versions together."""
    store = Store(url)
    found = [(store.version(v.name), v.info) for v in store.versions() if v.info is not None] or [open_gallery(url)]
    return sum(
        pc.sum(pc.is_in(read_columns(folder, name, ["photo_id"])["photo_id"], value_set=ids)).as_py() or 0
        for folder, info in found
        for name in info.codes
    )
