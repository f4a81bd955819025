"""What of a configuration depends on the model store is settled here, before anything runs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipelines.config.load import ConfigError
from pipelines.config.names import PERCEPTUAL_ORDER
from pipelines.config.sections import Config
from pipelines.networks.fingerprints import open_store
from pipelines.networks.store import Record, embedded_probe, kept_probe
from scol_ops.models import catalogue as public_models
from scol_ops.models import w_space


def resolve(config: Config, say: Callable[[str], None] = lambda text: None) -> Config:
    """The configuration with everything settled that depends on the model store, and the store's place made absolute.

    Every public model that the run needs is there, and generator and encoder are of one W space, or this says so
    before anything runs.  ``tune.perceptual = auto`` becomes what is there. Applied again it changes nothing.

    Raises:
        MissingModelError: a model is not in the store; where to get it.
        ModelStoreError: see ``ModelStore.record``.
        ConfigError: W spaces that differ; both models are named.
    """
    found = config.tune.perceptual
    named = (
        config.generator,
        config.encoder,
        *config.tune.identity,
        *config.refine.identity,
        config.publish.judge,
        found,
    )
    needed = [name for name in dict.fromkeys(named) if name in public_models.CARDS]
    if not needed and found != "auto":
        return config
    store = open_store(config.engine.models)
    records = {name: store.record(name) for name in needed}
    _same_w(config, records, say)
    if found == "auto":
        found = next((name for name in PERCEPTUAL_ORDER if store.has(name)), "ssim")
        say(f"tuning loss: {found}" + ("" if found != "ssim" else " (LPIPS is not in the model store)"))
    return config.model_copy(
        update={
            "engine": config.engine.model_copy(update={"models": store.url}),
            "tune": config.tune.model_copy(update={"perceptual": found}),
        }
    )


def _same_w(config: Config, records: dict[str, Record], say: Callable[[str], None]) -> None:

    names = {"generator": config.generator, "encoder": config.encoder}
    if not any(name in records for name in names.values()):
        return
    embedded = kept_probe(embedded_probe())
    probes = {}
    for role, name in names.items():
        kept = records[name].w_probe if name in records else embedded.tolist()
        if kept is None:
            say(f"{role} {name!r}: its file brings no mapping network, so nobody can tell whether its W space fits")
            return
        probes[role] = torch.tensor(kept)
    if not w_space.agree(probes["generator"], probes["encoder"]):
        source = {r: f" (from {records[n].source})" if n in records else " (embedded)" for r, n in names.items()}
        raise ConfigError([
            f"generator {config.generator!r}{source['generator']} and encoder {config.encoder!r}{source['encoder']} "
            "are of "
            "different W spaces: their mapping networks lead to other codes"
        ])  # fmt: skip
