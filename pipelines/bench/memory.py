"""How much memory processes take together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import psutil


class MemoryWatch(threading.Thread):
    """Samples, five times a second, the resident sizes of a process and of all that descend from it.

        with MemoryWatch() as watch:
            ...
        watch.peak

    Args:
        pid: of the process; this one by default.
        counts: which of the processes count, by their command line; all by default.

    Attributes:
        peak: largest sum seen, bytes.
    """

    def __init__(self, pid: int | None = None, counts: Callable[[list[str]], bool] = lambda command: True) -> None:
        super().__init__(daemon=True)
        self.process, self.counts = psutil.Process(os.getpid() if pid is None else pid), counts
        self.peak, self._ended = 0, threading.Event()

    def __enter__(self) -> MemoryWatch:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.wait(0.2):
            try:
                family = [self.process, *self.process.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.peak = max(self.peak, sum(map(self._size, family)))

    def _size(self, process: psutil.Process) -> int:
        try:
            return process.memory_info().rss if self.counts(process.cmdline()) else 0
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return 0


def is_ray_worker(command: list[str]) -> bool:
    """For `MemoryWatch`: a worker process of Ray's."""
    return command[:1] != [] and command[0].startswith("ray::")
