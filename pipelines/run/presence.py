"""Who is at work on a run, told through files in the run's folder, so that it works from any machine and on any store.

    RUN/drivers/ID.json     written by a driver every few seconds: that it lives, how far it is
    RUN/drivers/ID.cancel   put there by `scol cancel`: this driver, and no other, is to stop

A request names one driver by its id, which no other will have: one that comes too late stops nobody.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from pipelines.run.folder import Run, RunError
from pipelines.run.text import utc

log = logging.getLogger("scol")

BEAT = 4.0  # seconds between two signs of life
SILENT = 60.0  # seconds without one, after which a driver on another machine counts as dead
RUNNING = "running"
_FOLDER = "drivers"


class BusyError(RunError):
    """Somebody is at work on the run."""


def machine_name() -> str:
    """What processes that see each other's ids have in common; empty where the system does not say (not Linux)."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When a process of this machine began, in the kernel's own units; empty where there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            words = file.read().rpartition(")")[2].split()  # proc(5): the name may hold spaces
        return "" if words[0] in "ZX" else words[19]
    except OSError:
        return ""


def is_alive(entry: dict[str, Any], now: float | None = None) -> bool:
    """Whether the driver of this record is at work: on this machine its process decides, elsewhere its last sign."""
    if entry.get("state") != RUNNING:
        return False
    if entry["machine"] and entry["machine"] == machine_name():
        return _born(entry["pid"]) == entry["born"]
    return abs((time.time() if now is None else now) - entry["beat"]) < SILENT


def drivers(run: Run) -> list[dict[str, Any]]:
    """Records of all drivers that the run's folder knows, the latest last, each with `alive`.

    Keys: id, kind (`protect`, `gallery build`, `purge`), host, pid, born, machine, started (UTC), beat (s since 1970),
    state (`running`, `finished`, `interrupted`, `cancelled`, `failed`), and what the driver tells of itself.
    """
    found = []
    for name in run.names(_FOLDER):
        if name.endswith(".json"):
            try:
                entry = run.read_json(f"{_FOLDER}/{name}")
            except RunError:  # removed meanwhile
                continue
            found.append(entry | {"alive": is_alive(entry)})
    return sorted(found, key=lambda entry: (entry["beat"], entry["id"]))


def request_cancel(run: Run) -> list[dict[str, Any]]:
    """Ask all living drivers of a run to stop. Returns their records; where none lives, nothing is written."""
    living = [entry for entry in drivers(run) if entry["alive"] and entry["kind"] != "purge"]
    for entry in living:
        run.write(f"{_FOLDER}/{entry['id']}.cancel", b"")
    return living


def wait_for_end(run: Run, ids: set[str], seconds: float) -> set[str]:
    """Wait until these drivers are at work no more. Returns those that still are after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        left = {entry["id"] for entry in drivers(run) if entry["alive"]} & ids
        if not left or time.monotonic() >= end:
            return left
        time.sleep(0.5)


class Presence:
    """This process at work on a run: signs of life while the block lasts, and an ear for requests to stop.

        with Presence(run, "protect") as presence:
            Engine(..., stop=presence.stopped)
            presence.state = "finished"

    Args:
        kind: what is done, in words; `purge` has to be alone.
        tell: gives what the record says besides, called in another thread every few seconds; must be quick.
        busy_work: called at every sign of life in that thread, for things that need not be done in the driver's loop.

    Raises:
        BusyError: on entering: a purge goes on, or, for a purge, anything else does.
        OSError: on entering: the run's folder cannot be written to.
    """

    def __init__(
        self,
        run: Run,
        kind: str,
        tell: Callable[[], dict[str, Any]] = dict,
        busy_work: Callable[[], None] = lambda: None,
        every: float = BEAT,
    ) -> None:
        self.run, self.kind, self.tell, self.busy_work, self.every = run, kind, tell, busy_work, every
        self.id = uuid.uuid4().hex[:16]
        self.state = RUNNING
        self._asked = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="presence", daemon=True)
        self._about = {
            "id": self.id,
            "kind": kind,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
            "machine": machine_name(),
            "started": utc(),
        }

    def stopped(self) -> bool:
        """Whether somebody has asked this driver to stop."""
        return self._asked.is_set()

    def __enter__(self) -> Presence:
        self._write()
        # First registered, then looked around: of two that come together, at least one sees the other.
        for other in drivers(self.run):
            if other["id"] == self.id:
                continue
            if other["alive"] and "purge" in (self.kind, other["kind"]):
                self._remove(self.id)
                raise BusyError(f"{self.run.url}: {words(other)}; wait for it, or stop it by `scol cancel`")
            if not other["alive"]:
                self._remove(other["id"])
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._over.set()
        self._thread.join(60)
        if self.state == RUNNING:
            self.state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed" if error else "finished"
        if self.state == "interrupted" and self.stopped():
            self.state = "cancelled"
        self._attempt(self.busy_work)
        self._attempt(self._write)
        self._attempt(lambda: self.run.remove(f"{_FOLDER}/{self.id}.cancel"))

    def _beat(self) -> None:
        while not self._over.wait(self.every):
            self._attempt(self._listen)
            self._attempt(self.busy_work)
            self._attempt(self._write)

    def _listen(self) -> None:
        if not self._asked.is_set() and self.run.has(f"{_FOLDER}/{self.id}.cancel"):
            log.warning("asked to stop by `scol cancel`")
            self._asked.set()

    def _write(self) -> None:
        self.run.write_json(
            f"{_FOLDER}/{self.id}.json", self._about | {"state": self.state, "beat": time.time()} | self.tell()
        )

    def _remove(self, name: str) -> None:
        for suffix in ("json", "cancel"):
            self.run.remove(f"{_FOLDER}/{name}.{suffix}")

    @staticmethod
    def _attempt(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a store that fails for a moment must not end a run that can go on
            log.warning("the run's folder: %s: %s", type(error).__name__, error)


def words(entry: dict[str, Any]) -> str:
    """A driver in one line."""
    who = f"{entry['kind']} (process {entry['pid']} on {entry['host']}, since {entry['started']})"
    if entry["alive"]:
        return f"{who} is at work"
    if entry["state"] == RUNNING:
        ago = max(0.0, time.time() - entry["beat"])
        return f"{who} ended without a word (killed?); its last sign of life is {ago:.0f} s old"
    return f"{who} is over: {entry['state']}"
