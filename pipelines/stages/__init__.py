"""The stages of a run: thin shells that take rows, call the operators of `scol_ops` and give rows."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial

import numpy as np

from cluster import Operator, Stage
from pipelines.config.names import STAGES, VERSIONS
from pipelines.config.sections import Config
from pipelines.run.schemas import stage_schema
from pipelines.stages.rows import error_rows

__all__ = ["STAGES", "make_stages"]


def load(stage: str, *arguments) -> Operator:
    """A stage's operator.  Imported only now, so that a worker does not pay for what other pools need."""
    return importlib.import_module(f"pipelines.stages.{stage}").operator(*arguments)


def make_stages(
    config: Config,
    weights: Mapping[str, str],
    *,
    gallery: str | None = None,
    std: np.ndarray | None = None,
    out: str | None = None,
    photos: int = 1,
    until: str = "publish",
) -> list[Stage]:
    """The chain of stages for the engine, without ``strengthen`` where it has no rounds.

    Args:
        config: of the run.
        weights: by stage, what ``networks.fingerprints.stage_weights`` says.
        gallery: URL of the gallery; needed from ``fuse`` on.
        std: (L, 512) of the gallery, where ``inspect.unit`` is ``std``.
        out: URL of OUT; needed for ``publish``.
        photos: how many the run has.
        until: the last stage wanted.
    """
    limit = config.engine.face_seconds

    def stage(name: str, factory, pool: str, **options) -> Stage:
        return Stage(
            name=name,
            version=VERSIONS[name],
            schema=stage_schema(name, config.num_codes),
            factory=factory,
            error_rows=partial(error_rows, name, config.seed, layers=config.num_codes),
            row_id="face_id",
            pool=pool,
            **options,
        )

    # What is in hand when a run is stopped is lost, and these stages take a minute a face: one photo a part. Only runs
    # of very many photos get larger parts, since the next run has to look into each.
    slow = config.engine.shard_photos or min(16, max(1, photos // 5000))
    common = ["photo_id", "face_id", "status", "reason", "failed_stage", "seed"]
    geometry = ["landmarks", "box", "quad"]
    # Stages of many faces a photo keep each face's time themselves; the others have the engine's limit for a photo.
    chain = [
        stage(
            "align",
            partial(load, "align", config, weights["align"]),
            "photos",
            batch_items=config.engine.align_batch,
            item_seconds=limit,
        ),
        stage(
            "invert",
            partial(load, "invert", config, weights["invert"]),
            "generator",
            columns=[*common, "crop", *geometry],
        ),
        stage(
            "fuse",
            partial(load, "fuse", config, weights["fuse"], gallery),
            "gallery",
            columns=[*common, "code", "identity"],
            joins={"source": ["person_id"]},
            batch_items=16,
            item_seconds=limit,
        ),
        stage(
            "tune",
            partial(load, "tune", config, weights["tune"]),
            "generator",
            columns=[*common, "fused"],
            joins={"align": ["crop", *geometry]},
            shard_items=slow,
        ),
        stage(
            "attack",
            partial(load, "attack", config, weights["attack"], std),
            "generator",
            columns=[*common, "tuned", "refined"],
            joins={"align": ["crop", *geometry], "invert": ["code"], "fuse": ["target"]},
            shard_items=slow,
        ),
    ]
    if config.strengthen.rounds:
        joins = {"source": ["url"], "align": ["crop", *geometry, "width", "height"]}
        if config.attack.enabled:
            joins |= {"invert": ["code"], "fuse": ["target"]}
        if config.refine.id_lock:
            joins["fuse"] = [*joins.get("fuse", []), "fused"]
        chain.append(
            stage(
                "strengthen",
                partial(load, "strengthen", config, weights["strengthen"], std),
                "generator",
                columns=[*common, "protected"],
                joins=joins,
                shard_items=slow,
            )
        )
    joins = {"source": ["path", "url"], "align": ["crop", *geometry, "width", "height"]}
    chain.append(
        stage(
            "publish",
            partial(load, "publish", config, weights["publish"], out),
            "photos",
            columns=[*common, "protected"],
            item_seconds=limit,
            joins=joins | ({"attack": ["protected"]} if config.strengthen.rounds else {}),
        )
    )
    return [s for s in chain if STAGES.index(s.name) <= STAGES.index(until)]
