"""Stage ``fuse``: search the gallery at every layer, fuse the most similar codes, note the least similar ones."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from cluster import Operator, Stage
from cluster.retries import is_transient, with_retries
from gallery_index import Expectation, Gallery, GalleryError, QueryError, SearchResult, ShardedGallery
from pipelines.config.sections import Config
from pipelines.networks.load import set_up
from pipelines.run.schemas import OK
from pipelines.stages.crops import as_codes, as_vector
from pipelines.stages.declaration import Setting, declared
from pipelines.stages.gallery_actors import open_sharded
from pipelines.stages.rows import Row, base_row, failed, iterate, to_table
from scol_ops.fusion import draw_code, fuse

_TARGET_SEED = 0x7A26  # apart from the draw of the code to fuse


def stage(setting: Setting) -> Stage:
    """Reads the codes of ``invert``; those of a batch share one pass over the gallery."""
    return declared(
        "fuse",
        setting,
        setting.gallery,
        setting.gallery_fingerprint,
        pool="gallery",
        columns=["code", "identity"],
        joins={"source": ["person_id"]},
        batch_items=16,
        item_seconds=setting.config.engine.face_seconds,
    )


def operator(config: Config, weights: str, gallery_url: str, fingerprint: str | None = None) -> Operator:
    """Loads the gallery, refusing one of another fingerprint; the result takes rows of ``invert`` with
    ``source.person_id``."""
    set_up()
    gallery = _open(config, gallery_url, fingerprint)

    def run(table: pa.Table) -> pa.Table:
        rows = list(iterate(table))
        todo = [i for i, row in enumerate(rows) if row["status"] == OK]
        out: list[Row] = [base_row(row, weights) for row in rows]
        begin = time.monotonic()
        if todo:
            found = _search(gallery, config, [rows[i] for i in todo])
            seconds = (time.monotonic() - begin) / len(todo)
            for i, answer in zip(todo, found, strict=True):
                if isinstance(answer, str):
                    out[i] = failed(rows[i], "fuse", answer, weights, seconds)
                else:
                    out[i] = base_row(rows[i], weights, seconds) | answer
        return to_table("fuse", out, config.num_codes)

    return run


def _open(config: Config, url: str, fingerprint: str | None) -> Gallery | ShardedGallery:
    """The gallery that the run was planned with."""
    expect, layers = Expectation(fingerprint=fingerprint), config.num_codes

    def load() -> Gallery | ShardedGallery:
        if config.gallery.shards == 1:
            return Gallery.load(url, expect=expect, layers=layers, search=config.gallery.search)
        return open_sharded(url, config.gallery.shards, expect=expect, layers=layers, address=config.engine.ray_address)

    return with_retries(load, transient=lambda e: not isinstance(e, GalleryError) and is_transient(e))


def _search(gallery: Gallery | ShardedGallery, config: Config, rows: list[Row]) -> list[Row | str]:
    """Payload, or a reason, for every row. A query that is refused does not take its neighbours with it."""
    ceiling = config.fuse.identity_ceiling
    codes = np.concatenate([as_codes(row["code"]).numpy() for row in rows])
    random = config.fuse.source == "random"
    try:
        result = gallery.search(
            codes,
            1 if random else config.fuse.k,
            exclude_photo_ids=[row["photo_id"] for row in rows],
            exclude_person_ids=[row["source.person_id"] for row in rows],
            identity_embeddings=None if ceiling is None else np.stack([row["identity"] for row in rows]),
            identity_ceiling=ceiling,
        )
        if random:
            drawn = _drawn(gallery, rows, codes)
            most = {name: getattr(drawn, name) for name in ("most_ids", "most_scores", "most_vectors")}
            result = replace(result, **most)
        if config.fuse.target == "random":
            drawn = _drawn(gallery, rows, codes, _TARGET_SEED)
            least = {f"least_{name}": getattr(drawn, f"most_{name}")[:, :, 0] for name in ("ids", "scores", "vectors")}
            result = replace(result, **least)
    except QueryError as error:
        if len(rows) == 1:
            return [f"GALLERY: {error}"]
        return [_search(gallery, config, [row])[0] for row in rows]
    answers: list[Row | str] = []
    for i in range(len(rows)):
        fused = fuse(
            torch.from_numpy(result.most_vectors[i : i + 1]),
            torch.from_numpy(result.most_scores[i : i + 1]),
            weighting=config.fuse.weighting,
            temperature=config.fuse.temperature,
            layers=config.fuse.layers,
            original=torch.from_numpy(codes[i : i + 1]),
        )
        answers.append(
            {
                "fused": as_vector(fused),
                "target": result.least_vectors[i].reshape(-1),
                "most_ids": result.most_ids[i, 0].tolist(),
                "most_scores": result.most_scores[i, 0],
                "least_scores": result.least_scores[i],
            }
        )
    return answers


def _drawn(gallery: Gallery | ShardedGallery, rows: list[Row], codes: np.ndarray, other: int = 0) -> SearchResult:
    """As the most similar, a code of other people for each row, at all layers the same one's, drawn by seed ^ other."""
    photos, people = (np.array(names, object) for names in (gallery.photo_ids, gallery.person_ids))
    chosen = []
    for row in rows:
        allowed = photos != row["photo_id"]
        if row["source.person_id"] is not None:
            allowed &= people != row["source.person_id"]
        chosen.append(draw_code(allowed, row["seed"] ^ other))
    every = np.arange(len(gallery))
    return gallery.search(codes, 1, exclude_mask=lambda query: every != chosen[query])
