"""Keys by the million: packed to 16 bytes each, and an index from key to part.

A key is what `hash_key` gives: 32 hex digits. As strings, ten million of them take some 800 MB of memory in Python and
360 MB in Arrow; packed they take 160 MB, and hold all that the strings held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

# Keys at the stage before -> keys at a stage, in the same order. Must be a function of its argument alone.
KeyRule = Callable[[list[str]], list[str]]

WINDOW = 1 << 16  # keys unpacked at a time


def hash_key(*fields: str | bytes | int) -> str:
    """Hash a sequence of fields to a key.

    Every field is preceded by its length, so that ("ab", "c") and ("a", "bc") differ; integers are hashed as decimal
    text and thus equal the string of the same digits.

    Returns:
        32 hex digits (blake2b, 16 bytes; RFC 7693).
    """
    return hashlib.blake2b(b"".join([_framed(field) for field in fields]), digest_size=16).hexdigest()


def hash_keys(fields: Sequence[str | bytes | int], keys: Sequence[str]) -> list[str]:
    """`[hash_key(*fields, key) for key in keys]` in half of the time, for keys of one length.

    `functools.partial(hash_keys, fields)` is the usual `KeyRule`.
    """
    if not keys:
        return []
    length = len(keys[0])
    before = b"".join(map(_framed, fields)) + length.to_bytes(8, "little")
    digest, end = hashlib.blake2b, len(before) + length
    data = [before + key.encode() for key in keys]
    if any(len(item) != end for item in data):
        raise ValueError("keys of different lengths")
    return [digest(item, digest_size=16).hexdigest() for item in data]


def part_key(keys: Iterable[str]) -> str:
    """Name of the part that holds exactly these item keys: `hash_key` of the sorted, distinct keys (32 hex digits)."""
    ordered = sorted(set(keys))
    if not all(len(key) == 32 and key.isascii() for key in ordered):
        return hash_key(*ordered)
    frame = (32).to_bytes(8, "little").decode("latin-1")  # what `_framed` puts before each of them
    data = frame + frame.join(ordered) if ordered else ""
    return hashlib.blake2b(data.encode("latin-1"), digest_size=16).hexdigest()


def _framed(field: str | bytes | int) -> bytes:
    data = field if isinstance(field, bytes) else str(field).encode("utf-8", "surrogatepass")
    return len(data).to_bytes(8, "little") + data


def pack(keys: Sequence[str] | pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Keys as a uint64 array (n, 2), most significant half first.

    Raises:
        ValueError: one of them is not a string of 32 lower-case hex digits.
    """
    packed = np.empty((len(keys), 2), np.uint64)
    for first in range(0, len(keys), WINDOW):
        some = keys[first : first + WINDOW]
        if isinstance(some, pa.Array | pa.ChunkedArray):
            some = some.to_pylist()
        try:
            text = "".join(some)
            data = bytes.fromhex(text)
        except (TypeError, ValueError) as error:
            raise ValueError("not a key of 32 hex digits") from error
        if any(len(key) != 32 for key in some) or len(data) != 16 * len(some) or text != text.lower():
            raise ValueError("not a key of 32 hex digits")
        packed[first : first + len(some)] = np.frombuffer(data, ">u8").reshape(-1, 2)
    return packed


def unpack(packed: np.ndarray) -> list[str]:
    """The keys as strings again."""
    text = packed.astype(">u8").tobytes().hex()
    return [text[first : first + 32] for first in range(0, len(text), 32)]


def windows(count: int) -> Iterator[slice]:
    """Slices of at most `WINDOW` that cover `count` keys."""
    for first in range(0, count, WINDOW):
        yield slice(first, min(count, first + WINDOW))


def distinct(packed: np.ndarray) -> bool:
    """Whether no key occurs twice."""
    high = np.sort(packed[:, 0])
    if not np.any(high[1:] == high[:-1]):
        return True
    rows = packed[np.lexsort((packed[:, 1], packed[:, 0]))]
    return not np.any((rows[1:] == rows[:-1]).all(axis=1))


class KeyIndex:
    """Which part holds a key.

    Args:
        packed: (n, 2) keys. A key that occurs more than once counts for the smallest of its codes.
        codes: int32 (n,), positions in `names`.
        names: names of the parts.
        unsaved: how many of the parts had to be opened, because the store's saved index did not know them.
    """

    def __init__(self, packed: np.ndarray, codes: np.ndarray, names: list[str], unsaved: int = 0):
        self.names = names
        self.unsaved = unsaved
        order = np.argsort(packed[:, 0], kind="stable")
        self.high, self.low, self.codes = packed[order, 0], packed[order, 1], codes[order].astype(np.int32)
        # Keys with equal halves: the same key in several parts, or (once in 2^64 pairs) two keys.
        self._twins: dict[tuple[int, int], int] = {}
        equal = np.flatnonzero(self.high[1:] == self.high[:-1])
        if len(equal):
            places = np.union1d(equal, equal + 1)
            for place in places.tolist():
                key, code = (int(self.high[place]), int(self.low[place])), int(self.codes[place])
                self._twins[key] = min(code, self._twins.get(key, code))
            keep = np.ones(len(order), bool)
            keep[places] = False
            twins = sorted((*key, code) for key, code in self._twins.items())
            more = np.array([twin[:2] for twin in twins], np.uint64).reshape(-1, 2)
            at = np.searchsorted(self.high[keep], more[:, 0])
            self.high = np.insert(self.high[keep], at, more[:, 0])
            self.low = np.insert(self.low[keep], at, more[:, 1])
            self.codes = np.insert(self.codes[keep], at, np.array([twin[2] for twin in twins], np.int32))

    def __len__(self) -> int:
        return len(self.high)

    @property
    def packed(self) -> np.ndarray:
        """The distinct keys (n, 2), ascending."""
        return np.stack([self.high, self.low], axis=1)

    def find(self, packed: np.ndarray) -> np.ndarray:
        """Codes of keys, int32; -1 where no part holds one."""
        if not len(self):
            return np.full(len(packed), -1, np.int32)
        place = np.minimum(np.searchsorted(self.high, packed[:, 0]), len(self) - 1)
        half = self.high[place] == packed[:, 0]
        found = np.where(half & (self.low[place] == packed[:, 1]), self.codes[place], np.int32(-1))
        if self._twins:
            for row in np.flatnonzero(half & (found < 0)).tolist():
                found[row] = self._twins.get((int(packed[row, 0]), int(packed[row, 1])), -1)
        return found
