"""Columns of every stage's table, statuses, ids of faces and seeds of rows (docs/manifests.md)."""

from __future__ import annotations

import hashlib

import pyarrow as pa

from pipelines.config.names import STAGES

SCHEMA_VERSION = 1
SOURCE = "source"
OK, WEAK, NO_FACE, ERROR = "ok", "weak", "no_face", "error"
STATUSES = (OK, WEAK, NO_FACE, ERROR)
CODE_LAYERS, CODE_DIM = 16, 512
IDENTITY_DIM = 192  # of pipelines.networks.fingerprints.INVERSION_RECOGNISER's embeddings
CODE = pa.list_(pa.float32(), CODE_LAYERS * CODE_DIM)  # of the embedded generator; see `stage_schema`
COMMON = [
    pa.field("key", pa.string(), False),
    pa.field("photo_id", pa.string(), False),
    pa.field("face_id", pa.string()),
    pa.field("status", pa.string(), False),
    pa.field("reason", pa.string()),
    pa.field("failed_stage", pa.string()),
    pa.field("seconds", pa.float32()),
    pa.field("seed", pa.int64()),
    pa.field("weights", pa.string()),
]
_LAYER_SCORES = pa.list_(pa.float32(), CODE_LAYERS)
HISTORY = pa.list_(
    pa.struct(
        [
            ("phase", pa.string()),
            ("step", pa.int32()),
            ("psnr", pa.float32()),
            ("reconstruction", pa.float32()),
            ("id_lock", pa.float32()),
            ("hinge", pa.float32()),
        ]
    )
)
ROUNDS = pa.list_(
    pa.struct([("round", pa.int32()), ("psnr", pa.float32()), ("ism", pa.float32()), ("ism_worst", pa.float32())])
)
_PAYLOAD: dict[str, list[tuple[str, pa.DataType]]] = {
    "align": [
        ("content", pa.string()),
        ("face_index", pa.int16()),
        ("format", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("box", pa.list_(pa.float32(), 4)),
        ("landmarks", pa.list_(pa.float32(), 10)),
        ("quad", pa.list_(pa.float64(), 8)),
        ("score", pa.float32()),
        ("crop", pa.binary()),
    ],
    "invert": [
        ("code", CODE),
        ("psnr", pa.float32()),
        ("id_cosine", pa.float32()),
        ("identity", pa.list_(pa.float32(), IDENTITY_DIM)),
    ],
    "fuse": [
        ("fused", CODE),
        ("target", CODE),
        ("most_ids", pa.list_(pa.string())),
        ("most_scores", pa.list_(pa.float32())),
        ("least_scores", _LAYER_SCORES),
    ],
    "tune": [
        ("tuned", pa.binary()),
        ("refined", pa.binary()),
        ("psnr", pa.float32()),
        ("ssim", pa.float32()),
        ("tuned_psnr", pa.float32()),
        ("tune_steps", pa.int32()),
        ("refine_steps", pa.int32()),
        ("tune_seconds", pa.float32()),
        ("refine_seconds", pa.float32()),
        ("history", HISTORY),
    ],
    "attack": [
        ("protected", pa.binary()),
        ("psnr", pa.float32()),
        ("mask_share", pa.float32()),
        ("loss_before", pa.float32()),
        ("loss_after", pa.float32()),
    ],
    "strengthen": [
        ("protected", pa.binary()),
        ("rounds", pa.int32()),
        ("kept", pa.int32()),
        ("ended", pa.string()),
        ("psnr", pa.float32()),
        ("psnr_before", pa.float32()),
        ("ism", pa.float32()),
        ("ism_worst", pa.float32()),
        ("worst", pa.string()),
        ("ism_before", pa.float32()),
        ("ism_worst_before", pa.float32()),
        ("history", ROUNDS),
    ],
    "publish": [
        ("path", pa.string()),
        ("action", pa.string()),
        ("out_path", pa.string()),
        ("out_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("notes", pa.string()),
        ("psnr", pa.float32()),
        ("ssim", pa.float32()),
        ("flip", pa.float32()),
        ("face_psnr", pa.float32()),
        ("face_ssim", pa.float32()),
        ("jod", pa.float32()),
        ("jod_4k", pa.float32()),
        ("judge", pa.string()),
        ("ism", pa.float32()),
        ("ism_jpeg", pa.float32()),
        ("ism_worst", pa.float32()),
        ("worst", pa.string()),
        ("distorted", pa.list_(pa.struct([("name", pa.string()), ("ism", pa.float32())]))),
        ("max_ism", pa.float32()),
        ("max_ism_distorted", pa.float32()),
        ("ism_mobilefacenet", pa.float32()),
        ("ism_dlib_resnet", pa.float32()),
        ("ism_faceres", pa.float32()),
    ],
}
SOURCE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), False),
        pa.field("photo_id", pa.string(), False),
        pa.field("path", pa.string(), False),
        pa.field("url", pa.string(), False),
        pa.field("size", pa.int64()),
        pa.field("modified", pa.string()),
        pa.field("content", pa.string()),
        pa.field("person_id", pa.string()),
        pa.field("status", pa.string(), False),
        pa.field("reason", pa.string()),
    ]
)
SCHEMAS: dict[str, pa.Schema] = {
    SOURCE: SOURCE_SCHEMA,
    **{stage: pa.schema([*COMMON, *(pa.field(*column) for column in _PAYLOAD[stage])]) for stage in STAGES},
}
# What is read of every row every night; the rest (pictures, codes, histories) is read where it is wanted.
LIGHT: dict[str, pa.Schema] = {
    stage: pa.schema(
        [f for f in schema if not (pa.types.is_nested(f.type) or pa.types.is_binary(f.type) or f.name == "content")]
    )
    for stage, schema in SCHEMAS.items()
}


def stage_schema(stage: str, layers: int = CODE_LAYERS) -> pa.Schema:
    """Schema of a stage's rows where the generator takes so many codes; `SCHEMAS` is of the embedded one."""
    kinds = {CODE: pa.list_(pa.float32(), layers * CODE_DIM), _LAYER_SCORES: pa.list_(pa.float32(), layers)}
    return pa.schema([field.with_type(kinds.get(field.type, field.type)) for field in SCHEMAS[stage]])


PLAN_SCHEMA = pa.schema(
    [
        pa.field("photo_id", pa.string(), False),
        pa.field("path", pa.string(), False),
        *(pa.field(stage, pa.string(), False) for stage in (SOURCE, *STAGES)),
    ]
)


def face_id(photo_id: str, index: int) -> str:
    """`PHOTO-NN`; faces are numbered by descending box area."""
    return f"{photo_id}-{index:02d}"


def row_seed(run_seed: int, name: str) -> int:
    """A face's own seed, 0 .. 2^63 - 1: hashed from the run's and the face's id, so that no order matters."""
    digest = hashlib.blake2b(f"{run_seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def payload(stage: str) -> list[str]:
    """Names of a stage's own columns."""
    return [name for name, _ in _PAYLOAD[stage]]


def type_words(kind: pa.DataType) -> str:
    """An Arrow type as docs/manifests.md writes it."""
    if pa.types.is_struct(kind):
        return "struct"
    if pa.types.is_fixed_size_list(kind):
        return f"{type_words(kind.value_type)}[{kind.list_size}]"
    if pa.types.is_list(kind):
        return f"list of {type_words(kind.value_type)}"
    return {"float": "float32", "double": "float64"}.get(str(kind), str(kind))
