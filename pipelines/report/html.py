"""Pages of one file: untrusted text made safe, pictures embedded, histograms drawn, under a strict policy.

A content security policy allows nothing but the page's own style, script and embedded pictures.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import html
from collections.abc import Sequence
from importlib import resources

# Written out so that a name can neither hide a part of itself nor reverse the line that it stands in.
_SPELLED = {c: f"\\u{c:04x}" for c in (*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F),
                                       *range(0x2066, 0x206A), 0xFEFF, *range(0xD800, 0xE000))}


def escape(text: object) -> str:
    """Untrusted text as HTML, for content and for quoted attributes: escaped, invisible characters spelled out."""
    return html.escape(str(text).translate(_SPELLED), quote=True)


def name_html(text: object) -> str:
    """A path or name, kept apart from the direction of the text about it."""
    return f'<bdi class="name">{escape(text)}</bdi>'


def _asset(name: str) -> str:
    return resources.files("pipelines.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def document(title: str, heading: str, header: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """The page.

    Args:
        title: plain text; heading: plain text; header: HTML below it.
        sections: (id, plain title, HTML).
        footer: who wrote it, after "Written TIME".
    """
    style, script = _asset("report.css"), _asset("report.js")
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    nav = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, name, _ in sections)
    body = "".join(f'<section aria-labelledby="{key}"><h2 id="{key}">{name}</h2>{content}</section>'
                   for key, name, content in sections)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f'<a class=skip href="#{sections[0][0]}">Skip to the content</a>'
        f"<header><h1>{escape(heading)}</h1>{header}"
        f'<nav aria-label="Sections"><ul>{nav}</ul></nav></header><main>{body}</main>'
        f"<footer>Written {now} {footer}.</footer><script>{script}</script></body></html>\n"
    )
