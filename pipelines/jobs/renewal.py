"""Which photos have to be published again, because OUT does not have their files as they were written."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster import KeyRule
from cluster.digest import scan_digest
from cluster.keys import KeyIndex, pack
from pipelines.archive.output import output_digest, output_sizes
from pipelines.run import attempts
from pipelines.run.folder import Run
from pipelines.run.schemas import LIGHT

WRITTEN = ("protected", "copied")  # `publish.action` of rows with a file in OUT
_READERS = 16


def renewal(run: Run, out: str, opened: Collection[str] = (), verify: bool = False) -> KeyRule:
    """The rule from publish keys to those of the attempts that count: a photo whose file in OUT is gone, or has another
    size than was written, is done again; with `verify` also one whose bytes are others, for which all of OUT is read.

    Parts are never changed, so such a photo gets a new key: that of the next attempt. So does one whose latest attempt
    is in ``opened`` (``run.attempts.opened``). Looks at OUT once, now.

    Raises:
        StoreError: unreadable parts.  OutputError: OUT cannot be listed.
    """
    done = run.store.key_index("publish")
    if not len(done):
        return lambda keys: keys
    packed = _stale(run, out, verify)
    stale = KeyIndex(packed, np.zeros(len(packed), np.int32), [""])
    return partial(_renewed, done, stale, set(opened))


def _known(index: KeyIndex, keys: list[str]) -> np.ndarray:
    return index.find(pack(keys)) >= 0


def _renewed(done: KeyIndex, stale: KeyIndex, opened: Collection[str], keys: list[str]) -> list[str]:
    keys = list(keys)
    latest = np.flatnonzero(_known(done, keys))  # places of photos that have been published at all
    places = latest
    while len(places):  # photos that have a later attempt still
        later = [attempts.again(keys[place]) for place in places]
        known = _known(done, later)
        places = places[known]
        for place, key in zip(places, (key for key, yes in zip(later, known, strict=True) if yes), strict=True):
            keys[place] = key
    some = [keys[place] for place in latest]
    for place, key, gone in zip(latest, some, _known(stale, some), strict=True):
        if gone or key in opened:
            keys[place] = attempts.again(key)
    return keys


def _stale(run: Run, out: str, verify: bool) -> np.ndarray:
    """Publish keys (packed) whose file in OUT is gone, has another size, or with `verify` other bytes."""
    size_of = output_sizes(out)
    found = [np.empty((0, 2), np.uint64)]
    with ThreadPoolExecutor(_READERS) as pool:
        columns = ["key", "path", "action", "out_bytes", "sha256"]
        for table in scan_digest(run.store, "publish", columns, LIGHT["publish"], save=True):
            rows = table.filter(pc.is_in(table["action"], value_set=pa.array(WRITTEN)))
            if not rows.num_rows:
                continue
            paths = rows["path"].to_pylist()
            other = size_of(paths) != rows["out_bytes"].to_numpy()
            if verify:
                alike = dict.fromkeys(path for path, gone in zip(paths, other, strict=True) if not gone)
                now = dict(zip(alike, pool.map(partial(output_digest, out), alike), strict=True))
                for row, (path, digest) in enumerate(zip(paths, rows["sha256"].to_pylist(), strict=True)):
                    other[row] |= now.get(path, digest) != digest
            found.append(pack(rows["key"].filter(pa.array(other))))
    return np.unique(np.concatenate(found), axis=0)
