"""The driver: plans what is missing, hands shards to pools of Ray actors, and keeps going when these die."""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.deaths import Birth, brief, last_words, node_lost
from cluster.errors import (
    BrokenStageError,
    ClusterError,
    ContractError,
    EngineError,
    PlanError,
    RunInterrupted,
    UnsafeStoreError,
)
from cluster.keys import KeyIndex, KeyRule, distinct, pack, part_key, unpack, windows
from cluster.layout import PoolSize, size_pools
from cluster.plan import Keys, Plan
from cluster.session import import_path, ray_session
from cluster.stage import Pool, Resources, Stage
from cluster.store import PartStore
from cluster.worker import Input, Shard, ShardResult, Worker, found_part, hard_limit, one_line, with_retries

log = logging.getLogger("cluster")

_SOURCE_ITEMS = 1024  # items a source part; its rows are small
_START_TRIES = 3  # workers of a pool that may die in a row before they have done anything
_SETTLE = 2.0  # seconds after a worker's death within which its node's becomes known, if that was why
_SCALING = 5.0  # seconds between two looks at what the pools need and the cluster has
_BRIEF = 2.0  # seconds; calls shorter than this are queued one ahead, so that a worker need not wait for the driver


@dataclass(frozen=True)
class Progress:
    """Said once for each stage at the start of a run, then after every finished shard and every death of a worker.

    Attributes:
        stage: the stage's name.
        done, total: items finished (by this run or found so) and wanted.
        statuses: rows written by this run, by status.
        seconds: since work began.
        failed, retried: as in `StageSummary`, so far.
        queued: items of the stage that wait for a worker.
        workers: by pool, how many are at work or ready for it, and how many there are to be.
        restarts: workers replaced so far, in all pools.
        items: of the shard just finished: their positions in the source table; empty if it was not a shard.
        shard: what its worker reported.
    """

    stage: str
    done: int
    total: int
    statuses: Mapping[str, int]
    seconds: float
    failed: int = 0
    retried: int = 0
    queued: int = 0
    workers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    restarts: int = 0
    items: Sequence[int] = ()
    shard: ShardResult | None = None


@dataclass
class StageSummary:
    """One stage of a run.

    Attributes:
        total: items wanted.
        kept: items found finished, not run.
        done: items finished by this run.
        failed: those of them that the engine turned into error rows (exception, time limit, died worker, contract).
        retried: items run again because a worker died.
        statuses: rows written by this run, by status.
        reasons: items in `failed` by the reason's code.
        shards: parts written by this run.
        operator_seconds: time inside operators, summed over workers.
        worker_seconds: the same with reading and writing parts.
        peak_bytes: largest resident size of a worker while it worked at this stage (its networks, and those of the
            other stages of its pool, included); 0 where no worker did or the system does not say.
    """

    total: int = 0
    kept: int = 0
    done: int = 0
    failed: int = 0
    retried: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    shards: int = 0
    operator_seconds: float = 0.0
    worker_seconds: float = 0.0
    peak_bytes: int = 0


@dataclass
class RunSummary:
    """What a run did: by stage (the source first), wall seconds, and workers replaced."""

    stages: dict[str, StageSummary]
    seconds: float = 0.0
    restarts: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts and numbers, for JSON."""
        stages = {}
        for name, stage in self.stages.items():
            stages[name] = {k: dict(v) if isinstance(v, Counter) else v for k, v in vars(stage).items()}
        return {"seconds": self.seconds, "restarts": self.restarts, "stages": stages}


PoolRule = Callable[[Sequence[Mapping[str, float]]], Mapping[str, Pool]]


@dataclass
class _Task:
    """Items to be run together at a stage. `alone` marks an item that was in hand when a worker died."""

    stage: int
    items: list[int]
    alone: bool = False
    deaths: int = 0
    verdict: str | None = None


@dataclass
class _Backlog:
    """Items to be done at a stage that no task has been made of yet, `size` at a time."""

    stage: int
    items: np.ndarray
    size: int

    def cut(self, workers: int | None = None) -> list[int]:
        """Take the next task's items; with `workers`, no more than half of what each of them would get."""
        size = self.size if workers is None else min(self.size, math.ceil(len(self.items) / (2 * workers)))
        some, self.items = self.items[:size].tolist(), self.items[size:]
        return some


@dataclass
class _Call:
    ref: Any
    task: _Task | None  # None: the worker is loading its operators
    start: float


@dataclass
class _Death:
    """A worker that died with a task in hand, and when."""

    call: _Call
    error: Exception
    born: Birth | None
    when: float


class _Actor:
    def __init__(self, pool: str, handle):
        self.pool = pool
        self.handle = handle
        self.born = handle.born.remote()  # asked at once, because the dead do not answer
        self.calls: deque[_Call] = deque()
        self.ready = False


class Engine:
    """Runs a chain of stages over keyed items, and leaves exactly one set of rows for each item and stage in the store.

    Args:
        store: where the parts lie; every worker must see it.
        stages: the chain, in order.
        pools: settings by pool name, over what the stages ask for; or a function that gives them for the cluster as it
            is, a sequence of the Ray resources of each live node. It is asked again when nodes come or go.
        source: name of the stage that holds the source table.
        shard_items: most items in one part. Default: such that each worker of the largest pool gets four shards, at
            most 16, and fewer towards the end, so that no worker is left with much when the others are done.
        address: of a Ray cluster to join; None uses the one this process is connected to, or starts a local one.
        progress: called in the driver with a `Progress` for each stage at the start, and after each finished shard.
        stop: asked about once a second while work goes on; where it says true, the run ends as by Ctrl-C.
        hard_margin: seconds added to twice an item's time limit before its process is ended.
        item_deaths: how many workers an item must kill, being alone in hand, before it fails. The first death of a
            shard does not count, and the death of a node never does, so an item must be present at `item_deaths` + 1.
        stop_after_errors: end the run where so many items of a stage have ended in exceptions of one type before any
            has ended well or in an exception of another; 0: never. Items that fail for other reasons do not count.

    Raises:
        ContractError: stages with the same name, or joins to stages that are not earlier ones.
        UnsafeStoreError: the store cannot be seen by other processes (`memory`).
    """

    def __init__(
        self,
        store: PartStore,
        stages: Sequence[Stage],
        *,
        pools: Mapping[str, Pool] | PoolRule | None = None,
        source: str = "source",
        shard_items: int | None = None,
        address: str | None = None,
        progress: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] | None = None,
        hard_margin: float = 30.0,
        item_deaths: int = 2,
        stop_after_errors: int = 0,
    ):
        if not store.shared:
            raise UnsafeStoreError(store.url, "workers are other processes and cannot see this store")
        names = [source, *(stage.name for stage in stages)]
        if not stages or len(set(names)) < len(names):
            raise ContractError(f"a chain needs at least one stage, and distinct names: {', '.join(names)}")
        schemas = {stage.name: stage.schema for stage in stages}
        for position, stage in enumerate(stages):
            for other, columns in stage.joins.items():
                if other not in names[: position + 1]:
                    raise ContractError(f"stage {stage.name!r} joins {other!r}, which is not an earlier stage")
                absent = [c for c in columns if other in schemas and c not in schemas[other].names]
                if absent:
                    raise ContractError(f"stage {stage.name!r} joins columns that {other!r} lacks: {', '.join(absent)}")
            before = schemas.get(names[position])
            absent = [c for c in stage.columns or () if before is not None and c not in before.names]
            if absent:
                raise ContractError(f"stage {stage.name!r} reads columns that {names[position]!r} lacks: {absent}")
        if not callable(pools) and (unknown := set(pools or {}) - {stage.pool for stage in stages}):
            raise ContractError(f"settings of pools that no stage uses: {', '.join(sorted(unknown))}")
        if shard_items is not None and shard_items < 1:
            raise ContractError("shard_items must be at least 1")
        self.store = store
        self.stages = list(stages)
        self.names = names
        self.pools: PoolRule = pools if callable(pools) else lambda nodes, fixed=dict(pools or {}): fixed
        self.shard_items = shard_items
        self.address = address
        self.progress = progress
        self.stop = stop
        self.hard_margin = hard_margin
        self.item_deaths = item_deaths
        self.stop_after_errors = stop_after_errors

    # Planning --------------------------------------------------------------------------------------------------

    def plan(self, source: pa.Table | Iterable[pa.Table], keys: Mapping[str, Keys]) -> Plan:
        """Compare the items wanted with the parts that the store has. Reads key columns, starts nothing.

        Args:
            source: one row an item, with a column `key`: the item's key at the source stage. A listing of many items
                comes as an iterable of tables of one schema; it is gone through once, and only its keys are kept.
            keys: by stage, the items' keys there, in the order of `source`'s rows, or a rule by which they follow from
                the keys of the stage before (`KeyRule`). All keys are of the form that `hash_key` gives.

        Raises:
            PlanError: a stage's keys are missing, null, doubled, of another form, or not as many as the source has
                rows.
        """
        return self._plan(source, keys)[0]

    def _plan(
        self,
        source: pa.Table | Iterable[pa.Table],
        keys: Mapping[str, Keys],
        write: Callable[[str, pa.Table], None] | None = None,
    ) -> tuple[Plan, set[str]]:
        """The plan, and the names of the source's columns.

        Args:
            write: None to leave the store as it is. Else what the store's parts hold is saved where that pays, and
                source rows that it lacks are handed to `write`, up to `_SOURCE_ITEMS` at a time, with the part's name.
        """
        for name in self.names[1:]:
            if name not in keys:
                raise PlanError(f"no keys for stage {name!r}")
        tables = [source] if isinstance(source, pa.Table) else source
        index = self._key_index(self.names[0], write is not None)
        packed, codes, columns = [], [], set()
        names = list(index.names)
        for table in tables:
            columns = set(table.column_names)
            if "key" not in columns:
                raise PlanError(f"no keys for stage {self.names[0]!r}")
            some = _packed(self.names[0], table["key"], table.num_rows)
            if isinstance(source, pa.Table) and not distinct(some):
                raise PlanError(f"stage {self.names[0]!r}: two items have the same key")
            where = index.find(some) + 1
            missing = np.flatnonzero(where == 0) if write is not None else []
            for first in range(0, len(missing), _SOURCE_ITEMS):
                items = missing[first : first + _SOURCE_ITEMS]
                rows = table.take(pa.array(items))
                names.append(part_key(rows["key"].to_pylist()))
                where[items] = len(names)
                write(names[-1], rows)
            packed.append(some)
            codes.append(where)
        packed = np.concatenate(packed) if packed else np.empty((0, 2), np.uint64)
        if not isinstance(source, pa.Table) and not distinct(packed):
            raise PlanError(f"stage {self.names[0]!r}: two items have the same key")
        given: list[np.ndarray | KeyRule] = [packed]
        for name in self.names[1:]:
            given.append(keys[name] if callable(keys[name]) else _packed(name, keys[name], len(packed)))
            if isinstance(given[-1], np.ndarray) and not distinct(given[-1]):
                raise PlanError(f"stage {name!r}: two items have the same key")
        plan = Plan(self.names, given)
        plan.names[0], plan.known[0] = names, len(index.names)
        if codes:
            plan.part[0] = np.concatenate(codes)
        del index
        self._compare(plan, given, write is not None)
        return plan, columns

    def _compare(self, plan: Plan, given: list[np.ndarray | KeyRule], save: bool) -> None:
        """Fill in what the store has of the stages after the source."""
        parts = [with_retries(lambda n=name: self.store.parts(n)) for name in self.names]
        last = max((i for i, names in enumerate(parts) if names), default=0)  # no need to derive keys beyond
        here, own = given[0], False  # keys at the stage in hand; whether the array is ours to write into
        for position in range(1, last + 1):
            index, name = self._key_index(self.names[position], save), self.names[position]
            plan.names[position], plan.known[position] = list(index.names), len(index.names)
            if isinstance(given[position], np.ndarray):
                here, own = given[position], False
            elif not own:
                here, own = here.copy(), True
            for some in windows(len(plan)):
                if not isinstance(given[position], np.ndarray):
                    here[some] = _packed(name, given[position](unpack(here[some])), some.stop - some.start)
                if np.any((found := index.find(here[some])) >= 0):  # else the array stays untouched, see `Plan`
                    plan.part[position][some] = found + 1

    def _key_index(self, stage: str, save: bool) -> KeyIndex:
        index = with_retries(lambda: self.store.key_index(stage))
        if save:
            with_retries(lambda: self.store.save_index(stage, index))
        return index

    # Running ---------------------------------------------------------------------------------------------------

    def run(self, source: pa.Table | Iterable[pa.Table], keys: Mapping[str, Keys]) -> RunSummary:
        """Do what is missing. Every finished shard is committed at once, so a run that ends early loses little.

        Args:
            source, keys: as for `plan`. Source rows that the store lacks are written while the listing is gone through.

        Returns:
            What was done. Failed items are not errors of the run: they have rows that say so.

        Raises:
            PlanError: see `plan`.
            StoreError: the store fails for good (disk full, no permission), or still does after retries.
            EngineError: Ray cannot be reached, or a stage's operator cannot be loaded.
            BrokenStageError: see `stop_after_errors`. Finished parts are kept, and with them the failed items' rows.
            ContractError: a stage's `error_rows` fails, or rows of a join do not match.
            RunInterrupted: Ctrl-C (a KeyboardInterrupt), or `stop`. Workers are stopped, finished parts are kept.
        """
        begin = time.perf_counter()
        listed = StageSummary()
        summary = RunSummary({self.names[0]: listed})
        plan = None
        try:
            with _SourceWriter(self.store, self.names[0], listed) as writer:
                plan, columns = self._plan(source, keys, writer.write)
            listed.total, listed.kept = len(plan), len(plan) - listed.done
            for name, missing in list(plan.missing().items())[1:]:
                summary.stages[name] = StageSummary(total=len(plan), kept=len(plan) - missing)
            for name in self.names:
                self._tell(summary, name, 0.0)
            if any(summary.stages[stage.name].kept < len(plan) for stage in self.stages):
                with ray_session(self.address):
                    _Run(self, plan, summary, columns).loop()
                with_retries(self.store.collect_garbage)
                for position, name in enumerate(self.names):
                    with_retries(lambda p=position, n=name: self.store.extend_index(n, *plan.new_parts(p)))
        except KeyboardInterrupt:
            for name in self.names:
                summary.stages.setdefault(name, StageSummary())
            raise RunInterrupted(summary) from None
        finally:
            summary.seconds = time.perf_counter() - begin
        return summary

    def _tell(self, summary: RunSummary, name: str, seconds: float, **more: Any) -> None:
        if self.progress is not None:
            count = summary.stages[name]
            more |= {"failed": count.failed, "retried": count.retried, "restarts": summary.restarts}
            done = count.kept + count.done
            self.progress(Progress(name, done, count.total, dict(count.statuses), seconds, **more))

class _SourceWriter:
    """Commits source parts in threads, lest a listing wait for the disk; leaving the block waits for them."""

    def __init__(self, store: PartStore, stage: str, summary: StageSummary, threads: int = 4):
        self.store, self.stage, self.summary = store, stage, summary
        self.most = 2 * threads
        self.pool = ThreadPoolExecutor(threads)
        self.open: deque[Future] = deque()

    def __enter__(self) -> _SourceWriter:
        return self

    def write(self, name: str, rows: pa.Table) -> None:
        """Raises StoreError if an earlier part could not be written."""
        while len(self.open) >= self.most:
            self._settle()
        commit = partial(self.store.write_part, self.stage, name, rows)
        self.open.append(self.pool.submit(with_retries, commit))
        self.summary.done += rows.num_rows
        self.summary.shards += 1

    def _settle(self) -> None:
        self.open.popleft().result()

    def __exit__(self, kind, *_) -> None:
        try:
            while self.open and kind is None:
                self._settle()
        finally:
            self.pool.shutdown(cancel_futures=True)


def _packed(stage: str, keys: Keys, count: int) -> np.ndarray:
    if len(keys) != count:
        raise PlanError(f"stage {stage!r} needs one key for each of {count} items")
    try:
        return pack(keys)
    except ValueError as error:
        raise PlanError(f"stage {stage!r}: {error}") from error


class _Run:
    """State of one run: tasks that are ready, actors, and what each has in hand.

    Stage positions count from 0 for the first stage; the plan's count from 0 for the source.
    """

    def __init__(self, engine: Engine, plan: Plan, summary: RunSummary, source_columns: set[str]):
        import ray  # late: it takes a second, which processes that start no Ray need not pay
        from ray import cloudpickle

        self.ray = ray
        self.engine = engine
        self.stages = engine.stages
        self.plan = plan
        self.summary = summary
        self.begin = time.perf_counter()
        self.counts = [summary.stages[stage.name] for stage in self.stages]
        self.columns = [source_columns, *(set(stage.schema.names) for stage in self.stages)]
        self.pending: dict[str, list[tuple[bool, int, int, _Task]]] = {stage.pool: [] for stage in self.stages}
        self.backlog: dict[str, list[_Backlog]] = {stage.pool: [] for stage in self.stages}
        self.queued = [0] * len(self.stages)  # items, in `pending` and `backlog` together
        self.order = itertools.count()
        self.actors: list[_Actor] = []
        self.start_failures: Counter[str] = Counter()
        self.deaths: deque[_Death] = deque()  # to be judged, see `_SETTLE`
        self.last_event = self.last_check = self.begin
        self.exceptions: list[Counter[str]] = [Counter() for _ in self.stages]  # items, by type
        self.well = [False] * len(self.stages)  # whether an item has ended otherwise than failed
        self.pace = [0.0] * len(self.stages)  # seconds that a call took lately
        self.nodes: set[str] = set()
        self.last_scaling = -math.inf
        self.wanted: dict[str, int] = {}  # workers, by pool
        self.settings: Mapping[str, Pool] = {}
        self.sizes = self._layout()
        self.pickled = {}
        for pool in self.sizes:
            members = {i: stage for i, stage in enumerate(self.stages) if stage.pool == pool}
            try:
                self.pickled[pool] = cloudpickle.dumps(members)
            except Exception as error:  # pickling fails with whatever an object's own methods raise
                raise ContractError(f"the stages of pool {pool!r} cannot be sent to workers: {error}") from error
        self.limit = engine.shard_items or self._default_shard()

    def _layout(self) -> dict[str, PoolSize]:
        alive = [node for node in self.ray.nodes() if node["Alive"]]
        self.nodes = {node["NodeID"] for node in alive}
        nodes = [node["Resources"] for node in alive]
        self.settings = self.engine.pools(nodes)
        wanted: dict[str, Resources] = {}
        for stage, count in zip(self.stages, self.counts, strict=True):
            if count.kept + count.done < count.total:
                own = self.settings.get(stage.pool, Pool()).resources
                need = own or stage.resources
                wanted[stage.pool] = wanted[stage.pool].union(need) if stage.pool in wanted else need
        return size_pools(wanted, self.settings, nodes)

    def _default_shard(self) -> int:
        items = max(count.total - count.kept for count in self.counts)
        return min(16, math.ceil(items / (4 * max(size.actors for size in self.sizes.values()))))

    # The loop

    def loop(self) -> None:
        try:
            for group in self._advance(np.arange(len(self.plan), dtype=np.int32), -1):
                self.backlog[self.stages[group.stage].pool].append(group)
                self.queued[group.stage] += len(group.items)
            while self.sizes:
                self._scale()
                if self.engine.stop is not None and self.engine.stop():
                    raise KeyboardInterrupt
                self._assign()
                self._collect()
                self._judge_settled()
                self._release()
        finally:
            for actor in self.actors:
                self.ray.kill(actor.handle)

    def _scale(self) -> None:
        """Give each pool as many workers as its items need and the cluster has room for."""
        now = time.perf_counter()
        if now - self.last_scaling < _SCALING:
            return
        self.last_scaling = now
        if self.nodes != {node["NodeID"] for node in self.ray.nodes() if node["Alive"]}:
            self.sizes = self._layout()
        for pool, size in self.sizes.items():
            # An item keeps one worker busy at a time. Whoever misses a stage misses the pool's later ones too.
            left = max(
                self.counts[i].total - self.counts[i].kept - self.counts[i].done for i in self._open_stages(pool)
            )
            self.wanted[pool] = min(size.actors, left)
            actors = [actor for actor in self.actors if actor.pool == pool]
            # first those that wait for a place, then those without work
            spare = [a for a in actors if not a.ready] + [a for a in actors if a.ready and not a.calls]
            for actor in spare[: max(0, len(actors) - self.wanted[pool])]:
                self._dismiss(actor)
            for _ in range(self.wanted[pool] - len(actors)):
                self._spawn(pool)

    def _dismiss(self, actor: _Actor) -> None:
        self.actors.remove(actor)
        self.ray.kill(actor.handle)

    def _open_stages(self, pool: str) -> list[int]:
        """Positions of the pool's stages that have items left."""
        counts = enumerate(self.counts)
        return [i for i, c in counts if c.kept + c.done < c.total and self.stages[i].pool == pool]

    def _advance(self, items: np.ndarray, stage: int) -> Iterator[_Backlog]:
        """Items have finished `stage`: they are to be done at the stages where each is missing next."""
        following = np.full(len(items), -1, np.int8)
        for later in range(len(self.stages) - 1, stage, -1):
            following[self.plan.part[later + 1][items] == 0] = later
        for later in range(stage + 1, len(self.stages)):
            members = items[following == later]
            if len(members):
                yield _Backlog(later, members, min(self.limit, self.stages[later].shard_items or self.limit))

    def _push(self, task: _Task) -> None:
        # Items that have killed a worker last: they shall not cost others theirs. Then the furthest stage first: items
        # leave the pipeline as fast as they can.
        place = (task.deaths > 0, -task.stage, next(self.order), task)
        self.queued[task.stage] += len(task.items)
        heapq.heappush(self.pending[self.stages[task.stage].pool], place)

    def _next(self, pool: str) -> _Task | None:
        """The task that is next in a pool's queue; it stays there."""
        queue, backlog = self.pending[pool], self.backlog[pool]
        # Tasks are made of the backlog only when it is their turn: millions of items would be too many tasks.
        while backlog and (not queue or queue[0][:2] > (False, -backlog[-1].stage)):
            workers = None
            if self.engine.shard_items is None:  # the group stays together, up to the stage with the most workers
                workers = max(size.actors for size in self.sizes.values())
            task = _Task(backlog[-1].stage, backlog[-1].cut(workers))
            self.queued[task.stage] -= len(task.items)
            self._push(task)
            if not len(backlog[-1].items):
                backlog.pop()
        return queue[0][3] if queue else None

    def _spawn(self, pool: str) -> None:
        size = self.sizes[pool]
        threads = str(size.threads)
        env = {name: threads for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        if self.engine.address is None and (path := import_path()):
            env["PYTHONPATH"] = path  # workers then import what the driver can, from a checkout or installed
        env |= self.settings.get(pool, Pool()).env
        remote = self.ray.remote(Worker).options(
            num_cpus=size.num_cpus,
            num_gpus=size.num_gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=1,
            runtime_env={"env_vars": env},
        )
        actor = _Actor(pool, remote.remote(self.engine.store, self.pickled[pool], self.engine.hard_margin))
        start = actor.handle.start.remote(self._open_stages(pool))
        actor.calls.append(_Call(start, None, time.perf_counter()))
        self.actors.append(actor)

    def _assign(self) -> None:
        for depth in (0, 1):
            for actor in self.actors:
                if not actor.ready or len(actor.calls) != depth or (task := self._next(actor.pool)) is None:
                    continue
                if depth == 1 and (task.alone or actor.calls[0].task.alone or not 0 < self.pace[task.stage] < _BRIEF):
                    continue
                heapq.heappop(self.pending[actor.pool])
                self.queued[task.stage] -= len(task.items)
                actor.calls.append(_Call(actor.handle.run.remote(self._shard(task)), task, time.perf_counter()))

    def _shard(self, task: _Task) -> Shard:
        stage = self.stages[task.stage]
        inputs = [self._input(task, task.stage, stage.columns)]
        for name, columns in stage.joins.items():
            inputs.append(self._input(task, self.engine.names.index(name), columns))
        return Shard(task.stage, self.plan.keys_of(task.stage + 1, task.items), inputs, task.verdict)

    def _input(self, task: _Task, position: int, columns: Sequence[str] | None) -> Input:
        row_id = self.stages[task.stage].row_id
        if columns is not None:
            columns = ["key", *columns, *([row_id] if row_id in self.columns[position] else [])]
        return Input(
            self.engine.names[position],
            self.plan.keys_of(position, task.items),
            self.plan.parts_of(position, task.items),
            None if columns is None else list(dict.fromkeys(columns)),
            self.stages[position - 1].schema if position else None,
        )

    def _collect(self) -> None:
        heads = {actor.calls[0].ref: actor for actor in self.actors if actor.calls}
        if not heads:  # all that is left to do waits for a judgement
            time.sleep(0.1)
            return
        ready, _ = self.ray.wait(list(heads), num_returns=1, timeout=1.0, fetch_local=False)
        if ready and len(heads) > 1:
            ready, _ = self.ray.wait(list(heads), num_returns=len(heads), timeout=0, fetch_local=False)
        for ref in ready:
            self._finish(heads[ref])
        now = time.perf_counter()
        if ready:
            self.last_event = now
        elif now - self.last_event > 60 and not any(actor.ready for actor in self.actors):
            log.warning("no worker has started for a minute; the cluster's resources may be taken")
            self.last_event = now
        if now - self.last_check > 5:
            self.last_check = now
            self._kill_overdue()

    def _finish(self, actor: _Actor) -> None:
        call = actor.calls[0]
        errors = self.ray.exceptions
        try:
            result = self.ray.get(call.ref)
        except errors.RayTaskError as error:
            if call.task is None:
                stages = ", ".join(stage.name for stage in self.stages if stage.pool == actor.pool)
                raise EngineError(f"the operators of {stages} cannot be loaded: {error.cause!r}\n{error}") from error
            if isinstance(error.cause, ClusterError):
                raise error.cause from error
            raise EngineError(f"stage {self.stages[call.task.stage].name}: a worker failed: {error}") from error
        except errors.RayError as error:  # the actor, its node or the connection to it is gone
            self._bury(actor, error)
            return
        actor.calls.popleft()
        if actor.calls:
            actor.calls[0].start = time.perf_counter()
        if call.task is None:
            actor.ready = True
            self.start_failures[actor.pool] = 0
        else:
            self._record(call.task, result)

    def _record(self, task: _Task, result: ShardResult) -> None:
        stage, count = self.stages[task.stage], self.counts[task.stage]
        self.pace[task.stage] = result.seconds or self.pace[task.stage]
        self.plan.record(task.stage + 1, task.items, result.part)
        count.done += len(task.items)
        count.shards += 1
        count.failed += len(result.failures)
        count.statuses.update(result.statuses)
        count.operator_seconds += result.operator_seconds
        count.worker_seconds += result.seconds
        count.peak_bytes = max(count.peak_bytes, result.peak_bytes)
        for failure in result.failures:
            count.reasons[failure.reason.split(":")[0]] += 1
            words = f"\n{failure.traceback}" if failure.traceback else ""
            log.warning("stage %s, item %s: %s%s", stage.name, failure.key, failure.reason, words)
        for group in self._advance(np.array(task.items, np.int32), task.stage):
            while len(group.items):
                self._push(_Task(group.stage, group.cut()))
        self._tell(task.stage, items=task.items, shard=result)
        self._check_exceptions(task.stage, result)

    def _check_exceptions(self, stage: int, result: ShardResult) -> None:
        self.well[stage] |= result.well
        raised = self.exceptions[stage]
        raised.update(result.exceptions)
        if result.exceptions and not self.well[stage] and len(raised) == 1:
            if 0 < self.engine.stop_after_errors <= raised.total():
                raise BrokenStageError(self.stages[stage].name, raised.total(), result.reason)

    def _tell(self, stage: int, **more: Any) -> None:
        ready = Counter(actor.pool for actor in self.actors if actor.ready)
        workers = {pool: (ready[pool], self.wanted[pool]) for pool in self.sizes}
        more |= {"queued": self.queued[stage], "workers": workers}
        self.engine._tell(self.summary, self.stages[stage].name, time.perf_counter() - self.begin, **more)

    def _release(self) -> None:
        """Stop the workers of pools that have nothing left to do, so that their memory is free for the others."""
        for pool in list(self.sizes):
            if not self._open_stages(pool):
                for actor in [actor for actor in self.actors if actor.pool == pool]:
                    self._dismiss(actor)
                del self.sizes[pool]

    # Deaths

    def _kill_overdue(self) -> None:
        """Backstop for workers whose own watchdog did not end them (a stopped process, a lost machine)."""
        for actor in self.actors:
            call = actor.calls[0] if actor.calls else None
            if call is None or call.task is None:
                continue
            limit = hard_limit(self.stages[call.task.stage], 1, self.engine.hard_margin)
            # every item may be tried twice, in its batch and alone
            if limit is not None and time.perf_counter() - call.start > 60 + 2 * limit * len(call.task.items):
                log.warning("stage %s: a worker does not answer and is ended", self.stages[call.task.stage].name)
                self.ray.kill(actor.handle)

    def _bury(self, actor: _Actor, error: Exception) -> None:
        """A worker has died: decide about what it had in hand, and replace it."""
        self._dismiss(actor)  # where it is only unreachable, it must not go on beside its successor
        self.summary.restarts += 1
        running, *queued = actor.calls
        for call in queued:
            self._push(call.task)
        death = _Death(running, error, self._born(actor), time.perf_counter())
        if running.task is None:
            self.start_failures[actor.pool] += 0 if node_lost(error, death.born) else 1
            if self.start_failures[actor.pool] >= _START_TRIES:
                words = f"workers of pool {actor.pool!r} die while loading their operators: {one_line(error)}"
                raise EngineError(words) from error
        elif running.task.alone:
            self.deaths.append(death)
        else:
            self._judge(death)
        self._spawn(actor.pool)
        if running.task is not None:
            self._tell(running.task.stage)

    def _born(self, actor: _Actor) -> Birth | None:
        try:
            return self.ray.get(actor.born, timeout=0)
        except self.ray.exceptions.RayError:
            return None

    def _judge_settled(self) -> None:
        while self.deaths and time.perf_counter() - self.deaths[0].when > _SETTLE:
            self._judge(self.deaths.popleft())

    def _judge(self, death: _Death) -> None:
        """Decide about the task that a worker died with."""
        call, error = death.call, death.error
        node_died = node_lost(error, death.born)
        task, stage = call.task, self.stages[call.task.stage]
        elapsed = death.when - call.start
        words = "stage %s: a worker died with %d item(s) in hand, after %.1f s: %s"
        log.warning(words, stage.name, len(task.items), elapsed, one_line(error))
        self.counts[task.stage].retried += len(task.items)
        part = part_key(self.plan.keys_of(task.stage + 1, task.items))
        if (result := with_retries(lambda: found_part(self.engine.store, stage.name, part))) is not None:
            self._record(task, result)  # it died after the commit
        elif node_died:
            self._push(task)
        elif task.verdict is not None:
            raise EngineError(f"stage {stage.name}: a worker died while writing the error rows of an item: {error}")
        elif not task.alone:
            for item in task.items:
                self._push(_Task(task.stage, [item], alone=True))
        else:
            task.deaths += 1
            limit = hard_limit(stage, 1, self.engine.hard_margin)
            if limit is not None and elapsed >= limit:
                task.verdict = f"TIMEOUT: more than {limit:g} s, and the process could not be interrupted"
            elif task.deaths >= self.engine.item_deaths:
                why = ", short of memory" if "running low on memory" in str(error) else ""
                task.verdict = f"WORKER_DIED: the process ended with this item in hand, {task.deaths + 1} times{why}"
                if words := last_words(death.born):
                    log.warning("stage %s: the last words of the worker:\n%s", stage.name, words)
                    task.verdict += f"; its log ends: {brief(words)}"
            self._push(task)
