"""What runs inside a worker process: reads a shard's rows, calls the operator, commits the part."""

from __future__ import annotations

import faulthandler
import itertools
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.deaths import Birth, birth, obey_sigterm
from cluster.errors import ContractError, StoreError
from cluster.keys import part_key
from cluster.retries import with_retries
from cluster.stage import ERROR, EXCEPTION, ItemTimeout, Operator, Stage, WorkerUnfit
from cluster.store import PartStore

T = TypeVar("T")
log = logging.getLogger("cluster")

_ALL_OR_NOTHING = {"__enter__", "__exit__", "__del__"}  # functions that a time limit does not interrupt
_SOON = 0.02  # seconds after which it tries again


@dataclass(frozen=True)
class Input:
    """Where the rows of a shard's items lie at one earlier stage.

    Attributes:
        stage: the earlier stage's name.
        keys: of the items at that stage, in the shard's order.
        parts: names of the parts that hold them.
        columns: to read, `key` among them; None for all.
        schema: of the earlier stage now; columns that an older version of it did not write are null. None: as written.
    """

    stage: str
    keys: Sequence[str]
    parts: Sequence[str]
    columns: Sequence[str] | None
    schema: pa.Schema | None = None


@dataclass(frozen=True)
class Shard:
    """One call of a worker: some items of one stage.

    Attributes:
        stage: the stage's position in the engine's chain.
        keys: of the items at this stage.
        inputs: where their rows are: the stage before first, then the joined stages.
        verdict: reason with which the items fail without being tried, because they killed earlier workers.
    """

    stage: int
    keys: Sequence[str]
    inputs: Sequence[Input]
    verdict: str | None = None


@dataclass(frozen=True)
class Failure:
    """An item that the engine turned into error rows."""

    key: str
    reason: str
    traceback: str = ""


@dataclass
class ShardResult:
    """What a worker reports. `statuses` counts rows; seconds are wall time, of the operator alone and of the call;
    `bytes` is the size of the part's rows in memory;
    `peak_bytes` is the process's largest resident size while the operator worked, 0 where the system does not say;
    `well` says whether any item ended otherwise than failed, `exceptions` counts those that ended in an exception, by
    its type, and `reason` is that of one of them, all of items that no earlier stage had given up."""

    part: str
    committed: bool
    statuses: dict[str, int]
    operator_seconds: float = 0.0
    seconds: float = 0.0
    bytes: int = 0
    peak_bytes: int = 0
    failures: list[Failure] = field(default_factory=list)
    well: bool = False
    exceptions: dict[str, int] = field(default_factory=dict)
    reason: str = ""


def hard_limit(stage: Stage, items: int, margin: float) -> float | None:
    """Seconds after which a call of `items` items ends its process; None where the stage has no limit."""
    return None if stage.item_seconds is None else 2 * stage.item_seconds * items + margin


class _Life:
    """Of this process. `worker`: it is one of the engine's, and may be ended."""

    worker = False


_life = _Life()


def is_worker() -> bool:
    """Whether this process is a worker of the engine, which is replaced when it ends."""
    return _life.worker


class Worker:
    """Serves the stages of one pool, one call at a time. Ray makes an actor of it; it works without Ray as well."""

    def __init__(self, store: PartStore, stages: bytes, hard_margin: float):
        self._store = store
        self._pickled = stages
        self._stages: Mapping[int, Stage] = {}
        self._operators: dict[int, Operator] = {}
        self._hard_margin = hard_margin

    def born(self) -> Birth:
        """Where this worker lives."""
        return birth()

    def start(self, stages: Sequence[int]) -> None:
        """Load the operators of these stages."""
        from ray import cloudpickle  # late: a second, in the worker alone

        obey_sigterm()
        _life.worker = True
        self._stages = cloudpickle.loads(self._pickled)
        for position in stages:
            self._operators[position] = self._stages[position].factory()

    def run(self, shard: Shard) -> ShardResult:
        """Do one shard and commit its part.

        Raises:
            StoreError: the store failed, after retries if transiently.
            ContractError: `error_rows` failed, so that an item would be left without rows.
        """
        begin = time.perf_counter()
        stage = self._stages[shard.stage]
        rows = with_retries(lambda: read_input(self._store, stage, shard))
        starts = item_starts(rows)
        tables: list[pa.Table] = []
        failures: list[Failure] = []
        spent = 0.0
        forget_peak_memory()
        if shard.verdict is not None:
            failures = [Failure(key, shard.verdict) for key in shard.keys]
            items = itertools.pairwise(starts)
            tables = [failed_rows(stage, rows.slice(a, b - a), shard.verdict) for a, b in items]
        else:
            ahead = getattr(self._operators[shard.stage], "ahead", None)
            if ahead is not None:
                ahead(rows)
            for first in range(0, len(starts) - 1, stage.batch_items):
                ends = starts[first : first + stage.batch_items + 1]
                start = time.perf_counter()
                failure = self._attempt(stage, shard.stage, rows, ends, tables)
                if failure is not None and len(ends) == 2:
                    failures.append(failure)
                elif failure is not None:
                    pairs = itertools.pairwise(ends)
                    single = [self._attempt(stage, shard.stage, rows, pair, tables) for pair in pairs]
                    failures.extend(f for f in single if f is not None)
                spent += time.perf_counter() - start
        peak = peak_memory()
        table = pa.concat_tables(tables)
        # Two attempts at a part must name it alike, so it is named by what was asked for.
        name = part_key(shard.keys)
        fields = {"cluster.stage_version": stage.version}
        committed = with_retries(lambda: self._store.write_part(stage.name, name, table, fields))
        counts = pc.value_counts(table["status"]).to_pylist()
        well, exceptions, reason = outcome(rows, table)
        return ShardResult(
            part=name,
            committed=committed,
            statuses={entry["values"]: entry["counts"] for entry in counts},
            operator_seconds=spent,
            seconds=time.perf_counter() - begin,
            bytes=table.nbytes,
            peak_bytes=peak,
            failures=failures,
            well=well,
            exceptions=exceptions,
            reason=reason,
        )

    def _attempt(
        self, stage: Stage, position: int, rows: pa.Table, ends: Sequence[int], tables: list[pa.Table]
    ) -> Failure | None:
        try:
            return attempt(stage, self._operators[position], rows, ends, tables, self._hard_margin)
        except WorkerUnfit:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(70)


def attempt(
    stage: Stage,
    operator: Operator,
    rows: pa.Table,
    ends: Sequence[int],
    tables: list[pa.Table],
    hard_margin: float | None = None,
) -> Failure | None:
    """One call of the operator on the items between `ends`. Appends what it gives to `tables`: of a failed item its
    error rows, of a failed batch nothing.

    Args:
        hard_margin: see `hard_limit`; None: the process is not ended, however long it takes.

    Raises:
        WorkerUnfit: the operator says so.
        ContractError: see `failed_rows`.
    """
    rows = rows.slice(ends[0], ends[-1] - ends[0])
    count = len(ends) - 1
    soft = None if stage.item_seconds is None else stage.item_seconds * count
    hard = None if hard_margin is None else hard_limit(stage, count, hard_margin)
    words = ""
    try:
        with time_limit(soft, hard):
            answer = operator(rows)
        tables.append(checked(stage, rows, answer))
        return None
    except ItemTimeout:
        reason = f"TIMEOUT: more than {stage.item_seconds:g} s"
        words = traceback.format_exc()
    except WorkerUnfit:
        raise
    except ContractError as error:
        reason = f"CONTRACT: {error}"
    except (Exception, SystemExit) as error:
        reason = f"EXCEPTION: {type(error).__name__}: {one_line(error)}"
        words = traceback.format_exc()
    if count > 1:
        return Failure("", reason, words)
    tables.append(failed_rows(stage, rows, reason))
    return Failure(rows["key"][0].as_py(), reason, words)


def outcome(rows: pa.Table, answer: pa.Table) -> tuple[bool, dict[str, int], str]:
    """What a stage itself made of its items: `well`, `exceptions` and `reason` of `ShardResult`.

    Args:
        rows: the items' input; those in whose rows an earlier stage has left a reason say nothing about this one.
        answer: their rows at this stage.
    """
    if "reason" in rows.column_names:
        given_up = rows["key"].filter(pc.is_valid(rows["reason"]))
        answer = answer.filter(pc.invert(pc.is_in(answer["key"], value_set=given_up.combine_chunks())))
    failed = pc.equal(answer["status"], ERROR)
    raised = answer.filter(pc.and_(failed, pc.fill_null(pc.starts_with(answer["reason"], f"{EXCEPTION}: "), False)))
    items: dict[str, set[str]] = {}
    reasons = raised["reason"].to_pylist()
    for key, words in zip(raised["key"].to_pylist(), reasons, strict=True):
        items.setdefault(words.split(":")[1].strip(), set()).add(key)
    well = pc.any(pc.invert(failed), min_count=0).as_py()
    return well, {kind: len(keys) for kind, keys in items.items()}, reasons[-1] if reasons else ""


def forget_peak_memory() -> None:
    """Let `peak_memory` begin anew (Linux; elsewhere it does nothing)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # proc(5): resets VmHWM to the present size
    except OSError:
        pass


def peak_memory() -> int:
    """This process's largest resident size since `forget_peak_memory`, bytes; 0 where the system does not say."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        return 0


def one_line(error: BaseException, longest: int = 300) -> str:
    """The error's message on one line, cut to `longest` characters."""
    words = " ".join(str(error).split())
    return words if len(words) <= longest else words[: longest - 3] + "..."


def found_part(store: PartStore, stage: str, name: str) -> ShardResult | None:
    """What is known of a shard whose worker died, from its part; None if there is none.

    Raises:
        StoreError: see `PartStore.read_part`.
    """
    if not store.has_part(stage, name):
        return None
    counts = pc.value_counts(store.read_part(stage, name, ["status"])["status"]).to_pylist()
    return ShardResult(name, True, {entry["values"]: entry["counts"] for entry in counts})


class time_limit:
    """Bound a block's wall time: ``with time_limit(soft, hard): ...``

    After `soft` seconds `ItemTimeout` is raised inside it, and every second from then on, for as long as something
    there swallows it. This needs the main thread (signals), and the interpreter: a call into C that does not return
    is not interrupted. After `hard` seconds, therefore, the process ends with its stacks on standard error: by
    `faulthandler`, whose watchdog needs neither the interpreter nor its lock. None: no limit.

    Nothing is raised while a context manager of the block is being entered or left: what that sets back (PyTorch's
    modes, a lock, a file) outlives the item. The next alarm comes soon after.
    """

    def __init__(self, soft: float | None, hard: float | None):
        self.soft, self.hard = soft, hard
        self._over = False

    def __enter__(self) -> None:
        self._outside = sys._getframe(1)
        self._timer = self.soft is not None and threading.current_thread() is threading.main_thread()
        if self.hard is not None:
            faulthandler.dump_traceback_later(self.hard, exit=True, file=2)
        if self._timer:
            self._before = signal.signal(signal.SIGALRM, self._expired)
            signal.setitimer(signal.ITIMER_REAL, self.soft, 1.0)

    def _expired(self, number: int, frame: FrameType | None) -> None:
        while not self._over and frame is not None and frame is not self._outside:
            if frame.f_code.co_name in _ALL_OR_NOTHING:
                signal.setitimer(signal.ITIMER_REAL, _SOON, 1.0)
                return
            frame = frame.f_back
        if not self._over:
            raise ItemTimeout

    def __exit__(self, *error: object) -> None:
        self._over = True  # an alarm that is on its way does nothing any more
        if self._timer:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)
        if self.hard is not None:
            faulthandler.cancel_dump_traceback_later()


def read_input(store: PartStore, stage: Stage, shard: Shard) -> pa.Table:
    """The rows an operator gets for a shard: those of the stage before, under this stage's keys, with joined columns.

    Rows come in the order of `shard.keys`.

    Raises:
        StoreError: rows are missing or unreadable.
        ContractError: a join is not one row to one row.
    """
    return joined_rows(stage, shard, [_read(store, source) for source in shard.inputs])


def joined_rows(stage: Stage, shard: Shard, tables: Sequence[tuple[pa.Table, np.ndarray]]) -> pa.Table:
    """What `read_input` gives, from the rows of each of the shard's inputs, and for each row its item's place in the
    shard.

    Raises:
        ContractError: a join is not one row to one row.
    """
    rows, position = tables[0]
    key = pa.array(shard.keys, pa.string()).take(pa.array(position))
    rows = rows.set_column(rows.schema.get_field_index("key"), "key", key)
    for source, (other, other_position) in zip(shard.inputs[1:], tables[1:], strict=True):
        by_row = stage.row_id is not None and stage.row_id in other.column_names and stage.row_id in rows.column_names
        names = other[stage.row_id].to_pylist() if by_row else [None] * other.num_rows
        place = {}
        for row, match in enumerate(zip(other_position.tolist(), names, strict=True)):
            if place.setdefault(match, row) != row:
                raise ContractError(f"stage {stage.name}: several rows of {source.stage} match one; set row_id")
        names = rows[stage.row_id].to_pylist() if by_row else [None] * rows.num_rows
        take = [place.get(match) for match in zip(position.tolist(), names, strict=True)]
        if None in take:
            raise ContractError(f"stage {stage.name}: {source.stage} has no row for one of the item's rows")
        for name in stage.joins[source.stage]:
            rows = rows.append_column(f"{source.stage}.{name}", other[name].take(pa.array(take, pa.int64())))
    return rows


def _read(store: PartStore, source: Input) -> tuple[pa.Table, np.ndarray]:
    rows = store.read_rows(source.stage, source.keys, source.columns, source.parts, later=source.schema)
    found = pc.index_in(rows["key"], value_set=pa.array(source.keys, pa.string())) if rows.num_rows else None
    position = np.zeros(0, np.int64) if found is None else found.to_numpy().astype(np.int64)
    missing = np.setdiff1d(np.arange(len(source.keys)), position)
    if len(missing):
        raise StoreError(store.url, f"no rows of {source.stage} for item {source.keys[int(missing[0])]}")
    return rows, position


def item_starts(rows: pa.Table) -> list[int]:
    """Where each item begins in a table whose rows are grouped by `key`, and the number of rows."""
    code = rows["key"].combine_chunks().dictionary_encode().indices.to_numpy()
    return [0, *(np.flatnonzero(np.diff(code)) + 1).tolist(), rows.num_rows]


def checked(stage: Stage, rows: pa.Table, answer: pa.Table) -> pa.Table:
    """The operator's answer in the stage's schema.

    Raises:
        ContractError: not a table, columns missing or of another type, a key missing or not asked for, no status.
    """
    if not isinstance(answer, pa.Table):
        raise ContractError(f"the operator returned {type(answer).__name__}, not a pyarrow.Table")
    absent = [name for name in stage.schema.names if name not in answer.column_names]
    if absent:
        raise ContractError(f"the operator's rows have no column {', '.join(absent)}")
    try:
        answer = answer.select(stage.schema.names).cast(stage.schema.remove_metadata())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise ContractError(f"the operator's rows do not fit the schema: {one_line(error)}") from error
    asked, given = set(rows["key"].to_pylist()), set(answer["key"].to_pylist())
    if given - asked:
        raise ContractError("the operator returned rows of items that it was not given")
    if asked - given:
        raise ContractError("the operator returned no row for the item")
    if answer["status"].null_count:
        raise ContractError("the operator returned a row without status")
    return answer


def failed_rows(stage: Stage, rows: pa.Table, reason: str) -> pa.Table:
    """The stage's own error rows for one item.

    Raises:
        ContractError: the stage's `error_rows` fails or breaks the contract.
    """
    try:
        return checked(stage, rows, stage.error_rows(rows, reason))
    except ContractError as error:
        raise ContractError(f"stage {stage.name}: error_rows breaks the contract: {error}") from error
    except Exception as error:
        raise ContractError(f"stage {stage.name}: error_rows failed: {type(error).__name__}: {error}") from error
