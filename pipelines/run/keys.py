"""The photos' keys at every stage, as rules: each follows from the key at the stage before (docs/design.md).

With them a plan of any number of photos needs no list of keys in memory (`cluster.keys.KeyRule`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from types import MappingProxyType

from cluster import KeyRule, hash_key, hash_keys
from pipelines.config.names import STAGES, VERSIONS
from pipelines.config.sections import Config
from pipelines.run import attempts


def stage_rules(
    config: Config,
    weights: Mapping[str, str],
    out: str = "",
    opened: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> dict[str, KeyRule]:
    """By stage, the rule from the keys at the stage before; all keys are known before anything runs. A stage that the
    run leaves out has the keys of the one before.

    Args:
        opened: of ``run.attempts.opened``.
    """
    rules: dict[str, KeyRule] = {}
    for stage in STAGES:
        if not config.has_stage(stage):  # left out: the next one follows from the one before
            rules[stage] = _same
            continue
        # What is the same for all photos is hashed once.
        common = hash_key(
            stage, VERSIONS[stage], config.canonical(stage), weights[stage], out if stage == "publish" else ""
        )
        rules[stage] = partial(hash_keys, [common])
        if opened.get(stage):
            rules[stage] = partial(_current, rules[stage], opened[stage])
    return rules


def _same(keys: list[str]) -> list[str]:
    return keys


def _current(rule: KeyRule, opened: Collection[str], keys: list[str]) -> list[str]:
    return [attempts.current(key, opened) for key in rule(keys)]


def chain(first: KeyRule, second: KeyRule) -> KeyRule:
    """`second` after `first`."""
    return lambda keys: second(first(keys))


def derive(rules: Mapping[str, KeyRule], keys: list[str]) -> dict[str, list[str]]:
    """Keys at every stage, of photos with these at the source."""
    found = {}
    for stage, rule in rules.items():
        keys = found[stage] = rule(keys)
    return found
