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
COMMON = ("attack.enabled=false", "strengthen.rounds=0")


def _values(key: str, *values: Any) -> dict[str, tuple[str, ...]]:
    return {f"{key}={value}": (f"{key}={value}",) for value in values}


def _features(*names: str) -> tuple[str, ...]:
    joined = ",".join(names)
    return f"tune.identity={joined}", f"refine.identity={joined}"


def _attack(levels: int, *more: str) -> tuple[str, ...]:
    # Steps of a quarter of the bound, as the profiles have them.
    return "attack.enabled=true", f"attack.eps={levels / 255}", f"attack.step_size={levels / 4 / 255}", *more


_EOT = ("attack.diversity=1", "attack.blur=true", "attack.jpeg_quality=50,95")

# Group -> what is asked, and its variants. Those that are the profile's own setting are among them: what a profile has
# may change, and work that settings have in common is done once.
_GROUPS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "layers": (
        "which layers take the fused code",
        {
            "fuse.layers=0-3": ("fuse.layers=0,1,2,3",),
            "fuse.layers=4-7": ("fuse.layers=4,5,6,7",),
            "fuse.layers=8-15": ("fuse.layers=" + ",".join(map(str, range(8, 16))),),
            "fuse.layers=all": ("fuse.layers=none",),
        },
    ),
    "k": ("how many codes are fused", _values("fuse.k", 1, 10, 50)),
    "gallery": (
        "how similar codes are found, and among which",
        {
            **_values("gallery.similarity", "centred", "cosine", "raw"),
            **_values("gallery.synthetic", 2000, 20000),
            **_values("gallery.truncation", 0.7),
        },
    ),
    "parameters": ("which generator weights are tuned", _values("tune.parameters", "all", "convolutions", "late")),
    "identity": (
        "what the identity is measured by; a feature that judges is replaced by a recogniser that is not inside",
        {
            "identity=one": _features("mobilefacenet"),
            "identity=two": _features("mobilefacenet", "dlib_resnet"),
            "identity=encoder": _features("encoder"),
            "identity=two+encoder": _features("mobilefacenet", "dlib_resnet", "encoder"),
        },
    ),
    "weighting": (
        "hinge on the original's identity against the lock to the fused one",
        {
            "hinge": ("tune.id_lock=0", "tune.hinge=0.3", "refine.id_lock=0", "refine.hinge=0.35"),
            "lock": ("tune.id_lock=0.3", "tune.hinge=0", "refine.id_lock=0.35", "refine.hinge=0"),
            "hinge+lock": ("tune.id_lock=0.3", "tune.hinge=0.3", "refine.id_lock=0.35", "refine.hinge=0.35"),
            "neither": ("tune.id_lock=0", "tune.hinge=0", "refine.steps=0"),
        },
    ),
    "refine": (
        "refinement in pixels: whether, from where, how smooth, and how much of it may be seen",
        {
            "refine=off": ("refine.steps=0",),
            "tune=off": ("tune.steps=0", "refine.start=0"),
            **_values("refine.start", 0, 0.3, 0.8),
            **_values("refine.residual_sigma", 0, 1, 3),
            **_values("refine.chroma", 0, 1),
            **_values("refine.flip_target", 0.05, 0.08),
            "fine": (  # a setting before: finer change, in colours too, and less of it
                "refine.residual_sigma=1", "refine.chroma=1", "refine.flip_target=0.065", "refine.visible_weight=200",
            ),
            "few-places": (  # the one before that: stronger changes of fewer places
                "refine.residual_sigma=1", "refine.chroma=1", "refine.start=0.8", "refine.flip_weight=2",
                "refine.flip_target=0.05", "refine.visible_weight=100",
            ),
            "visible=flip": ("refine.visible_weight=0", "refine.flip_weight=2"),
            "visible=squared": ("refine.flip_weight=0", "refine.visible_weight=300"),
        },
    ),
    "robust": (
        "expectation over transformations in the refinement, and in the tuning",
        {
            **_values("refine.diversity", 0, 1),
            **_values("refine.photo_scale", "false"),
            **_values("refine.blur", "false"),
            "refine.jpeg=off": ("refine.jpeg_quality=none",),
            "tune=eot": ("tune.blur=true", "tune.jpeg_quality=60,95"),
            "eot=off": ("refine.photo_scale=false", "refine.blur=false", "refine.jpeg_quality=none"),
        },
    ),
    "attack": (
        "identity inversion attack, of 255; the encoder's trunk is inside and does not judge these",
        {
            "attack=off": ("attack.enabled=false",),
            "attack.eps=2": _attack(2),
            "attack.eps=4": _attack(4),
            "attack.eps=8": _attack(8),
            "attack.eps=2+eot": _attack(2, *_EOT),
            "attack.eps=8+eot": _attack(8, *_EOT),
            "attack.eps=8+momentum": _attack(8, "attack.momentum=1"),
            "attack.eps=8+ti": _attack(8, "attack.translation_sigma=3"),
            "attack.eps=8+target": _attack(8, "fuse.target=random"),  # another one than the least similar
            "attack.eps=8+tau": _attack(8, "inspect.tau=1"),  # fewer components
        },
    ),
}
GROUPS = {
    group: (about, tuple(Variant(name, sets, group) for name, sets in found.items()))
    for group, (about, found) in _GROUPS.items()
}
# Asked for by default: one question each about codes, features, weights of the losses, and refinement.
DEFAULT = ("fuse.k=1", "identity=one", "lock", "refine=off", "visible=squared", "eot=off")


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
