"""Pages of one file, made of Jinja templates under a strict policy.

- Every value that a template writes is escaped, and characters that hide or reverse text are spelled out; the filters
  with which a template could avoid that do not exist. Only what templates made themselves is written as it is.
- A content security policy allows nothing but the page's own style, script and embedded pictures.
- A template lies beside the Python file that gathers its data; its name is its path within `pipelines`.
"""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from pipelines.report.charts import number
from pipelines.report.pictures import AMPLIFICATION, HEAT_TOP, PICTURE_SIDE, heat_scale

# Written out so that a name can neither hide a part of itself nor reverse the line that it stands in.
_SPELLED = {c: f"\\u{c:04x}" for c in (*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F),
                                       *range(0x2066, 0x206A), 0xFEFF, *range(0xD800, 0xE000))}
_UNSAFE_FILTERS = ("safe", "e", "escape", "forceescape", "tojson", "urlize", "xmlattr")  # what they make is not spelled


def _spelled(value: object) -> Any:
    """A value as text without invisible characters, which Jinja then escapes; what templates made stays as it is."""
    return value if isinstance(value, Markup) else str(value).translate(_SPELLED)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines", ""), autoescape=True, finalize=_spelled, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    for name in _UNSAFE_FILTERS:
        del environment.filters[name]
    environment.filters |= {"number": number, "whole": "{:,}".format}
    environment.globals |= {"amplification": AMPLIFICATION, "picture_side": PICTURE_SIDE}
    environment.globals |= {"heat_top": HEAT_TOP, "heat_scale": heat_scale()}
    return environment


@functools.cache
def _asset(kind: str, file: str) -> dict[str, Any]:
    """A page's own `style` or `script`, and its hash for the content security policy."""
    text = resources.files("pipelines").joinpath(file).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {kind: Markup(text), f"{kind}_hash": f"sha256-{digest}"}


def render(template: str, style: str = "report/report.css", script: str = "report/report.js", **values: Any) -> str:
    """A page.

    Args:
        template: its path within `pipelines`; it extends `report/base.html`, which says what it must set, or writes
            the policy, `style` and `script` itself.
        style, script: paths within `pipelines` of the page's own style and script.
        values: what it writes, untrusted text as it is.

    Raises:
        jinja2.TemplateError: the template has a mistake, or lacks a value.
    """
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    own = _asset("style", style) | _asset("script", script)
    return _environment().get_template(template).render(values | own, now=now)


def part(macro: str, *values: Any) -> str:
    """What a macro of `report/parts.html` makes of some values."""
    return str(getattr(_environment().get_template("report/parts.html").module, macro)(*values))
