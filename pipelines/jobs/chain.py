"""Plan and run the chain of stages over a listing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import pyarrow as pa

from cluster import BrokenStageError, Engine, KeyRule, Progress, RunSummary
from pipelines.archive.listing import Listing
from pipelines.config.names import STAGES
from pipelines.config.sections import Config
from pipelines.jobs.renewal import renewal
from pipelines.jobs.run_gallery import RunGallery
from pipelines.networks.fingerprints import stage_weights
from pipelines.run import attempts
from pipelines.run.folder import Run
from pipelines.run.keys import chain, derive, stage_rules
from pipelines.run.schemas import PLAN_SCHEMA, SOURCE
from pipelines.stages.chain import make_stages
from pipelines.stages.declaration import Setting
from pipelines.stages.pools import layout


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
    on_start: Callable[[Setting, RunGallery | None], None] = lambda setting, gallery: None,
) -> RunSummary:
    """Plan and run the stages up to ``until`` over these photos; what is done already is not done again.

    Args:
        source: of ``source_table``, or a listing of any length.
        about: kept with the plan, see ``run.folder.plan_about``.
        verify: read what is in OUT, and publish again what has other bytes than were written.
        stop: see ``Engine``.
        on_start: called once all is checked and planned, before the stages run.

    Raises:
        WeightsError: embedded weights are missing or altered.
        GalleryError, StoreError, EngineError: see their packages.
        BrokenStageError: ``engine.stop_after_errors`` photos ended in the same exception; what is finished is kept.
        RunInterrupted: Ctrl-C; what is finished is kept.
    """
    gallery = None
    if STAGES.index(until) >= STAGES.index("fuse"):
        gallery = RunGallery.open(config, run, say, stop or (lambda: False))
    setting = setting_of(config, gallery, out, len(source))
    opened = attempts.opened(run)
    rules = stage_rules(config, setting.weights, out or "", opened)
    if until == "publish":
        rules["publish"] = chain(rules["publish"], renewal(run, out, opened.get("publish", ()), verify))
    tables = [source] if isinstance(source, pa.Table) else source
    # Stages beyond `until` get their keys in the plan as well: they are what a later run would make.
    run.write_plan((planned(table, rules) for table in tables), about)
    on_start(setting, gallery)
    engine = Engine(
        run.store,
        make_stages(setting, until),
        pools=partial(layout, config),
        source=SOURCE,
        shard_items=config.engine.shard_photos,
        address=config.engine.ray_address,
        progress=progress,
        stop=stop,
        stop_after_errors=config.engine.stop_after_errors,
    )
    try:
        with gallery.reading() if gallery is not None else nullcontext():
            return engine.run(source, rules)
    except BrokenStageError as error:
        error.advice = (
            f"stopped (engine.stop_after_errors={config.engine.stop_after_errors}). Once the cause is mended, "
            f"`scol retry {run.url} --reason EXCEPTION` opens these photos again"
        )
        raise


def setting_of(config: Config, gallery: RunGallery | None, out: str | None, photos: int) -> Setting:
    """What the stages are made for.

    Args:
        gallery: of the run; None where it ends before ``fuse``.
        out: URL of OUT.
        photos: how many the run has.

    Raises:
        WeightsError: embedded weights are missing or altered.
        GalleryError: the gallery cannot be read.
    """
    if gallery is None:
        return Setting(config, stage_weights(config, ""), out=out, photos=photos)
    std, digest = None, ""
    if config.attack.enabled and config.inspect.unit == "std":
        std = gallery.std()
        digest = hashlib.sha256(std.tobytes()).hexdigest()[:16]
    weights = stage_weights(config, gallery.key_words, digest)
    return Setting(config, weights, gallery.url, gallery.info.fingerprint, std, out, photos)


def planned(table: pa.Table, rules: Mapping[str, KeyRule]) -> pa.Table:
    """Rows of the plan, of photos of the source table."""
    keys = derive(rules, table["key"].to_pylist())
    return pa.table([table["photo_id"], table["path"], table["key"], *keys.values()], PLAN_SCHEMA)
