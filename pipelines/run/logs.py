"""Structured logs: one JSON object a line, for machines.

Every line has `time` (UTC), `event`, and `driver` (id of the driver, as in RUN/drivers/). Events, with their fields:

| event | fields |
|---|---|
| `start`, `end` | `run`, `source`, `out`; `end` also `state` and `seconds` |
| `stage` | `stage`, `total`, `kept`: photos wanted, and found done |
| `shard` | `stage`, `part`, `photos` (ids), `rows` (by status), `seconds`, `operator_seconds`, `bytes`, `committed` |
| `row` | `stage`, `part`, `photo_id`, `face_id`, `status`, `reason`: a row that failed or came out weak |
| `worker_replaced` | `stage` at which it was at work, `restarts` so far, `retried` photos of that stage |
| `message` | `level`, `logger`, `message`: of the packages' own loggers, from INFO on |

The file is appended to, one write a line, so several drivers may share it. Ids of photos and faces are personal data:
`scol purge` takes lines of a photo out of `*.jsonl` in the run's folder, and only there.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import threading
from typing import Any

_LOGGERS = ("cluster", "scol")


class JsonLog(logging.Handler):
    """A log file; as a handler of the packages' loggers while the block lasts.

    Args:
        file: local path; its folder is made.
        driver: id that every line gets.

    Raises:
        OSError: the file cannot be opened for appending.
    """

    def __init__(self, file: str, driver: str) -> None:
        super().__init__(logging.INFO)
        os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)
        self._file = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)  # ids: for nobody else to read
        self._driver = driver
        self._guard = threading.Lock()
        self._levels: dict[str, int] = {}

    def __enter__(self) -> JsonLog:
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            self._levels[name] = logger.level
            if logger.getEffectiveLevel() > logging.INFO:
                logger.setLevel(logging.INFO)
            logger.addHandler(self)
        return self

    def __exit__(self, *_) -> None:
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            logger.removeHandler(self)
            logger.setLevel(self._levels[name])
        with self._guard:
            os.close(self._file)

    def event(self, event: str, **fields: Any) -> None:
        """Append one line. A full disk does not end a run: the line is lost."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "event": event, "driver": self._driver} | fields
        data = json.dumps(line, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n"
        with self._guard:
            try:
                os.write(self._file, data)
            except OSError:
                pass

    def emit(self, record: logging.LogRecord) -> None:
        self.event("message", level=record.levelname, logger=record.name, message=record.getMessage())
