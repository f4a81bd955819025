"""The chain of stages, for the engine.

Whoever imports this imports all stages. A worker does not: it unpickles ``declaration.load``, which imports one stage.
"""

from __future__ import annotations

from cluster import Stage
from pipelines.config.names import STAGES
from pipelines.stages import align, attack, fuse, invert, publish, strengthen, tune
from pipelines.stages.declaration import Setting

_MODULES = {m.__name__.rpartition(".")[2]: m for m in (align, invert, fuse, tune, attack, strengthen, publish)}


def make_stages(setting: Setting, until: str = "publish") -> list[Stage]:
    """The stages up to ``until``, without those that the run's configuration leaves out."""
    wanted = STAGES[: STAGES.index(until) + 1]
    return [_MODULES[name].stage(setting) for name in wanted if setting.config.has_stage(name)]
