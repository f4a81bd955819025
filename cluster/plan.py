"""What of a run is finished and what is missing, in few bytes an item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from cluster.keys import KeyRule, pack, unpack, windows

Keys = Sequence[str] | pa.Array | pa.ChunkedArray | KeyRule


class Plan:
    """What is finished and what is missing.

    An item takes 16 bytes for its key at the source, as much for each stage whose keys are given as a column, and 4 for
    each stage that has parts; keys that a rule gives are derived when they are needed.

    Attributes:
        stages: names, the source first.
        names: by stage, the names of the parts known.
        part: by stage, int32 array: for each item 1 + the position in `names` of the part that holds it, 0 if missing.
        known: by stage, how many of the parts were there when the plan was made.
    """

    def __init__(self, stages: list[str], keys: list[np.ndarray | KeyRule]):
        self.stages = stages
        self._keys = keys
        self.names: list[list[str]] = [[] for _ in stages]
        # zeros: the system gives memory to such an array only as it is written to
        self.part = [np.zeros(len(keys[0]), np.int32) for _ in stages]
        self.known = [0] * len(stages)

    def __len__(self) -> int:
        return len(self.part[0])

    def missing(self) -> dict[str, int]:
        """Items to do, by stage."""
        return {name: int((part == 0).sum()) for name, part in zip(self.stages, self.part, strict=True)}

    def keys_of(self, stage: int, items: Sequence[int] | np.ndarray) -> list[str]:
        """Keys of some items (positions) at a stage (position, 0 is the source)."""
        first = stage
        while not isinstance(self._keys[first], np.ndarray):
            first -= 1
        keys = unpack(self._keys[first][items])
        for rule in self._keys[first + 1 : stage + 1]:
            keys = rule(keys)
        return keys

    def parts_of(self, stage: int, items: Sequence[int] | np.ndarray) -> list[str]:
        """Names of the parts that hold some items at a stage, sorted."""
        return sorted({self.names[stage][code - 1] for code in self.part[stage][items].tolist()})

    def record(self, stage: int, items: Sequence[int] | np.ndarray, name: str) -> None:
        """Note that these items are in that part now."""
        self.names[stage].append(name)
        self.part[stage][items] = len(self.names[stage])

    def new_parts(self, stage: int) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Parts that came since the plan was made: their names, keys (packed), and for each key its part's position."""
        items = np.flatnonzero(self.part[stage] > self.known[stage])
        packed = np.empty((len(items), 2), np.uint64)
        for some in windows(len(items)):
            packed[some] = pack(self.keys_of(stage, items[some]))
        return self.names[stage][self.known[stage] :], packed, self.part[stage][items] - self.known[stage] - 1
