"""Lists and tables that name photos."""

from __future__ import annotations

import itertools
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from cluster.remote import PROTOCOL
from pipelines.archive.entry import SourceRow, failed_row, modified_of, stat_row
from pipelines.archive.paths import (
    SourceError,
    files_of,
    is_inside,
    local_path,
    open_source,
    safe_relative,
    source_error_of,
)

TABLE_SUFFIXES = (".parquet", ".pq", ".csv")


def read_list(src: str) -> Iterator[tuple[str, str | None]]:
    with open_source(src) as f:
        text = f.read().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    for line in text.split("\n"):
        line = line.removesuffix("\r")
        if line.strip():
            yield line, None


def read_list_table(src: str) -> Iterator[tuple[str, str | None]]:
    try:
        with open_source(src) as f:
            if src.lower().endswith(".csv"):
                options = pa.csv.ConvertOptions(
                    column_types={"path": pa.string(), "person_id": pa.string()},
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=True,
                    null_values=[""],
                )
                table = pa.csv.read_csv(f, convert_options=options)
            else:
                names = pa.parquet.read_schema(f).names
                f.seek(0)
                table = pa.parquet.ParquetFile(f).read(
                    columns=[n for n in ("path", "person_id") if n in names], use_threads=False
                )
        if "path" not in table.column_names:
            raise SourceError("BAD_LIST", f"{src}: no column `path`")
        paths = table["path"].cast(pa.string())
        people = table["person_id"].cast(pa.string()) if "person_id" in table.column_names else itertools.repeat(None)
        for path, person in zip(paths, people, strict=False):
            yield path.as_py() or "", person.as_py() if person is not None else None
    except pa.ArrowException as e:
        raise SourceError("BAD_LIST", f"{src}: {e}") from e


def list_row(number: int, entry: str, person: str | None, base: str) -> SourceRow:
    """`base`: the list's folder, an absolute local path or a URL without a slash at its end."""
    if not entry:
        return SourceRow(f"(row {number})", "", error=str(SourceError("EMPTY_PATH", "the row has no path")))
    local_base = local_path(base)
    if PROTOCOL.match(entry) and local_path(entry) is None:
        url = entry
        path = entry[len(base) + 1 :] if entry.startswith(base + "/") else entry.split("://", 1)[-1].lstrip("/")
    elif local_base is None and not entry.startswith(("/", "file://")):
        path, url = entry, f"{base}/{entry}"
    else:
        entry = local_path(entry) or entry
        path = entry
        if os.path.isabs(entry):
            path = (
                os.path.relpath(entry, local_base) if local_base and is_inside(entry, local_base) else entry.lstrip("/")
            )
        url = os.path.join(local_base or "/", entry)
    try:
        path = safe_relative(path)
    except SourceError as e:
        not_utf8 = any(unicodedata.category(c) == "Cs" for c in path)
        error = SourceError("NAME_NOT_UTF8", "the name is not valid UTF-8; rename the file") if not_utf8 else e
        return replace(failed_row(entry, url, error), person_id=person)
    if local_path(url) is not None:
        return replace(stat_row(path, os.path.abspath(url)), person_id=person)
    try:
        info = files_of(url).info()
        if info["type"] != "file":
            raise SourceError("NOT_A_FILE", "a folder")
    except SourceError as e:
        return SourceRow(path, url, person_id=person, error=str(e))
    except OSError as e:
        return SourceRow(path, url, person_id=person, error=str(source_error_of(e, "file")))
    except Exception as e:  # each store's client has errors of its own
        return SourceRow(path, url, person_id=person, error=f"READ_FAILED: {type(e).__name__}: {e}")
    return SourceRow(path, url, info.get("size"), modified_of(info), person)


def list_rows(src: str, entries: Iterator[tuple[str, str | None]]) -> list[SourceRow]:
    local = local_path(src)
    base = os.path.dirname(os.path.abspath(local)) if local is not None else src.rsplit("/", 1)[0]
    try:
        rows = [list_row(i, entry, person, base) for i, (entry, person) in enumerate(entries, 1)]
    except OSError as e:
        raise source_error_of(e, src) from e
    twice = [path for path, n in Counter(row.path for row in rows).items() if n > 1]
    if twice:
        names = ", ".join(sorted(twice)[:5])
        raise SourceError("DUPLICATE", f"{src} names {len(twice)} path(s) more than once: {names}")
    return sorted(rows, key=lambda row: row.path)
