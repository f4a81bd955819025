"""Plan and run the chain of stages over a listing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from cluster import BrokenStageError, Engine, KeyRule, Progress, RunSummary
from pipelines.archive.listing import Listing
from pipelines.config.names import STAGES
from pipelines.config.sections import Config
from pipelines.jobs import run_gallery
from pipelines.jobs.renewal import renewal
from pipelines.networks import fingerprints
from pipelines.run import attempts
from pipelines.run.folder import Run
from pipelines.run.keys import chain, derive, stage_rules
from pipelines.run.schemas import PLAN_SCHEMA, SOURCE
from pipelines.stages import make_stages
from pipelines.stages.pools import layout


@dataclass
class Setting:
    """What the stages of a run were given."""

    weights: dict[str, str]
    gallery_url: str
    gallery: dict[str, Any]


def execute(
    run: Run,
    source: pa.Table | Listing,
    config: Config,
    *,
    about: Mapping[str, str] | None = None,
    out: str | None = None,
    verify: bool = False,
    until: str = "publish",
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    say: Callable[[str], None] = lambda text: None,
    on_start: Callable[[Setting], None] | None = None,
) -> tuple[RunSummary, Setting]:
    """Plan and run the stages up to ``until`` over these photos; what is done already is not done again.

    Args:
        source: of ``source_table``, or a listing of any length.
        about: kept with the plan, see ``run.folder.plan_about``.
        verify: read what is in OUT, and publish again what has other bytes than were written.
        stop: see ``Engine``.

    Raises:
        WeightsError: embedded weights are missing or altered.
        GalleryError, StoreError, EngineError: see their packages.
        BrokenStageError: ``engine.stop_after_errors`` photos ended in the same exception; what is finished is kept.
        RunInterrupted: Ctrl-C; what is finished is kept.
    """
    url, described, std = "", {}, None
    if STAGES.index(until) >= STAGES.index("fuse"):
        heard = stop or (lambda: False)
        url, info = run_gallery.patiently(lambda: run_gallery.ensure_gallery(config, run, say, heard))
        described = run_gallery.described_for_run(url, info)
        if config.attack.enabled and config.inspect.unit == "std":
            std = run_gallery.gallery_std(run, url, info, config.num_codes)
    std_digest = "" if std is None else hashlib.sha256(std.tobytes()).hexdigest()[:16]
    way = run_gallery.compressed_info(info) if described and config.gallery.search == "compressed" else ""
    weights = fingerprints.stage_weights(config, described.get("fingerprint", "") + way, std_digest)
    opened = attempts.opened(run)
    rules = stage_rules(config, weights, out or "", opened)
    if until == "publish":
        rules["publish"] = chain(rules["publish"], renewal(run, out, opened.get("publish", ()), verify))
    tables = [source] if isinstance(source, pa.Table) else source
    # Stages beyond `until` get their keys in the plan as well: they are what a later run would make.
    run.write_plan((planned(table, rules) for table in tables), about)
    setting = Setting(weights, url, described)
    if on_start is not None:
        on_start(setting)
    stages = make_stages(config, weights, gallery=url, std=std, out=out, photos=len(source), until=until)
    engine = Engine(
        run.store,
        stages,
        pools=partial(layout, config),
        source=SOURCE,
        shard_items=config.engine.shard_photos,
        address=config.engine.ray_address,
        progress=progress,
        stop=stop,
        stop_after_errors=config.engine.stop_after_errors,
    )
    try:
        with run_gallery.reading(url):
            return engine.run(source, rules), setting
    except BrokenStageError as error:
        error.advice = (
            f"stopped (engine.stop_after_errors={config.engine.stop_after_errors}). Once the cause is mended, "
            f"`scol retry {run.url} --reason EXCEPTION` opens these photos again"
        )
        raise


def planned(table: pa.Table, rules: Mapping[str, KeyRule]) -> pa.Table:
    """Rows of the plan, of photos of the source table."""
    keys = derive(rules, table["key"].to_pylist())
    return pa.table([table["photo_id"], table["path"], table["key"], *keys.values()], PLAN_SCHEMA)
