"""Files of the embedded networks, and one digest over several of them."""

from __future__ import annotations

import hashlib

from scol_ops.models import files as weights

MAPPING_FILES = ("random_face/MappingNetwork.xml", "random_face/MappingNetwork.bin")
SYNTHESIS_FILES = ("random_face/SynthesisNetwork.xml", "random_face/SynthesisNetwork.bin")
MEAN_FILE = "mobilestylegan_mean.safetensors"
HEAD_FILE = "mobilestylegan_head256.safetensors"
ENCODER_FILE = "encoder.safetensors"


def digest_of(*names: str) -> str:
    """16 hex digits over the digests of embedded files, by name.

    Raises:
        WeightsError: a name that this version does not embed.
    """
    table = weights.SHA256
    missing = [name for name in names if name not in table]
    if missing:
        raise weights.WeightsError(f"this version embeds no {', '.join(missing)}")
    text = "".join(f"{name}:{table[name]};" for name in names)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def embedded_w_digest() -> str:
    """16 hex digits of the W space that the two embedded generators share."""
    return digest_of(*MAPPING_FILES, MEAN_FILE)
