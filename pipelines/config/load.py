"""The configuration from its layers, later ones win: defaults (= profile ``standard``), profile, TOML file, ``--set``.

Everything is checked before any model loads.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.config.names import ENCODER
from pipelines.config.sections import Config, Section

# What differs from the fields' defaults, in one place.
PROFILES: dict[str, dict[str, Any]] = {
    "quick": {
        "gallery.synthetic": 5000,
        "refine.steps": 40,
        "refine.lr": 0.04,
        "strengthen.rounds": 0,
        "strengthen.looks": 2,
        "engine.face_seconds": 300.0,
    },
    "standard": {},
    # Less to be seen, and fewer hidden (docs/results.md has both).
    "faint": {
        "mask.features": 0.75,
        "refine.steps": 160,
        "refine.seen": 1.7,
        "refine.chroma": 0.2,
        "publish.min_jod": 9.35,
    },
    # Not accepted as the very photo either, for more to be seen.
    "strong": {
        "refine.seen": 0.8,
        "strengthen.rounds": 2,
        "publish.max_ism": "threshold",
        "publish.min_jod": 9.0,
    },
    "paper": {
        # The paper's networks, which the user brings (docs/models.md), and its own reading: the encoder alone is the
        # identity feature, no hinge, no refinement. It gives lambda, tau and eps; the steps are ours.
        "generator": "stylegan2-1024",
        "encoder": "e4e-1024",
        "mask.scale": 1.0,
        "mask.features": 1.0,
        "tune.perceptual": "auto",
        "inspect.tau": 3.0,
        "tune.steps": 450,
        "tune.lr": 3e-4,
        "tune.parameters": "all",
        "tune.bf16": False,
        "tune.id_lock": 1.0,
        "tune.identity": (ENCODER,),
        "tune.hinge": 0.0,
        "tune.diversity": 0.0,
        "tune.residual_sigma": 0.0,
        "refine.steps": 0,
        "attack.enabled": True,
        "attack.eps": 8 / 255,
        "attack.steps": 10,
        "attack.step_size": 2 / 255,
        "strengthen.rounds": 0,
        "strengthen.looks": 0,
        "publish.min_jod": 0.0,
        "engine.face_seconds": 1800.0,
    },
}


class ConfigError(ValueError):
    """Mistakes in a configuration, all of them; ``problems`` is one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


def section_types() -> dict[str, type[Section]]:
    return {
        n: f.annotation
        for n, f in Config.model_fields.items()
        if isinstance(f.annotation, type) and issubclass(f.annotation, Section)
    }


def known_keys() -> list[str]:
    """Every key in dotted form, in the order of the classes."""
    sections = section_types()
    return [
        key
        for name in Config.model_fields
        for key in ([f"{name}.{k}" for k in sections[name].model_fields] if name in sections else [name])
    ]


def _unknown(key: str) -> str:
    keys = known_keys()
    near = difflib.get_close_matches(key, keys, 1, cutoff=0.5)
    if not near and "." not in key:  # a bare `steps` is most likely some section's
        near = [k for k in keys if k.split(".")[-1] == key][:1]
    return f"{key}: unknown key" + (f", did you mean {near[0]}?" if near else "")


def _flatten(tree: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    sections, flat, problems = section_types(), {}, []
    for name, value in tree.items():
        if name in sections:
            if isinstance(value, Mapping):
                flat |= {f"{name}.{k}": v for k, v in value.items()}
            else:
                problems.append(f"{where}{name}: a section, with keys of its own ({name}.KEY)")
        else:
            flat[name] = value
    return flat, problems


def _parse_set(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError([f"--set {text}: KEY=VALUE expected, for example tune.steps=200"])
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value.strip()


def read_toml(file: str | Path) -> dict[str, Any]:
    """The tree of a TOML file.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{file}: {error.strerror or error}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: not TOML: {error}"]) from error


def load_config(
    profile: str | None = None, file: str | Path | None = None, sets: Sequence[str] = (), **overrides: Any
) -> Config:
    """The configuration from its layers.

    Args:
        profile: one of ``PROFILES``; None takes the file's key ``profile``, or ``standard``.
        file: TOML with the sections as tables; may name its ``profile``.
        sets: ``section.key=value``, the value as in TOML (or a bare word; ``a,b`` for a list; ``none``).
        overrides: ``section__key=value``, applied last, None is left out.

    Raises:
        ConfigError: all mistakes at once, each with its key; an unknown key names the nearest one.
    """
    problems: list[str] = []
    from_file: dict[str, Any] = {}
    if file is not None:
        tree = read_toml(file)
        named = tree.pop("profile", None)
        profile = profile or named
        from_file, problems = _flatten(tree, f"{file}: ")
    profile = profile or "standard"
    if profile not in PROFILES:
        near = difflib.get_close_matches(str(profile), PROFILES, 1)
        hint = f", did you mean {near[0]}?" if near else f"; there are {', '.join(PROFILES)}"
        raise ConfigError([f"profile: unknown profile {profile!r}{hint}"])
    flat = {**PROFILES[profile], **from_file}
    for text in sets:
        try:
            key, value = _parse_set(text)
            flat[key] = value
        except ConfigError as error:
            problems += error.problems
    flat |= {k.replace("__", "."): v for k, v in overrides.items() if v is not None}

    known = set(known_keys())
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        if key not in known:
            problems.append(_unknown(key))
            continue
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems += [_words(e) for e in error.errors()]
    if problems:
        raise ConfigError(problems)
    return config


def _words(error: Mapping[str, Any]) -> str:
    # Branches of unions appear in the location as words of pydantic's own; only our names are shown.
    names = [str(p) for p in error["loc"] if isinstance(p, str) and (p in Config.model_fields or p.isidentifier())]
    key = ".".join(names[:2])
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] == "value_error" else f", got {error['input']!r}"
    return f"{key}: {message}{given}" if key else f"{message}{given}"
