"""Chaos campaign: kills processes of running jobs at seeded random moments, resumes, and compares what came out.

    python -m pipelines.bench.chaos [--kills 200] [--seed 0] [--stages both] [--out build/bench/chaos.json]

A Ray cluster of several nodes (`ray.cluster_utils.Cluster`: on this machine, but with a raylet each) is kept up while
drivers in processes of their own join it and run a job: a chain of arithmetic stages, then the real stages with the
quick profile over a few photos of generated people. At random moments one process gets SIGKILL:

- `worker`: any worker process of Ray, idle or not;
- `actor`: a process with a call of the engine in hand;
- `write`: a process that has written a part's temporary file and has not committed it yet;
- `commit`: a process that has just committed a part and has not told the driver yet;
- `raylet`: that of a node, which takes all its workers along; another node joins up to three seconds later;
- `driver`.

A driver that was killed, or gave up, is started again by the same command. A job that is done is compared with an
undisturbed one, and the next begins in an empty folder, until all kills are spent. The comparison goes through the
tables as every reader does, by key:

- `rows_lost`: rows of the undisturbed run that the disturbed one does not have, of all stages;
- `rows_doubled`: rows that it has beyond those;
- `outputs_different`: rows with another content (times aside), and published files with other bytes;
- `seconds_redone`: operators' time spent on items more than once (what was in hand at a kill);
- `finished_redone`: items that a driver did again though their part was committed before it started;
- `rows_stored_twice`: rows that lie in two parts, of which readers take one.

The engine gives up an item in whose presence three workers of one run die, since it cannot know who killed them. So
one life of a driver gets at most two kills of a process with work in hand; those of nodes count neither here nor there.

The exit status is 1 where rows_lost, rows_doubled, outputs_different or finished_redone is not 0, or a job hung.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import psutil
from PIL import Image

from cluster import PartStore
from pipelines.bench import arithmetic
from pipelines.bench.chaos_work import COMMIT, LOG, ORDERS, WRITE, arithmetic_source, run_arithmetic, run_real
from pipelines.bench.harness import ROOT, command_apart, make_photos, parse, record
from pipelines.config.names import STAGES
from pipelines.run.tables import read_stage
from pipelines.run.text_tables import aligned

WORKER, ACTOR, RAYLET, DRIVER = "worker", "actor", "raylet", "driver"
# As often as they cost: a raylet and a driver take seconds to start again, an actor less.
KINDS = {WORKER: 2, ACTOR: 3, WRITE: 3, COMMIT: 2, RAYLET: 2, DRIVER: 3}
_IN_HAND = 2  # kills of processes with work in hand in one life of a driver, see the module
_TIMES = {"seconds", "tune_seconds", "refine_seconds"}
_STALL = 300.0  # seconds without a new part or a kill after which a job counts as hung

Rows = dict[tuple, list[dict]]


class CampaignError(RuntimeError):
    """A job hung, or could not even be done undisturbed."""


@dataclass
class Kill:
    """One kill: when, what for, and which worker processes it ended."""

    time: float
    kind: str
    pids: set[int]


@dataclass
class Tally:
    """What a campaign found; see the module."""

    kills: Counter[str] = field(default_factory=Counter)
    rows_lost: int = 0
    rows_doubled: int = 0
    outputs_different: int = 0
    seconds_redone: float = 0.0
    finished_redone: int = 0
    rows_stored_twice: int = 0
    jobs: int = 0
    drivers: int = 0
    drivers_failed: int = 0
    seconds: float = 0.0
    undisturbed_seconds: float = 0.0

    def to_dict(self) -> dict:
        return {**vars(self), "kills": sum(self.kills.values()), "kills_by_kind": dict(self.kills)}

    @property
    def good(self) -> bool:
        return not (self.rows_lost or self.rows_doubled or self.outputs_different or self.finished_redone)


# ---- the cluster -----------------------------------------------------------------------------------------------------


class Nodes:
    """A head and some more nodes on this machine, each with its raylet."""

    def __init__(self, count: int, cpus: int):
        from ray.cluster_utils import Cluster  # late: Ray's own test code, which tests of the rest need not load

        self.settings = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": 100 * 2**20}
        self.cluster = Cluster(initialize_head=True, head_node_args=self.settings)
        self.address = self.cluster.address
        for _ in range(count - 1):
            self.cluster.add_node(**self.settings)

    def workers(self) -> dict[int, str]:
        """Worker processes of all nodes: pid -> what its title says it does."""
        found = {
            process.pid: _title(process)
            for node in [self.cluster.head_node, *self.cluster.worker_nodes]
            for process in _children(_raylet(node))
        }
        # not a node's agents, whose death is the raylet's, also where it is the head's
        return {pid: title for pid, title in found.items() if title.startswith("ray::") and not title.endswith("Agent")}

    def kill_one(self, rng: random.Random) -> set[int]:
        """Kill the raylet of a node that is not the head; its other processes go as Ray has them go."""
        node = rng.choice(sorted(self.cluster.worker_nodes, key=lambda node: node.unique_id))
        raylet = _raylet(node)
        pids = {process.pid for process in _children(raylet)}
        raylet.kill()
        time.sleep(rng.uniform(0, 3))
        self.cluster.remove_node(node)
        self.cluster.add_node(**self.settings)
        return pids


def _raylet(node) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _title(process: psutil.Process) -> str:
    try:
        return (process.cmdline() or [""])[0]
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


@contextmanager
def _cluster(nodes: int, cpus: int, folder: Path) -> Iterator[Nodes]:
    # Sockets' paths may have 107 characters, and Ray puts them some 70 below its folder.
    temp = tempfile.mkdtemp(prefix="chaos-", dir="/tmp")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "RAY_TMPDIR": temp,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONPATH": os.pathsep.join(paths),
        ORDERS: str(folder / "orders"),
        LOG: str(folder / "calls"),
    }
    for name in (ORDERS, LOG):
        os.makedirs(environment[name], exist_ok=True)
    try:
        with patch.dict(os.environ, environment):  # Ray reads it on import
            found = Nodes(nodes, cpus)
            try:
                yield found
            finally:
                found.cluster.shutdown()
    finally:
        shutil.rmtree(temp, ignore_errors=True)


# ---- jobs ------------------------------------------------------------------------------------------------------------


class ArithmeticJob:
    """The chain of `pipelines.bench.arithmetic` over some items."""

    name = "arithmetic"
    calm = (0.2, 3.0)  # seconds between kills, from and to

    def __init__(self, items: int):
        self.items = items

    def command(self, folder: Path, address: str) -> list[str]:
        return command_apart(run_arithmetic, folder / "store", self.items, address, 2)

    def store(self, folder: Path) -> PartStore:
        return PartStore(folder / "store")

    def rows(self, folder: Path) -> Rows:
        """By stage and item, the rows as readers get them."""
        source, store, found = arithmetic_source(self.items), self.store(folder), {}
        keys = {"source": source["key"].to_pylist(), **arithmetic.chain(source, arithmetic.VERSIONS)}
        for stage, wanted in keys.items():
            place = {key: number for number, key in enumerate(wanted)}
            for row in store.read_rows(stage, wanted).to_pylist():
                found.setdefault((stage, place[row["key"]]), []).append(row)
        return found

    def files(self, folder: Path) -> dict[str, bytes]:
        return {}


class RealJob:
    """`scol protect` with the quick profile over photos of generated people, and one without a face."""

    name = "real"
    calm = (2.0, 20.0)

    def __init__(self, photos: int, folder: Path, sets: list[str]):
        self.src, self.sets = folder / "photos", sets
        make_photos(self.src, photos)
        Image.linear_gradient("L").convert("RGB").save(self.src / "plain.png")

    def command(self, folder: Path, address: str) -> list[str]:
        sets = ["engine.workers=2", "engine.threads=1", f"engine.ray_address={address}", *self.sets]
        return command_apart(run_real, self.src, folder / "out", sets)

    def store(self, folder: Path) -> PartStore:
        return PartStore(folder / "out.run" / "manifests")

    def rows(self, folder: Path) -> Rows:
        found: Rows = {}
        for stage in ("source", *STAGES):
            for row in read_stage(str(folder / "out.run"), stage).to_pylist():
                # Keys of `publish` and `out_path` name the folder, which is another one in each job.
                row = {k: v for k, v in row.items() if k not in ("key", "out_path")}
                found.setdefault((stage, row["photo_id"]), []).append(row)
        return found

    def files(self, folder: Path) -> dict[str, bytes]:
        out = folder / "out"
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def _timeless(value):
    """The row without times, which differ from run to run."""
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in _TIMES}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def compare(expected: Rows, found: Rows, tally: Tally) -> list[str]:
    """Count rows lost, doubled and different. Returns words on each item concerned."""
    words = []
    for place in expected.keys() | found.keys():
        want, have = expected.get(place, []), found.get(place, [])
        tally.rows_lost += max(0, len(want) - len(have))
        tally.rows_doubled += max(0, len(have) - len(want))
        # as text, because NaN does not equal itself
        different = sum(repr(_timeless(a)) != repr(_timeless(b)) for a, b in zip(want, have, strict=False))
        tally.outputs_different += different
        if different or len(want) != len(have):
            words.append(f"{place}:\n  expected {want}\n  found    {have}")
    return words


def stored_twice(store: PartStore) -> int:
    """Rows of items that lie in more than one part."""
    extra = 0
    for stage in store.stages():
        counts: Counter[str] = Counter()
        for name in store.parts(stage):
            counts.update(set(store.read_part(stage, name, ["key"])["key"].to_pylist()))
        extra += sum(count - 1 for count in counts.values())
    return extra


def committed(store: PartStore) -> dict[tuple[str, str], float]:
    """When each item's part at each stage was committed: (stage, key) -> seconds since 1970."""
    found: dict[tuple[str, str], float] = {}
    for stage in store.stages():
        for name in store.parts(stage):
            # the commit's link sets it; the removal of a dead writer's temporary file would set it later
            when = os.stat(store.path(stage, name)).st_ctime
            for key in set(store.read_part(stage, name, ["key"])["key"].to_pylist()):
                found[stage, key] = min(when, found.get((stage, key), when))
    return found


@dataclass(frozen=True)
class Execution:
    """An operator's work on one item: from, to (the kill, where it did not come back), and its share of the call."""

    begin: float
    seconds: float


def executions(folder: Path, kills: list[Kill]) -> dict[tuple[str, str], list[Execution]]:
    """Every time that an item was worked on, in order, from the calls that the workers noted."""
    found: dict[tuple[str, str], list[Execution]] = defaultdict(list)

    def add(call: dict, end: float) -> None:
        for key in call["begin"]:
            found[call["stage"], key].append(Execution(call["time"], (end - call["time"]) / len(call["begin"])))

    for path in folder.glob("*.jsonl"):
        call = None
        for line in path.read_text().splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # its writer was killed in the middle of it
                continue
            if call is not None:  # ended, or broken off by an exception
                add(call, event["time"])
            call = event if "begin" in event else None
        if call is not None:
            pid = int(path.stem)
            ends = [kill.time for kill in kills if pid in kill.pids and kill.time >= call["time"]]
            if ends:
                add(call, min(ends))
    return {item: sorted(times, key=lambda execution: execution.begin) for item, times in found.items()}


# ---- the campaign ----------------------------------------------------------------------------------------------------


class Campaign:
    """Runs one kind of job on a cluster until the kills are spent."""

    def __init__(self, job: ArithmeticJob | RealJob, nodes: Nodes, folder: Path, rng: random.Random):
        self.job, self.nodes, self.folder, self.rng = job, nodes, folder, rng
        self.orders = Path(os.environ[ORDERS])
        self.calls = Path(os.environ[LOG])
        self.tally = Tally()
        self.driver: subprocess.Popen | None = None
        self.kills: list[Kill] = []
        self.in_hand = 0
        self.lives: list[float] = []

    def run(self, kills: int) -> Tally:
        begin = time.monotonic()
        calm = self.folder / f"{self.job.name}-undisturbed"
        self._job(calm, 0)
        self.tally.undisturbed_seconds = time.monotonic() - begin
        expected, files = self.job.rows(calm), self.job.files(calm)
        if not expected:
            raise CampaignError("the undisturbed job left no rows")
        self.tally.drivers = self.tally.drivers_failed = 0
        begin = time.monotonic()
        while (left := kills - sum(self.tally.kills.values())) > 0:
            self.tally.jobs += 1
            folder = self.folder / f"{self.job.name}-{self.tally.jobs}"
            self._job(folder, left)
            self._judge(folder, expected, files)
            shutil.rmtree(folder)
        self.tally.seconds = time.monotonic() - begin
        return self.tally

    def _judge(self, folder: Path, expected: Rows, files: dict[str, bytes]) -> None:
        tally, store = self.tally, self.job.store(folder)
        words = compare(expected, self.job.rows(folder), tally)
        if words:
            head = f"{self.job.name} job {tally.jobs}: {len(words)} items"
            print(head, *words[:10], self._tail(folder), sep="\n", flush=True)
        found = self.job.files(folder)
        tally.outputs_different += sum(files.get(name) != found.get(name) for name in files.keys() | found.keys())
        tally.rows_stored_twice += stored_twice(store)
        done = committed(store)
        for item, times in executions(self.calls, self.kills).items():
            tally.seconds_redone += sum(e.seconds for e in times) - times[-1].seconds
            for execution in times:
                life = max((start for start in self.lives if start <= execution.begin), default=0.0)
                tally.finished_redone += item in done and done[item] < life
        print(
            f"{self.job.name} job {tally.jobs}: {len(self.kills)} kills, {len(self.lives)} drivers; so far "
            f"{sum(tally.kills.values())} kills, lost {tally.rows_lost}, doubled {tally.rows_doubled}, "
            f"different {tally.outputs_different}, redone {tally.seconds_redone:.1f} s",
            flush=True,
        )

    # One job

    def _job(self, folder: Path, kills: int) -> None:
        """Run a job to its end, with at most so many kills on the way."""
        folder.mkdir(parents=True)
        self.kills, self.lives = [], []
        for old in [*self.calls.glob("*"), *self.orders.glob("*")]:
            old.unlink()
        self._start(folder)
        try:
            while True:
                pause = self.rng.uniform(*self.job.calm) if len(self.kills) < kills else None
                if self._await_end(folder, pause):
                    status = self.driver.returncode
                    if status in (0, 1) and (status == 0 or self._done(folder)):
                        return
                    print(f"{self.job.name}: a driver failed with status {status}\n{self._tail(folder)}", flush=True)
                    self.tally.drivers_failed += 1
                    if not kills or self.tally.drivers_failed > 20:
                        raise CampaignError(f"{self.job.name}: drivers fail")
                    self._start(folder)
                else:
                    self._kill(folder)
        finally:
            if self.driver.poll() is None:
                self.driver.kill()
            self.driver.wait()

    def _done(self, folder: Path) -> bool:
        """Status 1 of `scol protect` means that photos failed, which is an outcome as well."""
        return (folder / "out.run" / "summary.json").exists()

    def _start(self, folder: Path) -> None:
        self.lives.append(time.time())
        self.in_hand = 0
        self.tally.drivers += 1
        with open(folder / "driver.log", "ab") as log:
            command = self.job.command(folder, self.nodes.address)
            self.driver = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def _tail(self, folder: Path) -> str:
        return (folder / "driver.log").read_text(errors="replace")[-3000:]

    def _await_end(self, folder: Path, seconds: float | None) -> bool:
        """Wait for the driver's end, so long at most. Returns whether it has ended."""
        end = None if seconds is None else time.monotonic() + seconds
        seen, since = -1, time.monotonic()
        while self.driver.poll() is None:
            if end is not None and time.monotonic() >= end:
                return False
            parts = sum(1 for _ in folder.rglob("*.parquet"))
            if parts != seen:
                seen, since = parts, time.monotonic()
            if time.monotonic() - since > _STALL:
                raise CampaignError(f"{self.job.name}: no new part for {_STALL:.0f} s\n{self._tail(folder)}")
            time.sleep(0.05)
        return True

    # Kills

    def _kill(self, folder: Path) -> None:
        kinds = [kind for kind in KINDS if self.in_hand < _IN_HAND or kind in (RAYLET, DRIVER)]
        kind = self.rng.choices(kinds, [KINDS[kind] for kind in kinds])[0]
        if kind == DRIVER:
            pids = {pid for pid, title in self.nodes.workers().items() if title.startswith("ray::Worker")}
            self._kill_driver(kind, pids, folder)
        elif kind == RAYLET:
            when = time.time()
            self._note(kind, self.nodes.kill_one(self.rng), when)
        elif kind in (WRITE, COMMIT):
            self._kill_at(kind, folder)
        else:
            wanted = "ray::Worker.run" if kind == ACTOR else "ray::"
            found = [pid for pid, title in sorted(self.nodes.workers().items()) if title.startswith(wanted)]
            if found:
                self._kill_worker(kind, self.rng.choice(found))

    def _kill_driver(self, kind: str, pids: set[int], folder: Path) -> None:
        self.driver.kill()
        self.driver.wait()
        self._note(kind, pids)
        self._start(folder)

    def _kill_worker(self, kind: str, pid: int) -> None:
        in_hand = self.nodes.workers().get(pid, "").startswith("ray::Worker")
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.in_hand += in_hand
        self._note(kind, {pid})

    def _kill_at(self, point: str, folder: Path) -> None:
        """Order the next process that comes to this point to stop, and kill it there."""
        order = self.orders / point
        order.touch()
        end = time.monotonic() + 30
        while time.monotonic() < end and self.driver.poll() is None:
            for taken in self.orders.glob(f"{point}.*"):
                pid = int(taken.suffix[1:])
                taken.unlink()
                if pid == self.driver.pid:
                    self._kill_driver(point, set(), folder)
                else:
                    self._kill_worker(point, pid)
                return
            time.sleep(0.002)
        order.unlink(missing_ok=True)
        for taken in self.orders.glob(f"{point}.*"):  # at the last moment: it must not wait for ever
            self._kill_worker(point, int(taken.suffix[1:]))
            taken.unlink()

    def _note(self, kind: str, pids: set[int], when: float | None = None) -> None:
        self.kills.append(Kill(time.time() if when is None else when, kind, pids))
        self.tally.kills[kind] += 1


def main() -> int:
    options = parse(
        "chaos", __doc__, kills=(200, "in all"), seed=(0, "of moments and victims"),
        stages={"choices": ["arithmetic", "real", "both"], "default": "both"},
        items=(600, "of an arithmetic job"), photos=(6, "of a real job"),
        nodes=(3, "of the cluster, the head included; two cores each"),
        set={"dest": "sets", "action": "append", "default": [], "help": "KEY=VALUE for the real stages"},
    )  # fmt: skip
    tallies: dict[str, Tally] = {}
    wanted = ["arithmetic", "real"] if options.stages == "both" else [options.stages]
    with tempfile.TemporaryDirectory(prefix="scol-chaos-") as name, _cluster(options.nodes, 2, Path(name)) as cluster:
        folder, left = Path(name), options.kills
        for number, kind in enumerate(wanted):
            real = kind == "real"
            job = RealJob(options.photos, folder, options.sets) if real else ArithmeticJob(options.items)
            rng = random.Random(f"{options.seed}/{kind}")
            tallies[kind] = Campaign(job, cluster, folder, rng).run(left // (len(wanted) - number))  # equal shares
            left -= sum(tallies[kind].kills.values())
    parts = {name: tally.to_dict() for name, tally in tallies.items()}
    total = ("kills", "rows_lost", "rows_doubled", "outputs_different", "seconds_redone", "finished_redone")
    result = {name: sum(part[name] for part in parts.values()) for name in total}
    print(aligned([(k, f"{v:.1f}" if isinstance(v, float) else v) for k, v in result.items()], "<18", ">10", gap=" "))
    record(options.out, result | {"seed": options.seed, "nodes": options.nodes, "campaigns": parts})
    return 0 if all(tally.good for tally in tallies.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
