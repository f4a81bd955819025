"""Failed rows that are to be made again.

A part is never changed, so a photo that failed gets another key at the stage where it failed, and with it at all later
ones: the old key hashed once more (`again`). Which keys are replaced so is kept in RUN/retries/*.parquet, one file a
request, each with the columns `stage` and `key`. A key stands for one version of a photo and of the settings, so an
entry has no effect on any other; and the rows of all other photos keep their keys, and are not touched.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from cluster import hash_key
from pipelines.config import STAGES
from pipelines.inspect_run import errors
from pipelines.manifests import SOURCE, Run, RunError

FOLDER = "retries"
SCHEMA = pa.schema([("stage", pa.string()), ("key", pa.string())])
FOLLOWS = "NOT_PUBLISHED"  # a face that is well itself: another one of the photo failed


def again(key: str) -> str:
    """The key of the next attempt at the same work."""
    return hash_key("again", key)


def opened(run: Run) -> dict[str, set[str]]:
    """Keys that count no more, by stage: their photos are to have `again(key)`.

    Raises:
        RunError: unreadable requests.
    """
    found: dict[str, set[str]] = {}
    for name in run.names(FOLDER):
        if name.endswith(".parquet"):
            table = run.read_table(f"{FOLDER}/{name}")
            for stage, key in zip(table["stage"].to_pylist(), table["key"].to_pylist(), strict=True):
                found.setdefault(stage, set()).add(key)
    return found


def current(key: str, opened_keys: Collection[str]) -> str:
    """The key that counts now: as many attempts on as were asked for."""
    while key in opened_keys:
        key = again(key)
    return key


@dataclass(frozen=True)
class Retried:
    """Attributes:
    photos: how many photos are made again, by the stage from which on.
    at_source: photos that match but failed while SRC was listed; every run looks at these anyway.
    """

    photos: Mapping[str, int]
    at_source: int


def retry(run: Run, reasons: Collection[str] = (), stage: str | None = None) -> Retried:
    """Have failed photos made again by the next run.

    Args:
        reasons: codes (`TIMEOUT`, ...); empty for all. `NOT_PUBLISHED` stands for what made the photo fail.
        stage: only rows that failed there.

    Returns:
        what the next run will do. A photo is taken up at its earliest stage with a matching row; its other faces are
        made again with it, with the same result.

    Raises:
        RunError: not a run's folder, an unknown stage, or a reason that no failed row has.
    """
    if stage is not None and stage not in (SOURCE, *STAGES):
        raise RunError(f"no stage {stage!r}; there are {', '.join((SOURCE, *STAGES))}")
    rows = errors(run.url, weak=False)
    codes = Counter((row["reason"] or "").split(":")[0] for row in rows)
    unknown = sorted(set(reasons) - set(codes))
    if unknown:
        known = ", ".join(sorted(codes)) or "none"
        raise RunError(f"no failed row has the reason {', '.join(unknown)}; there are: {known}")

    def code(row) -> str:
        return (row["reason"] or "").split(":")[0]

    by_photo: dict[str, list] = {}
    for row in rows:
        by_photo.setdefault(row["photo_id"], []).append(row)
    wanted: dict[str, str] = {}
    at_source = 0
    for photo, failed in by_photo.items():
        matching = [
            row
            for row in failed
            if (not reasons or code(row) in reasons) and (stage is None or row["failed_stage"] == stage)
        ]
        if any(code(row) == FOLLOWS for row in matching):
            matching = [row for row in failed if code(row) != FOLLOWS] or matching
        if not matching:
            continue
        where = {row["failed_stage"] for row in matching}
        if SOURCE in where:
            at_source += 1
        else:
            wanted[photo] = next(name for name in STAGES if name in where)
    if wanted:
        plan = run.plan(["photo_id", *STAGES])
        plan = plan.filter(pc.is_in(plan["photo_id"], value_set=pa.array(list(wanted), pa.string())))
        entries = [
            {"stage": wanted[row["photo_id"]], "key": row[wanted[row["photo_id"]]]} for row in plan.to_pylist()
        ]
        run.write_table(f"{FOLDER}/{uuid.uuid4().hex}.parquet", pa.Table.from_pylist(entries, SCHEMA))
    counts = Counter(wanted.values())
    return Retried({name: counts[name] for name in STAGES if counts[name]}, at_source)
