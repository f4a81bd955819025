"""Who is at work on a run, told through files in the run's folder, so that it works from any machine and on any store.

    RUN/drivers/ID.json     written by a driver every few seconds: that it lives, how far it is
    RUN/drivers/ID.cancel   put there by `scol cancel`: this driver, and no other, is to stop

A request names one driver by its id, which no other will have: one that comes too late stops nobody.

One driver at a time. Whoever comes writes its record first and then looks at the others'. It gives up where one has
been `admitted`, or where one that is about to begin as well comes before it (`_place`, the same for both); it waits for
those that come after it to give up. So of any number that come together exactly one goes on.

Whether a driver of another machine lives is decided by this process's clock alone: its record changes, or has not
changed for `SILENT` seconds while this process looked. No two clocks are compared, but for what is shown to people.
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
PURGE = "purge"
_FOLDER = "drivers"
_LOOK = 0.2  # seconds between two looks at others while one waits


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


def _known(entry: dict[str, Any]) -> bool | None:
    """Whether the driver of a record is at work, where that is sure: it says that it is over, or it is of this machine
    and its process decides. None: it is of another machine."""
    if entry.get("state") != RUNNING:
        return False
    if entry["machine"] and entry["machine"] == machine_name():
        return _born(entry["pid"]) == entry["born"]
    return None


def is_alive(entry: dict[str, Any], now: float | None = None) -> bool:
    """Whether the driver of this record seems to be at work: on this machine its process decides, elsewhere the age of
    its last sign, by two machines' clocks. To be shown; `Watch` is what decisions go by."""
    known = _known(entry)
    return abs((time.time() if now is None else now) - entry["beat"]) < SILENT if known is None else known


def _records(run: Run) -> list[dict[str, Any]]:
    """Raises RunError where a record that is there cannot be read: nobody may be overlooked."""
    found = []
    for name in run.names(_FOLDER):
        if name.endswith(".json"):
            try:
                found.append(run.read_json(f"{_FOLDER}/{name}"))
            except RunError:
                if run.has(f"{_FOLDER}/{name}"):  # not removed meanwhile
                    raise
    return sorted(found, key=lambda entry: (entry["beat"], entry["id"]))


def drivers(run: Run) -> list[dict[str, Any]]:
    """Records of all drivers that the run's folder knows, the latest last, each with `alive` (bool) and `sure` (bool:
    no clock of another machine was asked for that).

    Keys: id, kind (`protect`, `gallery build`, `purge`), host, pid, born, machine, started (UTC), beat (s since 1970,
    by its machine's clock), beats (signs of life so far), admitted (bool: it is at work, not only about to begin),
    state (`running`, `finished`, `interrupted`, `cancelled`, `failed`), and what the driver tells of itself.
    """
    return [entry | {"alive": is_alive(entry), "sure": _known(entry) is not None} for entry in _records(run)]


class Watch:
    """Looks at a run's drivers again and again, and tells those that live from the dead without another's clock."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._seen: dict[
            str, tuple[Any, float, bool]
        ] = {}  # last sign, when it was first seen, whether it is a new one

    def look(self) -> list[dict[str, Any]]:
        """All records, the latest last, each with `alive`: True, False, or None, not yet known.

        A driver of another machine is known to live once its record has changed between two looks, and to be dead once
        it has been the same for `SILENT` seconds.

        Raises:
            OSError, or what the store's client raises: the run's folder cannot be read.
        """
        now, found = time.monotonic(), []
        for entry in _records(self.run):
            alive = _known(entry)
            if alive is None:
                sign = (entry["beat"], entry.get("beats"))
                before, since, changed = self._seen.get(entry["id"], (sign, now, False))
                if sign != before:
                    since, changed = now, True
                self._seen[entry["id"]] = sign, since, changed
                alive = False if now - since >= SILENT else True if changed else None
            found.append(entry | {"alive": alive})
        return found


def request_cancel(run: Run) -> list[dict[str, Any]]:
    """Ask all living drivers of a run to stop. Returns their records; where none lives, nothing is written.

    A driver of another machine that seems dead by its clock is watched for some seconds before it is taken for dead.
    """
    watch, end = Watch(run), time.monotonic() + 3 * BEAT
    while True:
        by_id = {entry["id"]: entry["alive"] for entry in watch.look()}
        found = [e | {"alive": True, "sure": True} if by_id.get(e["id"]) else e for e in drivers(run)]
        if all(entry["alive"] or entry["sure"] for entry in found) or time.monotonic() >= end:
            break
        time.sleep(_LOOK)
    living = [entry for entry in found if entry["alive"] and entry["kind"] != PURGE]
    for entry in living:
        run.write(f"{_FOLDER}/{entry['id']}.cancel", b"")
    return living


def wait_for_end(run: Run, ids: set[str], seconds: float) -> set[str]:
    """Wait until these drivers are at work no more. Returns those that still are after so many seconds."""
    watch, end = Watch(run), time.monotonic() + seconds
    while True:
        left = {entry["id"] for entry in watch.look() if entry["alive"] is not False} & ids
        if not left or time.monotonic() >= end:
            return left
        time.sleep(0.5)


def _place(entry: dict[str, Any]) -> tuple[bool, str, str]:
    """The order in which drivers that come together go on; the same whoever asks."""
    return entry["kind"] != PURGE, entry["started"], entry["id"]


class Presence:
    """This process alone at work on a run: signs of life while the block lasts, and an ear for requests to stop.

        with Presence(run, "protect") as presence:
            Engine(..., stop=presence.stopped)
            presence.state = "finished"

    Entering waits up to `SILENT` seconds where the record of a driver on another machine says that it is at work, until
    that is known.

    Args:
        kind: what is done, in words; `purge` cannot be asked to stop.
        tell: gives what the record says besides, called in another thread every few seconds; must be quick.
        busy_work: called at every sign of life in that thread, for things that need not be done in the driver's loop.

    Attributes:
        why: who has asked this driver to stop, in words; None: nobody.

    Raises:
        BusyError: on entering: somebody else is at work on the run.
        KeyboardInterrupt: on entering: asked to stop while it waited.
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
        self.why: str | None = None
        self._watch = Watch(run)
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="presence", daemon=True)
        self._about = {
            "id": self.id,
            "kind": kind,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
            "machine": machine_name(),
            "started": utc(),
            "beats": 0,
            "admitted": False,
        }

    def stopped(self) -> bool:
        """Whether this driver has been asked to stop."""
        return self.why is not None

    def __enter__(self) -> Presence:
        self._write()
        self._thread.start()
        try:
            self._be_admitted()
        except BaseException as error:
            self.state = "refused" if isinstance(error, BusyError) else "failed"
            self._end()
            self._attempt(lambda: self._remove(self.id))
            raise
        return self

    def _end(self) -> None:
        self._over.set()
        self._thread.join(60)

    def _be_admitted(self) -> None:
        """Wait until it is clear who goes on. Raises BusyError where it is another."""
        watch, told, rivals = Watch(self.run), False, True
        while rivals:
            rivals = False
            for entry in watch.look():
                if entry["id"] == self.id:
                    continue
                if entry["alive"] is False:
                    self._remove(entry["id"])
                    continue
                rivals = True
                # A scol that knows of no admission never waits for any.
                if entry["alive"] and (entry.get("admitted", True) or _place(entry) < _place(self._about)):
                    stop = "" if entry["kind"] == PURGE else f", or stop it by `scol cancel {self.run.url}`"
                    raise BusyError(f"{self.run.url}: {words(entry)}; this one does not begin: wait for it{stop}")
                if entry["alive"] is None and not told:
                    told = True
                    log.warning("%s: waiting up to %.0f s to see whether that is so", words(entry), SILENT)
            if self.stopped():
                raise KeyboardInterrupt
            if rivals:
                self._over.wait(_LOOK)
        self._about["admitted"] = True
        self._attempt(self._write)  # else with the next sign of life: until then nobody takes this one to have given up

    def __exit__(self, kind, error, trace) -> None:
        self._end()
        if self.state == RUNNING:
            self.state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed" if error else "finished"
        if self.state == "interrupted" and self.stopped():
            self.state = "cancelled"
        self._attempt(self.busy_work)
        self._attempt(self._write)
        self._attempt(lambda: self.run.remove(f"{_FOLDER}/{self.id}.cancel"))

    def _beat(self) -> None:
        while not self._over.wait(self.every if self._about["admitted"] else min(self.every, 1.0)):
            self._attempt(self._listen)
            self._attempt(self.busy_work)
            self._attempt(self._write)

    def _listen(self) -> None:
        if self.stopped():
            return
        names = self.run.names(_FOLDER)
        if f"{self.id}.cancel" in names:
            log.warning("asked to stop by `scol cancel`")
            self.why = "`scol cancel` asked for it"
        elif self._about["admitted"]:
            self.why = self._superseded(f"{self.id}.json" in names)
            if self.why is not None:
                log.warning("to stop: %s", self.why)

    def _superseded(self, there: bool) -> str | None:
        """Why another goes on instead, though this one was admitted. Nobody stops for a driver that stops as well: of
        two at work the rule that holds on entering says who goes on.

        Args:
            there: whether this driver's record is.
        """
        if not there:
            return "its record is gone: another driver has taken it for dead"
        for entry in self._watch.look():  # folders on a network may be listed late, so that two were admitted
            ahead = entry.get("admitted", True) and _place(entry) < _place(self._about)
            if entry["id"] != self.id and entry["alive"] and ahead:
                return words(entry)
        return None

    def _write(self) -> None:
        with self._lock:
            self._about["beats"] += 1
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
    if entry["state"] != RUNNING:
        return f"{who} is over: {entry['state']}"
    sure = entry.get("sure", entry["alive"] is not None)
    if entry["alive"]:
        return f"{who} is at work" if sure else f"{who} is at work, if its clock agrees with this machine's"
    if entry["alive"] is None:
        return f"{who} seems to be at work on another machine"
    ago = time.time() - entry["beat"]
    if sure:
        return f"{who} ended without a word (killed?); its last sign of life is {max(0.0, ago):.0f} s old"
    return f"{who} seems to have ended without a word (killed?): its clock and this machine's are {ago:.0f} s apart"
