"""The configuration for people: as a TOML file, and as ``docs/configuration.md``."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pipelines.config.load import PROFILES, section_types
from pipelines.config.sections import Config


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def fields() -> Iterator[tuple[str, str, Any]]:
    """(section or "", key, pydantic field) of every setting."""
    sections = section_types()
    for name, info in Config.model_fields.items():
        if name in sections:
            for key, inner in sections[name].model_fields.items():
                yield name, key, inner
        else:
            yield "", name, info


def type_words(annotation: Any) -> str:
    """A field's type for people: ``int``, ``a | b``, ``list of words``."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return type_words(typing.get_args(annotation)[0])
    if origin is Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else type_words(a) for a in typing.get_args(annotation))
    if origin is tuple:
        arguments = typing.get_args(annotation)
        return "list of " + (
            "words" if arguments[0] is str else "two integers" if Ellipsis not in arguments else "numbers"
        )
    return {int: "integer", float: "number", bool: "true | false", str: "text"}.get(annotation, str(annotation))


def range_words(info: Any) -> str:
    """A field's range: ``0 <= x <= 1``; empty where it has none."""
    low = high = ""
    for limit in info.metadata:
        for name, sign in (("ge", "<="), ("gt", "<")):
            if getattr(limit, name, None) is not None:
                low = f"{getattr(limit, name):g} {sign} "
        for name, sign in (("le", "<="), ("lt", "<")):
            if getattr(limit, name, None) is not None:
                high = f" {sign} {getattr(limit, name):g}"
    return f"{low}x{high}" if low or high else ""


def to_toml(config: Config) -> str:
    """The configuration as a TOML file with a comment above every key; ``load_config(file=...)`` reads it back."""
    lines, current = [], ""
    for section, key, info in fields():
        if section != current:
            lines += ["", f"# {' '.join((section_types()[section].__doc__ or '').split())}", f"[{section}]"]
            current = section
        value = getattr(getattr(config, section) if section else config, key)
        limits = range_words(info)
        lines.append(f"# {info.description}" + (f" ({limits})" if limits else ""))
        lines.append(f"{key} = {_toml(value) if value is not None else chr(34) + 'none' + chr(34)}")
    return "\n".join(lines).strip() + "\n"


def to_markdown() -> str:
    """``docs/configuration.md``: every key with type, range, default and what the profiles change."""
    lines = [
        "# Configuration",
        "",
        "Written by `scol config --markdown > docs/configuration.md`. Later layers win: defaults, `--profile`,",
        "`--config FILE` (TOML, sections as tables), `--set section.key=value`. Unknown keys are errors.",
        "Profile `standard` is the defaults.",
    ]
    current = None
    profiles = [p for p in PROFILES if p != "standard"]
    for section, key, info in fields():
        if section != current:
            about = " ".join((section_types()[section].__doc__ or "").split()) if section else "Top level."
            lines += [
                "",
                f"## {section or 'run'}",
                "",
                about,
                "",
                "| key | type | range | default | " + " | ".join(profiles) + " | meaning |",
                "|---" * (5 + len(profiles)) + "|",
            ]
            current = section
        name = f"{section}.{key}" if section else key
        default = "none" if info.default is None else _toml(info.default)
        changes = [f"`{_toml(PROFILES[p][name])}`" if name in PROFILES[p] else "" for p in profiles]
        cells = [
            f"`{name}`",
            type_words(info.annotation),
            range_words(info),
            f"`{default}`",
            *changes,
            info.description,
        ]
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"
