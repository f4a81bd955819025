"""A chain of stages in this process, on tables in memory: no Ray, no store, the same joins and checks as in a
worker."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.keys import KeyRule
from cluster.stage import Stage
from cluster.worker import Input, Shard, attempt, item_starts, joined_rows


class LocalChain:
    """The stages' operators, loaded once.

    Args:
        stages: the chain, in order.
        source: name of the table that it begins with.

    Raises:
        what the stages' factories raise.
    """

    def __init__(self, stages: Sequence[Stage], source: str = "source") -> None:
        self._stages, self._source = list(stages), source
        self._operators = [stage.factory() for stage in self._stages]

    def run(self, source: pa.Table, rules: Mapping[str, KeyRule]) -> dict[str, pa.Table]:
        """All rows of every stage, by its name, for the items of a source table.

        An operator's exception costs its item, which gets the stage's error rows, as in a worker. Nothing is kept.

        Args:
            source: with a column `key`, one row an item.
            rules: by stage, from the keys at the stage before; may name stages that the chain leaves out.

        Raises:
            ContractError: a stage breaks the contract (``cluster.stage.Stage``) even in its error rows.
            WorkerUnfit: this process can no longer work.
        """
        tables = {self._source: source}
        keys = {self._source: source["key"].to_pylist()}
        before = self._source
        for stage, operator in zip(self._stages, self._operators, strict=True):
            keys[stage.name] = rules[stage.name](keys[before])
            wanted = [(before, stage.columns), *stage.joins.items()]
            inputs = [Input(name, keys[name], (), columns) for name, columns in wanted]
            shard = Shard(0, keys[stage.name], inputs)
            rows = joined_rows(stage, shard, [_read(tables[source.stage], source, stage.row_id) for source in inputs])
            answers: list[pa.Table] = []
            starts = item_starts(rows)
            for first in range(0, len(starts) - 1, stage.batch_items):
                ends = starts[first : first + stage.batch_items + 1]
                if attempt(stage, operator, rows, ends, answers) is not None and len(ends) > 2:
                    for pair in itertools.pairwise(ends):
                        attempt(stage, operator, rows, pair, answers)
            tables[stage.name] = pa.concat_tables(answers)
            before = stage.name
        return tables


def _read(table: pa.Table, source: Input, row_id: str | None) -> tuple[pa.Table, np.ndarray]:
    """The wanted columns in the order of the items, and each row's item."""
    if source.columns is not None:
        names = dict.fromkeys(["key", *source.columns, *([row_id] if row_id in table.column_names else [])])
        table = table.select(list(names))
    place = pc.index_in(table["key"], value_set=pa.array(source.keys, pa.string())).to_numpy().astype(np.int64)
    order = np.argsort(place, kind="stable")
    return table.take(pa.array(order)), place[order]
