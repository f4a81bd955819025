"""Stages over keyed items on Ray actors, joined by committed Parquet parts. Knows nothing of what the rows mean."""

from cluster.engine import Engine, Progress, RunSummary, StageSummary
from cluster.errors import (
    BadUrlError,
    BrokenStageError,
    ClusterError,
    ContractError,
    EngineError,
    PlanError,
    RunInterrupted,
    SchemaVersionError,
    StoreError,
    UnsafeStoreError,
)
from cluster.files import Files
from cluster.keys import KeyRule, hash_key, hash_keys, part_key
from cluster.local import LocalChain
from cluster.plan import Plan
from cluster.service import Service
from cluster.session import ray_session
from cluster.stage import ItemTimeout, Operator, Pool, Resources, Stage, WorkerUnfit
from cluster.store import PartStore

__all__ = [
    "BadUrlError",
    "BrokenStageError",
    "ClusterError",
    "ContractError",
    "Engine",
    "EngineError",
    "Files",
    "ItemTimeout",
    "KeyRule",
    "LocalChain",
    "Operator",
    "PartStore",
    "Plan",
    "PlanError",
    "Pool",
    "Progress",
    "Resources",
    "RunInterrupted",
    "RunSummary",
    "SchemaVersionError",
    "Service",
    "Stage",
    "StageSummary",
    "StoreError",
    "UnsafeStoreError",
    "WorkerUnfit",
    "hash_key",
    "hash_keys",
    "part_key",
    "ray_session",
]
