"""Progress of a run for people."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from cluster import Progress
from pipelines.run.schemas import ERROR, SOURCE
from pipelines.run.text import duration


class Reporter:
    """Progress for people: one line that is rewritten on a terminal, a plain line now and then in a log.

    Args:
        stream: where to.
        every: seconds between lines in a log.
    """

    def __init__(self, stream: TextIO = sys.stderr, every: float = 15.0) -> None:
        self.stream, self.every = stream, every
        self.live = stream.isatty()
        self.begin = time.monotonic()
        self.last = 0.0
        self.kept: dict[str, int] = {}
        self.stages: dict[str, Progress] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.stage == SOURCE:
            return
        if progress.stage not in self.stages:  # said of every stage at the start: what an earlier run has done
            self.kept[progress.stage] = progress.done
            self.stages[progress.stage] = progress
            return
        self.stages[progress.stage] = progress
        now = time.monotonic()
        finished = progress.stage == list(self.stages)[-1] and progress.done == progress.total
        if not finished and now - self.last < (0.2 if self.live else self.every):
            return
        self.last = now
        line = self.line(now)
        if self.live:
            self.stream.write("\r\x1b[2K" + line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def line(self, now: float) -> str:
        """The state in one line: photos through the last stage, rate, time left, and the stage that works."""
        seconds = max(1e-9, now - self.begin)
        last = list(self.stages)[-1]
        done = self.stages[last].done
        new = done - self.kept[last]
        text = f"{done}/{self.stages[last].total} photos"
        if new > 0:
            rate = new / seconds
            text += f", {60 * rate:.1f} photos/min, {duration((self.stages[last].total - done) / rate)} left"
        else:
            text += f", {duration(seconds)} so far"
        text += "".join(
            f", {p.stage} {p.done}" for p in self.stages.values() if p.stage != last and done <= p.done < p.total
        )
        failed = self.stages[last].statuses.get(ERROR, 0)
        return text + (f", {failed} failed" if failed else "")

    def close(self) -> None:
        if self.live and self.stages:
            self.stream.write("\n")
            self.stream.flush()
