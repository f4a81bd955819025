"""Where photos come from and where they go: folders, globs, lists and tables, on disk or behind any fsspec URL.

`list_photos` yields one `SourceRow` for every file that it meets, sorted by relative path, so that nothing is lost
silently: a photo; an entry that cannot be used, with a typed reason; or a file that is skipped on purpose (`skipped`:
other kinds of files, which are neither copied nor changed, and hidden ones).

SRC, and the relative path of a photo:

- a folder, all depths: below the folder
- a glob (`*`, `?`, `[...]`, `**` for all depths): below its longest part without wildcards
- `LIST.txt`, UTF-8, a path or URL a line, empty lines ignored: as written; of an absolute path or URL, what lies below
  the list's folder, else all of it without the leading `/` or `scheme://`
- `TABLE.parquet`, `TABLE.csv`, column `path`, optional `person_id`: as in a list
- one photo: its name

In folders and globs files are told apart by suffix (`PHOTO_SUFFIXES`; raw and HEIC count as photos, and are refused
with a reason when they are decoded). What a list names is always taken for a photo.

Links are followed where they stay inside SRC; loops and links that lead outside get a row with a reason. A path that
could leave OUT, or name something else there, is refused (`safe_relative`).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import replace

from fsspec.utils import glob_translate

from pipelines.archive.entry import SourceRow
from pipelines.archive.folders import walk_local, walk_store
from pipelines.archive.lists import TABLE_SUFFIXES, list_row, list_rows, read_list, read_list_table
from pipelines.archive.paths import SourceError, files_of, local_path, relation_of, source_error_of


def split_glob(src: str) -> tuple[str, str]:
    """The longest folder without wildcards, and the pattern below it."""
    parts = src.split("/")
    first = next(i for i, part in enumerate(parts) if re.search(r"[*?\[]", part))
    return "/".join(parts[:first]) or ("/" if src.startswith("/") else "."), "/".join(parts[first:])


def kind_of(src: str) -> str:
    """folder, glob, list, table or photo. Raises SourceError NOT_FOUND, BAD_URL."""
    local = local_path(src)
    if local is not None:
        is_dir, exists = os.path.isdir(local), os.path.exists(local)
    else:
        files = files_of(src)
        try:  # not `isdir` and `exists`, which take every failure for a no
            is_dir, exists = files.info()["type"] == "directory", True
        except FileNotFoundError:
            is_dir = exists = False
        except OSError as e:
            raise source_error_of(e, src) from e
    if is_dir:
        return "folder"
    if not exists:
        if re.search(r"[*?\[]", src):
            return "glob"
        raise SourceError("NOT_FOUND", f"{src}: no such file or folder")
    suffix = os.path.splitext(src)[1].lower()
    return "list" if suffix == ".txt" else "table" if suffix in TABLE_SUFFIXES else "photo"


def list_photos(
    src: str, *, people_from: str | None = None, hidden: bool = False, out: str | None = None
) -> Iterator[SourceRow]:
    """One row for every entry of SRC, sorted by path (Unicode code points). See the module's text.

    `people_from="folder"`: the person is the name of the photo's folder, none for photos at the top; a table's own
    person_id goes before. `hidden`: also take hidden files and folders. `out`: rows whose file lies inside OUT become
    errors (IN_OUT), so that a list cannot make a run overwrite its own sources.
    Folders and globs are streamed; lists and tables are read whole, to sort them and to find duplicates.
    Raises SourceError where SRC as a whole cannot be used: NOT_FOUND, UNREADABLE, BAD_LIST, BAD_URL, DUPLICATE.
    """
    if people_from not in (None, "folder"):
        raise ValueError(f"people_from: `folder` or None, not {people_from!r}")
    kind = kind_of(src)
    if kind in ("folder", "glob"):
        base, pattern = (src, None) if kind == "folder" else split_glob(src)
        depth = None if pattern is None or "**" in pattern else pattern.count("/") + 1
        local = local_path(base)
        if local is not None:
            rows = walk_local(os.path.abspath(local), hidden, depth)
        else:
            rows = walk_store(files_of(base), hidden, depth)
        if pattern is not None:
            match = re.compile(glob_translate(pattern)).match
            rows = (
                row for row in rows if match(row.path) or (row.error and not row.skipped and os.path.isdir(row.url))
            )
    elif kind == "photo":
        local = local_path(src)
        base = os.path.dirname(os.path.abspath(local)) if local is not None else src.rsplit("/", 1)[0]
        rows = iter([list_row(1, src.rsplit("/", 1)[-1], None, base)])
    else:
        rows = iter(list_rows(src, (read_list if kind == "list" else read_list_table)(src)))

    @functools.lru_cache(4096)
    def folder_in_out(folder: str) -> bool:
        return relation_of(folder, out) in ("same", "inside")

    def in_out(url: str) -> bool:
        if local_path(url) is not None and os.path.islink(local_path(url)):
            return relation_of(url, out) in ("same", "inside")
        return folder_in_out(os.path.dirname(url))  # resolving every path by itself would be most of the listing's time

    for row in rows:
        if people_from == "folder" and row.person_id is None and "/" in row.path:
            row = replace(row, person_id=row.path.split("/")[-2])
        if out is not None and row.error is None and in_out(row.url):
            row = replace(row, error=str(SourceError("IN_OUT", "the photo lies inside OUT")))
        yield row


def lies_inside(one: str, other: str) -> bool:
    """Whether a folder or glob of photos lies below another folder; a tree does not lie inside itself.

    Raises:
        SourceError: as `list_photos`.
    """
    kind = kind_of(one)
    if kind not in ("folder", "glob") or kind_of(other) != "folder":
        return False
    return relation_of(one if kind == "folder" else split_glob(one)[0], other) == "inside"
