"""Variants of our method for an ablation: named settings on top of a profile, built in by groups or from a TOML file.

A file has a section for each variant, with settings as `scol config` names them:

    ["k5-wide"]
    fuse.k = 5
    tune.parameters = "all"
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config.load import ConfigError, read_toml
from pipelines.config.names import NO_LOOP
from pipelines.experiments.tables import ExperimentError

OWN = "own"  # group of variants from a file
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+,-]{0,79}")  # a folder is named so


class VariantError(ExperimentError):
    """Variants that are not there, or cannot be used. `problems`: all mistakes, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class Variant:
    """`sets`: `section.key=value` as `--set` takes them, on top of the profile; `group`: of built-in ones."""

    name: str
    sets: tuple[str, ...] = ()
    group: str = OWN


BASE = Variant("base", (), "base")
# Of all variants unless they say otherwise: the attack works through the encoder, whose trunk could not judge then.
# The closed loop would make up for what a variant lacks.
COMMON = ("attack.enabled=false", *NO_LOOP)


def _group(about: str, group: str, **named: str) -> tuple[str, tuple[Variant, ...]]:
    return about, tuple(Variant(name, tuple(sets.split()), group) for name, sets in named.items())


def _attack(levels: int) -> str:  # steps of a quarter of the bound, as the profiles have them
    return f"attack.enabled=true attack.eps={levels / 255} attack.step_size={levels / 4 / 255}"


_TUNED = 30  # steps of the generator where a variant asks for them and the profile has none
_LOCKED = f"tune.steps={_TUNED} refine.start=0.3 tune.id_lock=0.3 refine.id_lock=1"

# Group -> what is asked, and its variants: parts of the method that are left out, or done otherwise. Settings that are
# the profile's own are among them: what a profile has may change, and what settings have in common is made once.
GROUPS = {
    "start": _group(
        "where the search in pixels starts: so much of a tuned change, in place of the photo",
        "start",
        **{f"refine.start={share}": f"tune.steps={_TUNED} refine.start={share}" for share in (0.3, 0.8)},
    ),
    "tune": _group(
        "generator tuning: none; as the start, by the lock to the fused identity in place of the hinge, or beside it; "
        "alone, by neither",
        "tune",
        **{
            "tune=off": "tune.steps=0 refine.start=0",
            "lock": f"{_LOCKED} tune.hinge=0 refine.hinge=0",
            "hinge+lock": f"{_LOCKED} tune.hinge=0.3",
            "neither": f"tune.steps={_TUNED} tune.id_lock=0 tune.hinge=0 refine.steps=0",
        },
    ),
    "refine": _group(
        "refinement in pixels: none, the tuned face itself; nobody looks at it, within its bound alone; without bound; "
        "in colour; by features that see no small face",
        "refine",
        **{
            "refine=off": f"tune.steps={_TUNED} refine.steps=0",
            "seen=off": "refine.seen=0",
            "limit=off": "refine.limit=0",
            "colour": "refine.chroma=1",
            "shrink=off": "refine.shrink=0",
        },
    ),
    "sight": _group(
        "how much what is seen counts: less, more; of an enlarged photo; finer than the photo's pixels",
        "sight",
        **{
            "seen=0.6": "refine.seen=0.6",
            "seen=2.5": "refine.seen=2.5",
            "zoom=2": "refine.zoom=2",
            "sigma=0": "refine.residual_sigma=0",
        },
    ),
    "direction": _group(
        "where to, from the photo: towards the fused identity as well",
        "direction",
        **{"direction=fused": "refine.id_lock=0.3"},
    ),
    "mask": _group(
        "where a face may change: the face alone, without hair and what is beside it; features as much as the rest",
        "mask",
        **{"mask.scale=1": "mask.scale=1", "mask.features=1": "mask.features=1"},
    ),
    "attack": _group(
        "identity inversion attack, of 255; the encoder's trunk is inside and does not judge these",
        "attack",
        **{"attack=off": "attack.enabled=false"} | {f"attack.eps={levels}": _attack(levels) for levels in (2, 4, 8)},
    ),
}
DEFAULT = ("refine.start=0.3", "lock", "seen=off", "mask.scale=1", "refine=off")  # where nothing is asked for


def built_in() -> dict[str, Variant]:
    """By name, the base first."""
    return {v.name: v for v in (BASE, *(v for _, found in GROUPS.values() for v in found))}


def select(names: Sequence[str] = (), groups: Sequence[str] = (), file: str | Path | None = None) -> list[Variant]:
    """The base, then the variants asked for, each once.

    Args:
        names: of built-in variants, or of the file's.
        groups: all variants of these.
        file: TOML of own variants; all of them are taken where `names` and `groups` are empty.

    Raises:
        VariantError: a name or group that is not there; a file that cannot be used.
    """
    own = {} if file is None else {v.name: v for v in read_file(file)}
    known = built_in()
    problems = [f"{file}: {name}: this is the name of a built-in variant" for name in own if name in known]
    known |= own
    problems += [_unknown("variant", name, known) for name in names if name not in known]
    problems += [_unknown("group", name, GROUPS) for name in groups if name not in GROUPS]
    if problems:
        raise VariantError(problems)
    if not names and not groups:
        names = tuple(own) if own else DEFAULT
    found = [BASE, *(known[name] for name in names), *(v for group in groups for v in GROUPS[group][1])]
    return list({v.name: v for v in found}.values())


def _unknown(what: str, name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"unknown {what} {name!r}" + (f", did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}")


def read_file(file: str | Path) -> list[Variant]:
    """Variants of a TOML file, in its order.

    Whether the settings exist is found when they are used (`ablation.splits`).

    Raises:
        VariantError: no TOML, a name that no folder can have, a section without settings.
    """
    try:
        tree = read_toml(file)
    except ConfigError as error:
        raise VariantError(error.problems) from error
    problems, found = [], []
    for name, settings in tree.items():
        if not isinstance(settings, Mapping):
            problems.append(f"{file}: {name}: a section is expected, with the variant's settings in it")
        elif not _NAME.fullmatch(name):
            problems.append(f"{file}: {name!r}: a variant is named by letters, digits and . _ = + , - (at most 80)")
        elif not settings:
            problems.append(f"{file}: {name}: no settings, so it would be the base")
        else:
            found.append(Variant(name, tuple(_flat(settings))))
    if not tree:
        problems.append(f"{file}: no variant")
    if problems:
        raise VariantError(problems)
    return found


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}={json.dumps(value, default=str)}"
