"""Stages over keyed items on Ray actors, joined by committed Parquet parts. Knows nothing of what the rows mean."""

from cluster.errors import (
    ClusterError,
    ContractError,
    EngineError,
    PlanError,
    RunInterrupted,
    SchemaVersionError,
    StoreError,
    UnsafeStoreError,
)
from cluster.stage import ItemTimeout, Operator, Pool, Resources, Stage, WorkerUnfit
from cluster.store import PartStore, hash_key, part_key

__all__ = [
    "ClusterError",
    "ContractError",
    "EngineError",
    "ItemTimeout",
    "Operator",
    "PartStore",
    "PlanError",
    "Pool",
    "Resources",
    "RunInterrupted",
    "SchemaVersionError",
    "Stage",
    "StoreError",
    "UnsafeStoreError",
    "WorkerUnfit",
    "hash_key",
    "part_key",
]
