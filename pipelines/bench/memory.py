"""How much memory processes take together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import psutil


class MemoryWatch(threading.Thread):
    """Samples, five times a second, the resident sizes of a process and of all that descend from it.

        watch = MemoryWatch()
        watch.start()
        ...
        watch.stopped.set()

    Args:
        pid: of the process; this one by default.
        counts: which of the processes count, by their command line; all by default.

    Attributes:
        peak: largest sum seen, bytes.
        stopped: set it to end the thread.
    """

    def __init__(self, pid: int | None = None, counts: Callable[[list[str]], bool] | None = None) -> None:
        super().__init__(daemon=True)
        self.process, self.counts = psutil.Process(os.getpid() if pid is None else pid), counts
        self.peak, self.stopped = 0, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.2):
            total = 0
            try:
                for process in [self.process, *self.process.children(recursive=True)]:
                    try:
                        if self.counts is None or self.counts(process.cmdline()):
                            total += process.memory_info().rss
                    except (psutil.NoSuchProcess, psutil.AccessDenied):
                        continue
            except psutil.NoSuchProcess:
                return
            self.peak = max(self.peak, total)


def is_ray_worker(command: list[str]) -> bool:
    """For `MemoryWatch`: a worker process of Ray's."""
    return command[:1] != [] and command[0].startswith("ray::")
