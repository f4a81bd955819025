"""Walks of folders, local and in stores."""

from __future__ import annotations

import os
from collections.abc import Iterator

from cluster.files import Files
from cluster.remote import protocols
from pipelines.archive.entry import SourceRow, failed_row, modified_of, row_by_suffix, stat_row
from pipelines.archive.paths import SourceError, is_inside, safe_relative, shown_name, source_error_of

_PAGE = 1000  # objects of S3 asked for at once: the most that it gives
_MAX_LINKS = 8  # folders entered through links, one inside the other: bounds what links across links can unfold to


def walk_local(root: str, hidden: bool, depth: int | None) -> Iterator[SourceRow]:
    """All files below `root` sorted by path; one folder's names in memory at a time (and those of its parents)."""
    real_root = os.path.realpath(root)

    def entries(folder: str, prefix: str) -> list[tuple[str, os.DirEntry]]:
        with os.scandir(folder) as it:
            found = [(prefix + e.name, e) for e in it]
        # A folder sorts where its content does: `a-b` < `a.jpg` < `a/...`.
        return sorted(found, key=lambda f: f[0] + ("/" if is_folder(f[1]) else ""))

    def is_folder(entry: os.DirEntry) -> bool:
        try:
            return entry.is_dir()
        except OSError:  # a link to itself
            return False

    def identity(path: str) -> tuple[int, int]:
        st = os.stat(path)
        return st.st_dev, st.st_ino

    # One element a level: what is left of it, the folder's identity, links on the way to it.
    try:
        stack = [(iter(entries(root, "")), identity(root), 0)]
    except OSError as e:
        raise source_error_of(e, root) from e
    while stack:
        todo, _, links = stack[-1]
        path, entry = next(todo, (None, None))
        if entry is None:
            stack.pop()
            continue
        full = entry.path
        try:
            if entry.name.startswith(".") and not hidden:
                raise SourceError("HIDDEN", "a hidden file or folder; left alone")
            is_link, is_dir = entry.is_symlink(), is_folder(entry)
            if is_link:
                try:
                    os.stat(full)
                except FileNotFoundError:
                    raise SourceError(
                        "BROKEN_LINK", f"leads to {shown_name(os.readlink(full))}, which is not there"
                    ) from None
                if (is_dir or not row_by_suffix(path)) and not is_inside(os.path.realpath(full), real_root):
                    raise SourceError("LINK_OUTSIDE", "the link leads outside SRC")
            if is_dir:
                if depth is not None and len(stack) >= depth:
                    continue
                here = identity(full)
                if any(here == above for _, above, _ in stack):
                    raise SourceError("LINK_LOOP", "the link leads to a folder that it lies in")
                if is_link and links >= _MAX_LINKS:
                    raise SourceError("LINK_LOOP", f"more than {_MAX_LINKS} links one inside the other")
                stack.append((iter(entries(full, path + "/")), here, links + is_link))
                continue
        except SourceError as e:
            yield failed_row(path, full, e)
        except OSError as e:
            yield failed_row(path, full, source_error_of(e, "folder" if is_folder(entry) else "file"))
        else:
            yield stat_row(path, full, row_by_suffix(path))


def walk_store(files: Files, hidden: bool, depth: int | None) -> Iterator[SourceRow]:
    """As `_walk_local`, on any fsspec store: one folder in memory at a time (and its parents), on S3 1,000 objects."""
    fs, root = files.fs, files.root.rstrip("/")
    fs.invalidate_cache()
    if "s3" in protocols(fs):
        yield from _walk_s3(files, root, hidden, depth)
        return

    def entries(folder: str) -> list[tuple[str, dict]]:
        found = files.again(lambda: fs.ls(folder, detail=True))
        found = [(i["name"].rstrip("/")[len(root) + 1 :], i) for i in found]
        # Stores list the folder itself where a marker object exists.
        found = [(p, i) for p, i in found if p and i["name"].rstrip("/") != folder.rstrip("/")]
        return sorted(found, key=lambda f: f[0] + ("/" if f[1]["type"] == "directory" else ""))

    try:
        stack = [iter(entries(root))]
    except FileNotFoundError as e:
        raise SourceError("NOT_FOUND", f"{root}: no such folder") from e
    except OSError as e:
        raise source_error_of(e, root) from e
    while stack:
        path, info = next(stack[-1], (None, None))
        if info is None:
            stack.pop()
            continue
        url = fs.unstrip_protocol(info["name"])
        try:
            if path.rsplit("/", 1)[-1].startswith(".") and not hidden:
                raise SourceError("HIDDEN", "a hidden file or folder; left alone")
            if info["type"] == "directory":
                if depth is None or len(stack) < depth:
                    stack.append(iter(entries(info["name"])))
                continue
            safe_relative(path)
            error = row_by_suffix(path)
        except SourceError as e:
            error = e
        except OSError as e:
            error = source_error_of(e, "folder")
        if info["type"] == "directory" or (error and error.code == "UNSAFE_PATH"):
            yield failed_row(path, url, error)
        else:
            yield SourceRow(path, url, info.get("size"), modified_of(info), error=str(error) if error else None)


def _walk_s3(files: Files, root: str, hidden: bool, depth: int | None) -> Iterator[SourceRow]:
    """As `_walk_store`, page by page, since a prefix may hold millions of objects. S3 lists all that lies below a
    prefix in the order of UTF-8's bytes, which is that of paths here (directory buckets do not, and are listed as they
    come)."""
    fs = files.fs
    bucket, _, prefix = root.partition("/")
    prefix = f"{prefix}/" if prefix else ""
    ask = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": _PAGE}
    empty, told = True, ""
    while ask is not None:
        try:
            page = files.again(lambda ask=ask: fs.call_s3("list_objects_v2", **ask))
        except FileNotFoundError as e:
            raise SourceError("NOT_FOUND", f"{root}: no such bucket") from e
        except OSError as e:
            raise source_error_of(e, root) from e
        for info in page.get("Contents", ()):
            empty = False
            path = info["Key"][len(prefix) :]
            if not path or path.endswith("/"):  # an object that stands for a folder
                continue
            parts = path.split("/")
            above = next((i for i, part in enumerate(parts) if part.startswith(".") and part not in (".", "..")), None)
            if above is not None and not hidden:  # one row for a hidden folder
                path = "/".join(parts[: above + 1])
                if path != told and (depth is None or above < depth):
                    told = path
                    url = fs.unstrip_protocol(f"{bucket}/{prefix}{path}")
                    yield failed_row(path, url, SourceError("HIDDEN", "a hidden file or folder; left alone"))
                continue
            if depth is not None and len(parts) > depth:
                continue
            url = fs.unstrip_protocol(f"{bucket}/{info['Key']}")
            try:
                if safe_relative(path) != path:
                    raise SourceError("UNSAFE_PATH", "a name with empty parts or `.` in it, which no file system has")
            except SourceError as e:
                yield failed_row(path, url, e)
                continue
            error = row_by_suffix(path)
            yield SourceRow(path, url, info["Size"], modified_of(info), error=str(error) if error else None)
        token = page.get("NextContinuationToken")
        ask = ask | {"ContinuationToken": token} if token else None
    if empty:
        raise SourceError("NOT_FOUND", f"{root}: nothing there")
