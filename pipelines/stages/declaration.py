"""What a stage is made for, and how it declares itself to the engine."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from cluster import Operator, Stage
from pipelines.config.names import VERSIONS
from pipelines.config.sections import Config
from pipelines.run.schemas import stage_schema
from pipelines.stages.rows import error_rows

COMMON = ("photo_id", "face_id", "status", "reason", "failed_stage", "seed")
GEOMETRY = ("landmarks", "box", "quad")


@dataclass(frozen=True, eq=False)
class Setting:
    """What the stages of a run are made for.

    Attributes:
        config: of the run.
        weights: by stage, what ``networks.fingerprints.stage_weights`` says.
        gallery: URL of the gallery; needed from ``fuse`` on.
        gallery_fingerprint: of the gallery that the run was planned with.
        std: (L, 512) of the gallery, where ``inspect.unit`` is ``std``.
        out: URL of OUT; needed for ``publish``.
        photos: how many the run has.
    """

    config: Config
    weights: Mapping[str, str]
    gallery: str | None = None
    gallery_fingerprint: str | None = None
    std: np.ndarray | None = field(default=None, repr=False)
    out: str | None = None
    photos: int = 1

    @property
    def slow_shard(self) -> int:
        """Photos in a part of a stage that takes a minute a face: what is in hand when a run is stopped is lost, so it
        is one photo. Only runs of very many photos get larger parts, since the next run has to look into each."""
        return self.config.engine.shard_photos or min(16, max(1, self.photos // 5000))


def load(name: str, *arguments: Any) -> Operator:
    """A stage's operator.  Imported only now, so that a worker does not pay for what other pools need."""
    return importlib.import_module(f"pipelines.stages.{name}").operator(*arguments)


def declared(
    name: str,
    setting: Setting,
    *arguments: Any,
    pool: str,
    columns: Sequence[str] | None,
    joins: Mapping[str, Sequence[str]] | None = None,
    **options: Any,
) -> Stage:
    """The stage ``pipelines.stages.NAME`` for the engine.

    Args:
        name: of the stage and of its module, whose ``operator(config, weights, *arguments)`` loads the networks.
        setting: of the run.
        arguments: further ones of ``operator``.
        pool: whose actors do it (``pools.layout``).
        columns: that it reads of the stage before, besides `COMMON`; None for all.
        joins: {earlier stage: columns read of it}.
        options: of ``cluster.Stage``.
    """
    config = setting.config
    return Stage(
        name=name,
        version=VERSIONS[name],
        schema=stage_schema(name, config.num_codes),
        factory=partial(load, name, config, setting.weights[name], *arguments),
        error_rows=partial(error_rows, name, config.seed, layers=config.num_codes),
        row_id="face_id",
        pool=pool,
        columns=None if columns is None else [*COMMON, *columns],
        joins=joins or {},
        **options,
    )
