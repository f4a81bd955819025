"""Times, durations and JSON as text."""

from __future__ import annotations

import datetime
import json
import math
from typing import Any


def utc() -> str:
    """Now, UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def to_json(value: Any) -> str:
    """JSON for files and ``--json``: NaN and infinity, which JSON does not have, become null."""

    def plain(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, dict):
            return {str(k): plain(v) for k, v in item.items()}
        return [plain(v) for v in item] if isinstance(item, list | tuple) else item

    return json.dumps(plain(value), indent=1, ensure_ascii=False, default=str)
