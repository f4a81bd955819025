"""Galleries for runs: synthetic ones from the mapping network, others by inverting the faces of photos."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from cluster import Progress
from gallery_index import (
    CodeBatch,
    Expectation,
    Gallery,
    GalleryBuilder,
    GalleryInfo,
    GalleryMismatchError,
    GalleryNotFoundError,
    build,
    synthetic_codes,
)
from gallery_index.storage import Folder
from pipelines import models
from pipelines.config import Config, GalleryConfig
from pipelines.manifests import CODE_DIM, CODE_LAYERS, IDENTITY_DIM, OK, Run, scan_stage
from pipelines.observe import Observer
from pipelines.presence import Presence
from scol_ops.models.weights import load_mobilestylegan


def read_info(url: str) -> GalleryInfo:
    """A gallery's description, without its codes.

    Raises:
        GalleryNotFoundError, GalleryCorruptError, GalleryMismatchError: see ``Gallery.load``.
    """
    folder = Folder(url)
    return GalleryInfo.from_bytes(folder.read_index(), folder.url)


def expectation(config: Config) -> Expectation:
    """What a run needs a gallery to be.  Both generators share one mapping network, so its fingerprint counts."""
    weights = {"generator": models.mapping_fingerprint(), "encoder": models.encoder_fingerprint()}
    if config.fuse.identity_ceiling is not None:
        weights["recogniser"] = models.recogniser_fingerprint(models.INVERSION_RECOGNISER)
    return Expectation(
        mode=config.gallery.similarity,
        layers=CODE_LAYERS,
        dim=CODE_DIM,
        weights=weights,
    )


def build_synthetic(out: str, settings: GalleryConfig) -> GalleryInfo:
    """Codes of people who do not exist: one W a person, by the mapping network; it stands for all layers.

    Raises:
        GalleryExistsError: ``out`` holds a gallery already.
    """
    models.set_up()
    generator = load_mobilestylegan(256, head=None)
    batches = synthetic_codes(
        settings.synthetic,
        settings.synthetic_seed,
        generator.mapping,
        psi=settings.truncation,
        mean=generator.mean_code,
    )
    weights = {"generator": models.mapping_fingerprint(), "encoder": None, "recogniser": None}
    source = f"{settings.synthetic} synthetic codes, seed {settings.synthetic_seed}, truncation {settings.truncation:g}"
    return build(out, batches, mode=settings.similarity, weights=weights, broadcast_layers=CODE_LAYERS, source=source)


def synthetic_name(settings: GalleryConfig) -> str:
    """Folder name of a synthetic gallery: equal settings and weights, equal name."""
    text = json.dumps(
        [
            settings.synthetic,
            settings.synthetic_seed,
            settings.truncation,
            settings.similarity,
            models.mapping_fingerprint(),
        ]
    )
    return f"synthetic-{settings.synthetic}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"


def ensure_gallery(config: Config, run: Run, say: Callable[[str], None]) -> tuple[str, GalleryInfo]:
    """The gallery of a run: the one of the configuration, checked; or a synthetic one in the run's folder, made once.

    Returns:
        its URL and description.

    Raises:
        GalleryNotFoundError, GalleryMismatchError, GalleryCorruptError: the configured one does not serve.
    """
    from pipelines.protect import absolute

    if config.fuse.identity_ceiling is not None and config.gallery.url is None:
        raise GalleryMismatchError("fuse.identity_ceiling needs gallery.url: people who do not exist have no identity")
    if config.gallery.url is not None:
        info = read_info(config.gallery.url)
        expectation(config).check(info, config.gallery.url)
        if config.fuse.identity_ceiling is not None and info.embedding_dim != IDENTITY_DIM:
            raise GalleryMismatchError(f"{config.gallery.url} holds no identity embeddings for fuse.identity_ceiling")
        if config.fuse.k >= info.count:
            raise GalleryNotFoundError(
                f"{config.gallery.url} holds {info.count} codes, fuse.k = {config.fuse.k} needs more"
            )
        return absolute(config.gallery.url), info
    url = run.path(f"gallery/{synthetic_name(config.gallery)}")
    try:
        return url, read_info(url)
    except GalleryNotFoundError:
        say(f"making a gallery of {config.gallery.synthetic} synthetic people")
        return url, build_synthetic(url, config.gallery)


def gallery_std(run: Run, url: str, info: GalleryInfo) -> np.ndarray:
    """Standard deviation of each component over the gallery, (16, 512) float32; kept in the run's folder."""
    name = f"gallery/std-{info.fingerprint}.npy"
    try:
        return np.load(io.BytesIO(run.read(name)), allow_pickle=False)
    except ValueError:
        std = np.ascontiguousarray(Gallery.load(url).component_std())
        buffer = io.BytesIO()
        np.save(buffer, std)
        run.write(name, buffer.getvalue())
        return std


def build_from_photos(
    src: str,
    out: str,
    config: Config,
    *,
    people_from: str | None = None,
    run_url: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[GalleryInfo, dict[str, Any]]:
    """A gallery of the faces of photos: align and invert on the engine, then one code a face.

    Args:
        src: as for ``protect``.
        out: folder or URL of the gallery.
        people_from: see ``sources.list_photos``.
        run_url: folder of the intermediate tables, kept so that a second build goes on; by default ``out`` + ``.run``.

    Returns:
        the gallery's description, and counts: photos, faces, failed.

    Raises:
        ProtectError: no photo at ``src``, or no face in them.
        GalleryExistsError: ``out`` holds a gallery already.
    """
    from pipelines.protect import ProtectError, absolute, execute, list_source, source_table

    run = Run(absolute(run_url or out.rstrip("/") + ".run"))
    # Opened first: an existing gallery is found before hours of work.
    builder = GalleryBuilder(
        out,
        mode=config.gallery.similarity,
        source=f"faces of {src}",
        weights={
            "generator": models.mapping_fingerprint(),
            "encoder": models.encoder_fingerprint(),
            "recogniser": models.recogniser_fingerprint(models.INVERSION_RECOGNISER),
        },
    )
    about = {"source": absolute(src), "evidence": "stat"}
    observer = Observer(run)

    def heard(message: Progress) -> None:
        observer(message)
        if progress is not None:
            progress(message)

    with Presence(run, "gallery build", observer.tell, observer.work) as presence:
        listing = list_source(src, people_from=people_from, stop=presence.stopped)
        source = source_table(listing.photos)
        execute(run, source, config, about=about, until="invert", progress=heard, stop=presence.stopped)
    people = {row.photo_id: row.person_id for row in listing.photos}
    failed = faces = 0
    with builder:
        for table in scan_stage(run, "invert", ["photo_id", "face_id", "status", "code", "identity"]):
            good = [i for i, status in enumerate(table["status"].to_pylist()) if status == OK]
            failed += sum(status == "error" for status in table["status"].to_pylist())
            if not good:
                continue
            table = table.take(good)
            faces += len(good)
            codes, identities = (_vectors(table, column) for column in ("code", "identity"))
            photo_ids = table["photo_id"].to_pylist()
            builder.add(
                CodeBatch(
                    codes.reshape(-1, CODE_LAYERS, CODE_DIM),
                    photo_ids,
                    [people[photo_id] for photo_id in photo_ids],
                    table["face_id"].to_pylist(),
                    identities,
                )
            )
        if not faces:
            raise ProtectError("NO_FACES", f"no face was found in the {len(listing.photos)} photos of {src}")
        info = builder.finish()
    say(f"{faces} faces of {len(listing.photos)} photos; {failed} rows failed")
    return info, {"photos": len(listing.photos), "faces": faces, "failed": failed}


def _vectors(table: pa.Table, column: str) -> np.ndarray:
    """A column of lists of equal length as (rows, length) float32."""
    return np.stack([scalar.values.to_numpy() for chunk in table[column].chunks for scalar in chunk]).astype(np.float32)


def describe(url: str) -> dict[str, Any]:
    """``scol gallery info`` as plain values."""
    info = read_info(url)
    return {
        "url": url,
        "codes": info.count,
        "layers": info.layers,
        "dim": info.dim,
        "similarity": info.mode,
        "one_w_for_all_layers": info.broadcast,
        "photos": info.photos,
        "people": info.people,
        "source": info.source,
        "weights": dict(info.weights),
        "bytes": sum(entry.size for entry in info.files.values()),
        "fingerprint": info.fingerprint,
    }
