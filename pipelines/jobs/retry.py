"""``scol retry``: failed photos are made again by the next run."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config.names import STAGES
from pipelines.run.attempts import FOLDER, SCHEMA
from pipelines.run.errors import errors
from pipelines.run.folder import Run, RunError
from pipelines.run.schemas import SOURCE

FOLLOWS = "NOT_PUBLISHED"  # a face that is well itself: another one of the photo failed


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
