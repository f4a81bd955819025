"""The contract between the engine and the work it runs. The engine knows rows, keys and resources, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from cluster.errors import ContractError

Operator = Callable[[pa.Table], pa.Table]

ERROR = "error"  # the status of a failed item's rows
EXCEPTION = "EXCEPTION"  # the code of its reason where an exception is why: "EXCEPTION: Type: message"

REQUIRED = {"key": pa.string(), "status": pa.string(), "reason": pa.string()}


class ItemTimeout(BaseException):
    """Raised inside an operator whose item takes longer than `Stage.item_seconds`.

    Not an `Exception`, so that an operator's own `except Exception` does not swallow it.
    """


class WorkerUnfit(Exception):
    """An operator raises this when its process can no longer work (a broken CUDA context, say).

    The engine replaces the worker and treats the items in hand as it treats those of a worker that died.
    """


@dataclass(frozen=True)
class Resources:
    """What one actor of a pool needs.

    Attributes:
        num_cpus: cores to reserve with Ray; None for as many as `threads`. Scaled down where the cluster has fewer.
        num_gpus: GPUs to reserve, fractions allowed. A wish: with no GPU in the cluster the pool runs on cores.
        memory: bytes of main memory; the engine starts no more actors than fit. None: unknown.
        threads: threads of the numerical libraries (OMP_NUM_THREADS and relatives); None: the engine decides.
    """

    num_cpus: float | None = None
    num_gpus: float = 0.0
    memory: int | None = None
    threads: int | None = None

    def union(self, other: Resources) -> Resources:
        """What an actor needs that serves both."""

        def most(a, b):
            return max((x for x in (a, b) if x is not None), default=None)

        return Resources(
            most(self.num_cpus, other.num_cpus),
            max(self.num_gpus, other.num_gpus),
            most(self.memory, other.memory),
            most(self.threads, other.threads),
        )


@dataclass(frozen=True)
class Stage:
    """One step of a chain of stages.

    An ITEM is all rows with the same `key`. The operator is called with the input rows of one item, or of up to
    `batch_items` items, and must answer with at least one row for each of them:

    - Input rows are the rows of the stage before (the source table for the first stage), restricted to `columns`.
      Their `key` column already holds the items' keys AT THIS STAGE, so the operator copies it. Columns of earlier
      stages named in `joins` are added under the name "STAGE.COLUMN".
    - Output rows have the columns of `schema` (others are dropped, types are cast). An item may have any number of
      rows >= 1, each with the item's `key`. Keys that were not asked for are an error.

    An operator may have an attribute `ahead`: a function that is called with all input rows of a shard before the first
    of its batches, so that it can begin to fetch what they need. It must not fail, and answers nothing.

    An exception in a batch makes the engine call the items one by one; the one that fails alone becomes `error_rows`
    with reason "EXCEPTION: Type: message", one over its time "TIMEOUT: ...", one that kills its process
    "WORKER_DIED: ...", one whose answer breaks this contract "CONTRACT: ...". Rows of failed items, the engine's and
    the operator's own, have the status "error"; an operator that catches exceptions itself gives the same reason for
    them. A row that comes with a reason is one that an earlier stage has given up; it is to be handed on.

    Attributes:
        name: letters, digits, - and _; names the stage's folder in the store.
        version: of the operator's behaviour. Recorded in each part; part of the caller's keys, not looked at here.
        schema: of the output; must have `key`, `status`, `reason` as strings.
        factory: called once in each worker process, returns the operator. Picklable by cloudpickle; loads the networks.
            Stages of one pool that share networks share them through a module-level cache of their own.
        error_rows: `(input rows of ONE item, reason) -> rows` in `schema` saying that the item failed; at least one
            row. Must not fail.
        columns: columns of the stage before that the operator reads, `key` always comes along; None for all.
        joins: {earlier stage: its columns wanted}. Rows match by item, and by `row_id` where both stages have it.
        row_id: name of the column that tells the rows of one item apart (null is a value like any other); read from
            every stage that has it.
        pool: stages with the same pool name share worker processes, which run one call at a time.
        resources: of one worker. A pool needs the most that any of its stages needs.
        batch_items: most items in one call.
        item_seconds: soft limit for one item; a batch of n gets n times that. None: unlimited. Twice the limit and a
            margin (`Engine.hard_margin`) is the hard one: then the process is ended.
        shard_items: most items in one part of this stage, where losing finished but uncommitted items is costly; None
            for the engine's setting.
    """

    name: str
    version: str
    schema: pa.Schema
    factory: Callable[[], Operator]
    error_rows: Callable[[pa.Table, str], pa.Table]
    columns: Sequence[str] | None = None
    joins: Mapping[str, Sequence[str]] = field(default_factory=dict)
    row_id: str | None = None
    pool: str = "default"
    resources: Resources = Resources()
    batch_items: int = 1
    item_seconds: float | None = None
    shard_items: int | None = None

    def __post_init__(self) -> None:
        for name, kind in REQUIRED.items():
            if name not in self.schema.names or self.schema.field(name).type != kind:
                raise ContractError(f"stage {self.name!r}: its schema needs a column {name!r} of type {kind}")
        if self.batch_items < 1 or (self.shard_items is not None and self.shard_items < 1):
            raise ContractError(f"stage {self.name!r}: batch_items and shard_items must be at least 1")
        if self.item_seconds is not None and not self.item_seconds > 0:
            raise ContractError(f"stage {self.name!r}: item_seconds must be positive")


@dataclass(frozen=True)
class Pool:
    """Settings of one pool of workers that override what its stages ask for.

    Attributes:
        actors: number of workers; None: one a GPU, or the pool's share of the cores divided by `threads`.
        resources: of one worker; None: the union of its stages'.
        env: further environment variables of the worker processes.
    """

    actors: int | None = None
    resources: Resources | None = None
    env: Mapping[str, str] = field(default_factory=dict)
