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

import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import BadUrlError
from cluster.files import Content, Files
from cluster.store import PartStore
from pipelines.config.names import OPTIONAL, STAGES
from pipelines.run.schemas import PLAN_SCHEMA, SCHEMA_VERSION
from pipelines.run.text import to_json


class RunError(ValueError):
    """A run's folder that is not one, or is unreadable."""


@dataclass(frozen=True)
class Run:
    """A run's folder, local or on any fsspec URL."""

    url: str

    def path(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"

    @property
    def store(self) -> PartStore:
        return PartStore(self.path("manifests"), schema_version=SCHEMA_VERSION)

    @property
    def files(self) -> Files:
        """Raises RunError where the URL cannot be opened."""
        try:
            return Files(self.url.rstrip("/") or "/")
        except BadUrlError as error:
            raise RunError(str(error)) from error

    def write(self, name: str, data: Content) -> None:
        """Write a file of the run's folder whole or not at all (`cluster.files`).

        Raises:
            RunError: the URL cannot be opened.
            OSError, or what the store's client raises: it cannot be written.
        """
        self.files.write(name, data)

    def read(self, name: str) -> bytes:
        """Raises RunError where the run has no such file, or it cannot be read."""
        try:
            return self.files.read(name)
        except RunError:
            raise
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise RunError(f"{self.url}: no run of scol, or an unfinished one: {name} cannot be read") from error
        except (OSError, ValueError) as error:
            raise RunError(f"{self.url}: {name} cannot be read: {error}") from error

    def sha256(self, name: str) -> str:
        """Of a file of the run's folder, hex. Raises RunError where the run has no such file, or it cannot be read."""
        try:
            return self.files.digest(name)[1]
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
        return self.files.has(name)

    def names(self, folder: str = "") -> list[str]:
        """Names of the files in the run's folder or one below it, sorted; empty where there is no such folder."""
        return [name for name, is_dir in self.files.list(folder) if not is_dir]

    def remove(self, name: str) -> None:
        """Remove a file of the run's folder, if it is there."""
        self.files.remove(name)

    def write_table(self, name: str, table: pa.Table) -> None:
        self.write_tables(name, table.schema, [table])

    def write_tables(self, name: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
        """Write a table that comes in pieces, as `write` does: through a file, so that it need not fit the memory.

        Raises:
            OSError, or what the store's client raises: it cannot be written.
        """

        def fill(file: BinaryIO) -> None:
            with pq.ParquetWriter(file, schema, compression="zstd") as writer:
                for table in tables:
                    writer.write_table(table.cast(schema))

        self.write(name, fill)

    @contextmanager
    def _open_table(self, name: str, columns: Sequence[str] | None = None) -> Iterator[pq.ParquetFile]:
        """Raises RunError where the run has no such file, or it is not a table with these columns."""
        files = self.files
        try:
            with files.open(name) if files.local else io.BytesIO(self.read(name)) as source:
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

        A stage that the run left out, or that the plan of an older version does not know, has the keys of the one
        before.
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


def default_run(out: str) -> str:
    """The run's folder, beside OUT."""
    return out.rstrip("/") + ".run"
