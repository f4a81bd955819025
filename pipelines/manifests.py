"""What a run's folder holds: schemas of the stages' tables, and readers for reports and scripts.

    RUN/manifests/STAGE/PART.parquet   rows of every stage, ever; see docs/manifests.md
    RUN/plan.parquet                   the keys that count now: one row a photo of the latest run
    RUN/deleted.parquet                photos that SRC no longer has, until --prune has removed their outputs
    RUN/drivers/, RUN/retries/         who is at work (`presence`), failed rows that were opened again (`retry`)
    RUN/run.json, RUN/summary.json, RUN/report.html

Parts are never changed, so rows of photos or settings that are no longer wanted stay in them.  `plan.parquet` says
which keys count; every reader here goes by it.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import math
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.remote import OBJECT_STORES, open_fs, protocols
from cluster.retries import is_transient, with_retries
from cluster.digest import read_digest
from cluster.store import PartStore
from pipelines.config import OPTIONAL, STAGES
from pipelines.files import replacing

T = TypeVar("T")

SCHEMA_VERSION = 1
SOURCE = "source"
OK, WEAK, NO_FACE, ERROR = "ok", "weak", "no_face", "error"
STATUSES = (OK, WEAK, NO_FACE, ERROR)

CODE_LAYERS, CODE_DIM = 16, 512
IDENTITY_DIM = 192  # of pipelines.models.INVERSION_RECOGNISER's embeddings
CODE = pa.list_(pa.float32(), CODE_LAYERS * CODE_DIM)  # of the embedded generator; see `stage_schema`

COMMON = [
    pa.field("key", pa.string(), False),
    pa.field("photo_id", pa.string(), False),
    pa.field("face_id", pa.string()),
    pa.field("status", pa.string(), False),
    pa.field("reason", pa.string()),
    pa.field("failed_stage", pa.string()),
    pa.field("seconds", pa.float32()),
    pa.field("seed", pa.int64()),
    pa.field("weights", pa.string()),
]

_LAYER_SCORES = pa.list_(pa.float32(), CODE_LAYERS)

HISTORY = pa.list_(
    pa.struct(
        [
            ("phase", pa.string()),
            ("step", pa.int32()),
            ("psnr", pa.float32()),
            ("reconstruction", pa.float32()),
            ("id_lock", pa.float32()),
            ("hinge", pa.float32()),
        ]
    )
)

ROUNDS = pa.list_(
    pa.struct([("round", pa.int32()), ("psnr", pa.float32()), ("ism", pa.float32()), ("ism_worst", pa.float32())])
)

_PAYLOAD: dict[str, list[tuple[str, pa.DataType]]] = {
    "align": [
        ("face_index", pa.int16()),
        ("format", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("box", pa.list_(pa.float32(), 4)),
        ("landmarks", pa.list_(pa.float32(), 10)),
        ("quad", pa.list_(pa.float64(), 8)),
        ("score", pa.float32()),
        ("crop", pa.binary()),
    ],
    "invert": [
        ("code", CODE),
        ("psnr", pa.float32()),
        ("id_cosine", pa.float32()),
        ("identity", pa.list_(pa.float32(), IDENTITY_DIM)),
    ],
    "fuse": [
        ("fused", CODE),
        ("target", CODE),
        ("most_ids", pa.list_(pa.string())),
        ("most_scores", pa.list_(pa.float32())),
        ("least_scores", _LAYER_SCORES),
    ],
    "tune": [
        ("tuned", pa.binary()),
        ("refined", pa.binary()),
        ("psnr", pa.float32()),
        ("ssim", pa.float32()),
        ("tuned_psnr", pa.float32()),
        ("tune_steps", pa.int32()),
        ("refine_steps", pa.int32()),
        ("tune_seconds", pa.float32()),
        ("refine_seconds", pa.float32()),
        ("history", HISTORY),
    ],
    "attack": [
        ("protected", pa.binary()),
        ("psnr", pa.float32()),
        ("mask_share", pa.float32()),
        ("loss_before", pa.float32()),
        ("loss_after", pa.float32()),
    ],
    "strengthen": [
        ("protected", pa.binary()),
        ("rounds", pa.int32()),
        ("kept", pa.int32()),
        ("ended", pa.string()),
        ("psnr", pa.float32()),
        ("psnr_before", pa.float32()),
        ("ism", pa.float32()),
        ("ism_worst", pa.float32()),
        ("worst", pa.string()),
        ("ism_before", pa.float32()),
        ("ism_worst_before", pa.float32()),
        ("history", ROUNDS),
    ],
    "publish": [
        ("path", pa.string()),
        ("action", pa.string()),
        ("out_path", pa.string()),
        ("out_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("notes", pa.string()),
        ("psnr", pa.float32()),
        ("ssim", pa.float32()),
        ("flip", pa.float32()),
        ("face_psnr", pa.float32()),
        ("judge", pa.string()),
        ("ism", pa.float32()),
        ("ism_jpeg", pa.float32()),
        ("ism_worst", pa.float32()),
        ("worst", pa.string()),
        ("distorted", pa.list_(pa.struct([("name", pa.string()), ("ism", pa.float32())]))),
        ("max_ism", pa.float32()),
        ("max_ism_distorted", pa.float32()),
        ("ism_mobilefacenet", pa.float32()),
        ("ism_dlib_resnet", pa.float32()),
        ("ism_faceres", pa.float32()),
    ],
}

SOURCE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), False),
        pa.field("photo_id", pa.string(), False),
        pa.field("path", pa.string(), False),
        pa.field("url", pa.string(), False),
        pa.field("size", pa.int64()),
        pa.field("modified", pa.string()),
        pa.field("content", pa.string()),
        pa.field("person_id", pa.string()),
        pa.field("status", pa.string(), False),
        pa.field("reason", pa.string()),
    ]
)

SCHEMAS: dict[str, pa.Schema] = {
    SOURCE: SOURCE_SCHEMA,
    **{stage: pa.schema([*COMMON, *(pa.field(*column) for column in _PAYLOAD[stage])]) for stage in STAGES},
}

# What is read of every row every night; the rest (pictures, codes, histories) is read where it is wanted.
LIGHT: dict[str, pa.Schema] = {
    stage: pa.schema([f for f in schema if not (pa.types.is_nested(f.type) or pa.types.is_binary(f.type))])
    for stage, schema in SCHEMAS.items()
}


def stage_schema(stage: str, layers: int = CODE_LAYERS) -> pa.Schema:
    """Schema of a stage's rows where the generator takes so many codes; `SCHEMAS` is of the embedded one."""
    kinds = {CODE: pa.list_(pa.float32(), layers * CODE_DIM), _LAYER_SCORES: pa.list_(pa.float32(), layers)}
    return pa.schema([field.with_type(kinds.get(field.type, field.type)) for field in SCHEMAS[stage]])


PLAN_SCHEMA = pa.schema(
    [
        pa.field("photo_id", pa.string(), False),
        pa.field("path", pa.string(), False),
        *(pa.field(stage, pa.string(), False) for stage in (SOURCE, *STAGES)),
    ]
)


class RunError(ValueError):
    """A run's folder that is not one, or is unreadable."""


def face_id(photo_id: str, index: int) -> str:
    """`PHOTO-NN`; faces are numbered by descending box area."""
    return f"{photo_id}-{index:02d}"


def row_seed(run_seed: int, name: str) -> int:
    """A face's own seed, 0 .. 2^63 - 1: hashed from the run's and the face's id, so that no order matters."""
    digest = hashlib.blake2b(f"{run_seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def payload(stage: str) -> list[str]:
    """Names of a stage's own columns."""
    return [name for name, _ in _PAYLOAD[stage]]


# ---- the run's folder ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run's folder, local or on any fsspec URL."""

    url: str

    def path(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"

    @property
    def store(self) -> PartStore:
        return PartStore(self.path("manifests"), schema_version=SCHEMA_VERSION)

    def _do(self, name: str, action: Callable[[fsspec.AbstractFileSystem, str], T]) -> T:
        """`action` on the file system and a path in it, again where a fault may pass."""
        fs, path = open_fs(self.path(name).rstrip("/"))
        remote = "file" not in protocols(fs)
        return with_retries(lambda: action(fs, path), transient=partial(is_transient, remote=remote))

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the run's folder whole or not at all (local: temporary name, then rename).

        Raises:
            OSError, or what the store's client raises: it cannot be written.
        """

        def put(fs: fsspec.AbstractFileSystem, path: str) -> None:
            names = protocols(fs)
            if names.isdisjoint(OBJECT_STORES):
                fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            if "file" not in names:
                fs.pipe_file(path, data)
                return
            with replacing(path) as temp, open(temp, "xb") as file:
                file.write(data)

        self._do(name, put)

    def read(self, name: str) -> bytes:
        """Raises RunError where the run has no such file, or it cannot be read."""

        def get(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
            fs.invalidate_cache(path.rsplit("/", 1)[0])
            data = fs.cat_file(path)
            if "file" not in protocols(fs) and len(data) != fs.info(path)["size"]:
                raise ConnectionError(f"{path}: it came incompletely")
            return data

        try:
            return self._do(name, get)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise RunError(f"{self.url}: no run of scol, or an unfinished one: {name} cannot be read") from error
        except (OSError, ValueError) as error:
            raise RunError(f"{self.url}: {name} cannot be read: {error}") from error

    def sha256(self, name: str) -> str:
        """Of a file of the run's folder, hex. Raises RunError where the run has no such file, or it cannot be read."""

        def hashed(fs: fsspec.AbstractFileSystem, path: str) -> str:
            digest = hashlib.sha256()
            with fs.open(path, "rb") as file:
                while piece := file.read(1 << 22):
                    digest.update(piece)
            return digest.hexdigest()

        try:
            return self._do(name, hashed)
        except (OSError, ValueError) as error:
            raise RunError(f"{self.url}: {name} cannot be read: {error}") from error

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, (to_json(value) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads(self.read(name))
        except ValueError as error:
            if isinstance(error, RunError):
                raise
            raise RunError(f"{self.path(name)}: not JSON: {error}") from error

    def has(self, name: str) -> bool:
        """Whether the run's folder has this file. Raises OSError where the store does not say."""

        def look(fs: fsspec.AbstractFileSystem, path: str) -> bool:
            fs.invalidate_cache(path.rsplit("/", 1)[0])
            try:
                return fs.info(path)["type"] == "file"
            except (FileNotFoundError, NotADirectoryError):
                return False

        return self._do(name, look)

    def names(self, folder: str = "") -> list[str]:
        """Names of the files in the run's folder or one below it, sorted; empty where there is no such folder."""

        def look(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
            fs.invalidate_cache(path)
            try:
                found = fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted(entry["name"].rsplit("/", 1)[-1] for entry in found if entry["type"] == "file")

        return self._do(folder, look)

    def remove(self, name: str) -> None:
        """Remove a file of the run's folder, if it is there."""

        def drop(fs: fsspec.AbstractFileSystem, path: str) -> None:
            with suppress(FileNotFoundError):
                fs.rm_file(path)

        self._do(name, drop)

    def write_table(self, name: str, table: pa.Table) -> None:
        self.write_tables(name, table.schema, [table])

    def write_tables(self, name: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
        """Write a table that comes in pieces, as `write` does: from a temporary file, so that it need not fit the memory.

        Raises:
            OSError, or what the store's client raises: it cannot be written.
        """

        def fill(path: str) -> None:
            with pq.ParquetWriter(path, schema, compression="zstd") as writer:
                for table in tables:
                    writer.write_table(table.cast(schema))

        fs, path = open_fs(self.path(name))
        if "file" in protocols(fs):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with replacing(path) as temp:
                fill(temp)
        else:
            with tempfile.TemporaryDirectory(prefix="scol-") as folder:
                fill(temp := os.path.join(folder, "table"))
                self._do(name, lambda fs, path: _send(fs, temp, path))

    @contextmanager
    def _open_table(self, name: str, columns: Sequence[str] | None = None) -> Iterator[pq.ParquetFile]:
        """Raises RunError where the run has no such file, or it is not a table with these columns."""
        fs, path = open_fs(self.path(name))
        try:
            if "file" in protocols(fs):
                source = open(path, "rb")
            else:
                source = io.BytesIO(self.read(name))
            with source:
                file = pq.ParquetFile(source)
                absent = [column for column in columns or () if column not in file.schema_arrow.names]
                if absent:
                    raise RunError(f"{self.path(name)}: no column {', '.join(absent)}")
                yield file
        except OSError as error:
            raise RunError(f"{self.url}: no run of scol, or an unfinished one: {name} cannot be read") from error
        except pa.ArrowInvalid as error:
            raise RunError(f"{self.path(name)}: {error}") from error

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Raises RunError where the run has no such file, or it is not a table with these columns."""
        with self._open_table(name, columns) as file:
            return file.read(columns=None if columns is None else list(columns), use_threads=False)

    def read_tables(self, name: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The same in pieces of some thousand rows."""
        with self._open_table(name, columns) as file:
            for batch in file.iter_batches(16_384, columns=list(columns), use_threads=False):
                yield pa.Table.from_batches([batch])

    def write_plan(self, plan: pa.Table | Iterable[pa.Table], about: Mapping[str, str] | None = None) -> None:
        """Args: about: kept in the file's own metadata, see `plan_about`."""
        schema = PLAN_SCHEMA.with_metadata(dict(about or {}))
        self.write_tables("plan.parquet", schema, [plan] if isinstance(plan, pa.Table) else plan)

    def require(self) -> None:
        """Raises RunError where this is no run's folder: it has neither a plan nor rows."""
        if not self.has("plan.parquet") and not self.store.stages():
            raise RunError(f"{self.url}: no run of scol (neither a plan nor rows of a stage are there)")

    def plan(self, columns: Sequence[str] | None = None) -> pa.Table:
        """One row a photo of the latest run, by path: photo_id, path, and its key at every stage.

        A stage that the run left out, or that the plan of an older version does not know, has the keys of the one before.
        """
        columns = PLAN_SCHEMA.names if columns is None else list(columns)
        with self._open_table("plan.parquet") as file:
            there = file.schema_arrow.names
            known = {column: _known_stage(column, there) for column in columns}
            absent = [column for column in known.values() if column not in there]
            if absent:
                raise RunError(f"{self.path('plan.parquet')}: no column {', '.join(absent)}")
            table = file.read(columns=list(dict.fromkeys(known.values())), use_threads=False)
        whole = pa.table({column: table[name] for column, name in known.items()})
        return whole.replace_schema_metadata(table.schema.metadata)

    def plan_schema(self) -> pa.Schema:
        """The plan's columns and what it says about itself, without its rows."""
        with self._open_table("plan.parquet") as file:
            return file.schema_arrow


def _send(fs: fsspec.AbstractFileSystem, local: str, path: str) -> None:
    if OBJECT_STORES.isdisjoint(protocols(fs)):
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    fs.put_file(local, path)


def _known_stage(column: str, there: Collection[str]) -> str:
    """The column, or where it is a stage that is not there, the nearest before that is."""
    if column in STAGES and column not in there:
        return next((stage for stage in reversed(STAGES[: STAGES.index(column)]) if stage in there), column)
    return column


def stages_of(plan: pa.Table) -> list[str]:
    """The stages of a plan's run, in order; the keys of one that it leaves out are those of the stage before."""
    before = {stage: STAGES[STAGES.index(stage) - 1] for stage in OPTIONAL}
    absent = [stage for stage in OPTIONAL if plan.num_rows and plan[stage].equals(plan[before[stage]])]
    return [stage for stage in STAGES if stage not in absent]


def plan_about(plan: pa.Table | pa.Schema) -> dict[str, str]:
    """What a plan says about itself: `source`, SRC made absolute; `evidence`, `stat` or `content`."""
    metadata = (plan if isinstance(plan, pa.Schema) else plan.schema).metadata or {}
    return {name.decode(): value.decode() for name, value in metadata.items() if name != b"ARROW:schema"}


def utc() -> str:
    """Now, UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def to_json(value: Any) -> str:
    """JSON for files and ``--json``: NaN and infinity, which JSON does not have, become null."""

    def plain(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, dict):
            return {str(k): plain(v) for k, v in item.items()}
        return [plain(v) for v in item] if isinstance(item, list | tuple) else item

    return json.dumps(plain(value), indent=1, ensure_ascii=False, default=str)


def _run(run: Run | str) -> Run:
    return run if isinstance(run, Run) else Run(str(run))


def read_stage(run: Run | str, stage: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of a stage that count now, in the order of paths; photos that have not come so far have none.

    Raises:
        RunError: not a run's folder, or an unknown stage.
        StoreError: unreadable parts.
    """
    run = _run(run)
    if stage not in SCHEMAS:
        raise RunError(f"no stage {stage!r}; there are {', '.join(SCHEMAS)}")
    keys = run.plan([stage])[stage]
    if columns is None or not set(columns) <= set(LIGHT[stage].names):
        return run.store.read_rows(stage, keys.to_pylist(), columns, schema=SCHEMAS[stage])
    return in_order(read_digest(run.store, stage, list(dict.fromkeys(["key", *columns])), LIGHT[stage]), keys, stage).select(
        list(columns)
    )


def in_order(rows: pa.Table, keys: pa.ChunkedArray, stage: str) -> pa.Table:
    """Those of a stage's rows that have one of the keys, in the order of the keys."""
    if not rows.num_columns:
        return SCHEMAS[stage].empty_table()
    place = pc.index_in(rows["key"], value_set=keys.combine_chunks())
    rows, place = rows.filter(pc.is_valid(place)), place.drop_null().to_numpy()
    return rows if np.all(place[1:] >= place[:-1]) else rows.take(pa.array(np.argsort(place, kind="stable")))


def scan_stage(
    run: Run | str, stage: str, columns: Sequence[str] | None = None, photos: int = 512
) -> Iterator[pa.Table]:
    """As `read_stage`, in pieces of some photos, in the same order: for columns too large for the memory."""
    run = _run(run)
    if stage not in SCHEMAS:
        raise RunError(f"no stage {stage!r}; there are {', '.join(SCHEMAS)}")
    store = run.store
    index = store.index(stage)
    keys = run.plan()[stage].combine_chunks()
    place = pc.index_in(keys, value_set=index["key"].combine_chunks())
    parts = index["part"].combine_chunks().take(place)
    for first in range(0, len(keys), photos):
        names = {name for name in parts[first : first + photos].to_pylist() if name is not None}
        if names:
            yield store.read_rows(stage, keys[first : first + photos].to_pylist(), columns, names, SCHEMAS[stage])


def read_photos(run: Run | str) -> pa.Table:
    """One row a photo, by path: photo_id, path, status, reason, failed_stage, action, out_path, faces.

    A photo's status is the worst of its faces' (`error`, `weak`, `ok`), `no_face`, or `pending` where it has not been
    published yet.
    """
    run = _run(run)
    plan = run.plan()
    columns = ["photo_id", "face_id", "status", "reason", "failed_stage", "action", "out_path"]
    rows: dict[str, dict[str, Any]] = {}
    worst = {ERROR: 3, WEAK: 2, OK: 1, NO_FACE: 0}
    for row in read_stage(run, "publish", columns).to_pylist():
        seen = rows.get(row["photo_id"])
        faces = (seen["faces"] if seen else 0) + (row["face_id"] is not None)
        if seen is None or worst[row["status"]] > worst[seen["status"]]:
            rows[row["photo_id"]] = row
        rows[row["photo_id"]]["faces"] = faces
    out = []
    for photo_id, path in zip(plan["photo_id"].to_pylist(), plan["path"].to_pylist(), strict=True):
        row = rows.get(photo_id) or {"status": "pending", "faces": None}
        out.append(
            {"photo_id": photo_id, "path": path}
            | {name: row.get(name) for name in ("status", "reason", "failed_stage", "action", "out_path", "faces")}
        )
    return pa.Table.from_pylist(
        out,
        pa.schema(
            [
                ("photo_id", pa.string()),
                ("path", pa.string()),
                ("status", pa.string()),
                ("reason", pa.string()),
                ("failed_stage", pa.string()),
                ("action", pa.string()),
                ("out_path", pa.string()),
                ("faces", pa.int32()),
            ]
        ),
    )


def _statistics(column: pa.ChunkedArray) -> dict[str, float] | None:
    values = [v for v in column.to_pylist() if v is not None and math.isfinite(v)]
    if not values:
        return None
    return {
        "n": len(values),
        "mean": round(statistics.fmean(values), 4),
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def _strengthened(run: Run) -> dict[str, Any]:
    """What the closed loop did."""
    rows = read_stage(run, "strengthen", ["rounds", "ended"]).to_pylist()
    again = [row for row in rows if row["rounds"]]
    return {
        "judged": sum(row["rounds"] is not None for row in rows),
        "faces": len(again),
        "rounds": sum(row["rounds"] for row in again),
        "ended": dict(sorted(Counter(row["ended"] for row in again).items())),
    }


def summary(run: Run | str) -> dict[str, Any]:
    """Totals of a run as they stand, from the manifests; see docs/manifests.md (`summary.json`).

    `faces` counts faces; `ok`, `weak`, `no_face`, `error`, `pending` count photos by their worst face.  `psnr`, `ssim`,
    `flip`, `ism` are means over the faces that were published protected, `spread` has their distribution.
    """
    run = _run(run)
    photos = read_photos(run)
    counts = Counter(photos["status"].to_pylist())
    actions = Counter(photos["action"].to_pylist())
    measures = ["psnr", "ssim", "flip", "face_psnr", "ism", "ism_jpeg", "ism_worst"]
    faces = read_stage(run, "publish", ["face_id", "status", "reason", "judge", "max_ism", *measures])
    face_counts = Counter(
        s for s, f in zip(faces["status"].to_pylist(), faces["face_id"].to_pylist(), strict=True) if f
    )
    reasons = Counter((r or "").split(":")[0] for r in faces["reason"].to_pylist() if r)
    seconds: dict[str, float] = {}
    stages = stages_of(run.plan())
    for stage in stages:
        column = read_stage(run, stage, ["seconds"])["seconds"]
        seconds[stage] = round(float(pc.sum(column).as_py() or 0.0), 3)
    judged = face_counts[OK] + face_counts[WEAK]
    spreads = {name: _statistics(faces[name]) for name in measures}
    judges = {j for j in faces["judge"].to_pylist() if j}
    limits = {round(m, 4) for m in faces["max_ism"].to_pylist() if m is not None}
    return {
        "photos": photos.num_rows,
        "faces": sum(face_counts.values()),
        **{status: counts.get(status, 0) for status in (*STATUSES, "pending")},
        "face_status": {status: face_counts.get(status, 0) for status in (OK, WEAK, ERROR)},
        "weak_share": round(face_counts[WEAK] / judged, 4) if judged else None,
        "strengthened": _strengthened(run) if "strengthen" in stages else None,
        "published": actions.get("protected", 0),
        "copied": actions.get("copied", 0),
        "reasons": dict(sorted(reasons.items())),
        **{name: spread["mean"] if spread else None for name, spread in spreads.items()},
        "spread": spreads,
        "judge": judges.pop() if len(judges) == 1 else None,
        "max_ism": limits.pop() if len(limits) == 1 else None,
        "stage_seconds": seconds,
        "seconds": None,
    }


def type_words(kind: pa.DataType) -> str:
    """An Arrow type as docs/manifests.md writes it."""
    if pa.types.is_struct(kind):
        return "struct"
    if pa.types.is_fixed_size_list(kind):
        return f"{type_words(kind.value_type)}[{kind.list_size}]"
    if pa.types.is_list(kind):
        return f"list of {type_words(kind.value_type)}"
    return {"float": "float32", "double": "float64"}.get(str(kind), str(kind))
