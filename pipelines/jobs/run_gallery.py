"""The gallery of a run: the configured one, checked, or a synthetic one in the run's folder."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from gallery_index import (
    CodeBatch,
    Expectation,
    Gallery,
    GalleryExistsError,
    GalleryInfo,
    GalleryMismatchError,
    GalleryNotFoundError,
    Store,
    build,
    read_info,
    synthetic_codes,
)
from gallery_index.storage import INDEX
from gallery_index.store import store_of
from pipelines.archive.paths import absolute
from pipelines.config.sections import Config
from pipelines.networks import fingerprints
from pipelines.networks import load as networks
from pipelines.run.folder import Run
from pipelines.run.schemas import CODE_DIM, IDENTITY_DIM
from scol_ops.models import catalogue as public_models
from scol_ops.models.embedded import load_mobilestylegan


def expectation(config: Config) -> Expectation:
    """What a run needs a gallery to be.  Generators of one W space can share it, so that space's fingerprint counts."""
    weights = expected_weights(config)
    if config.fuse.identity_ceiling is None:
        del weights["recogniser"]
    return Expectation(
        mode=config.gallery.similarity,
        layers=config.num_codes,
        dim=CODE_DIM,
        weights=weights,
    )


def synthetic_batches(config: Config) -> tuple[Iterator[CodeBatch], dict[str, Any]]:
    """Codes of people who do not exist, and options of the builder."""
    networks.set_up()
    settings, store = config.gallery, config.engine.models
    if config.generator in public_models.GENERATORS:
        generator = networks.generator(config.generator, torch.device("cpu"), store)
    else:
        generator = load_mobilestylegan(256, head=None)  # the two embedded ones share their mapping network
    batches = synthetic_codes(
        settings.synthetic,
        settings.synthetic_seed,
        generator.mapping,
        psi=settings.truncation,
        mean=generator.mean_code,
    )
    source = f"{settings.synthetic} synthetic codes, seed {settings.synthetic_seed}, truncation {settings.truncation:g}"
    return batches, dict(
        mode=settings.similarity,
        weights={
            "generator": fingerprints.mapping_fingerprint(config.generator, store),
            "encoder": None,
            "recogniser": None,
        },
        broadcast_layers=config.num_codes,
        source=source,
    )


def build_synthetic(out: str, config: Config, stop: Callable[[], bool] = lambda: False) -> GalleryInfo:
    """A gallery without versions of people who do not exist: one W a person, which stands for all layers.

    Args:
        stop: asked before each batch of codes; where it says true, the work ends as by Ctrl-C.

    Raises:
        GalleryExistsError: ``out`` holds a gallery already.
        KeyboardInterrupt: `stop`; nothing is left of the gallery.
    """
    batches, options = synthetic_batches(config)

    def until_stopped() -> Iterator[CodeBatch]:
        for batch in batches:
            if stop():
                raise KeyboardInterrupt
            yield batch

    return build(out, until_stopped(), **options)


def synthetic_name(config: Config) -> str:
    """Folder name of a synthetic gallery: equal settings and W space, equal name."""
    settings = config.gallery
    text = json.dumps(
        [
            settings.synthetic,
            settings.synthetic_seed,
            settings.truncation,
            settings.similarity,
            fingerprints.mapping_fingerprint(config.generator, config.engine.models),
        ]
    )
    return f"synthetic-{settings.synthetic}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"


@dataclass(frozen=True, eq=False)
class RunGallery:
    """The gallery that a run fuses with.

    Attributes:
        config: of the run.
        run: its folder.
        url: of the gallery, or of a version of it.
        info: its description.
    """

    config: Config
    run: Run
    url: str
    info: GalleryInfo

    @classmethod
    def open(
        cls, config: Config, run: Run, say: Callable[[str], None], stop: Callable[[], bool] = lambda: False
    ) -> RunGallery:
        """The gallery of the configuration, checked; or a synthetic one in the run's folder, made once.

        Args:
            stop: see ``build_synthetic``.

        Raises:
            GalleryNotFoundError, GalleryMismatchError, GalleryCorruptError: the configured one does not serve.
        """
        find = _configured if config.gallery.url is not None else partial(_made, say=say, stop=stop)
        return cls(config, run, *find(config, run))

    @property
    def key_words(self) -> str:
        """What enters the keys of ``fuse``: the fingerprint, and how compressed indexes answer where they do, since
        they may answer otherwise."""
        found = self.info.compression
        if found is None or self.config.gallery.search != "compressed":
            return self.info.fingerprint
        return f"{self.info.fingerprint}+{found['factory']},{found['search']}"

    def described(self) -> dict[str, Any]:
        """What a run records of its gallery."""
        found = store_of(self.url)
        return {
            "url": self.url,
            "store": found[0].url if found else None,
            "version": found[1] if found else None,
            "fingerprint": self.info.fingerprint,
            "codes": self.info.count,
            "similarity": self.info.mode,
            "source": self.info.source,
        }

    def std(self) -> np.ndarray:
        """Standard deviation of each component over the gallery, (L, 512) float32; kept in the run's folder."""
        layers = self.config.num_codes
        name = f"gallery/std-{self.info.fingerprint}{'' if layers == self.info.layers else f'-{layers}'}.npy"
        try:
            return np.load(io.BytesIO(self.run.read(name)), allow_pickle=False)
        except ValueError:
            std = np.ascontiguousarray(Gallery.load(self.url, layers=layers).component_std())
            buffer = io.BytesIO()
            np.save(buffer, std)
            self.run.write(name, buffer.getvalue())
            return std

    def reading(self) -> AbstractContextManager[None]:
        """While the block lasts, a version of a store is not pruned (on local disks)."""
        found = store_of(self.url)
        return found[0].reading(found[1]) if found else nullcontext()


def _configured(config: Config, run: Run) -> tuple[str, GalleryInfo]:
    """URL and description of ``gallery.url``, if it serves the run."""
    url = _version_for(config, run)
    info = read_info(url)
    expectation(config).check(info, url)
    if config.fuse.identity_ceiling is not None and info.embedding_dim != IDENTITY_DIM:
        raise GalleryMismatchError(f"{url} holds no identity embeddings for fuse.identity_ceiling")
    if config.gallery.search == "compressed" and info.compression is None:
        raise GalleryMismatchError(f"{url} has no compressed indexes for gallery.search; build it with --compress")
    if config.fuse.k >= info.count:
        raise GalleryNotFoundError(f"{url} holds {info.count} codes, fuse.k = {config.fuse.k} needs more")
    return url, info


def _made(
    config: Config, run: Run, say: Callable[[str], None], stop: Callable[[], bool]
) -> tuple[str, GalleryInfo]:
    """URL and description of the synthetic gallery in the run's folder; makes it where it is not there."""
    if config.fuse.identity_ceiling is not None:
        raise GalleryMismatchError("fuse.identity_ceiling needs gallery.url: people who do not exist have no identity")
    if config.gallery.search == "compressed":
        raise GalleryMismatchError("gallery.search=compressed needs gallery.url, of a gallery built with --compress")
    url = run.path(f"gallery/{synthetic_name(config)}")
    try:
        return url, read_info(url)
    except GalleryNotFoundError:
        say(f"making a gallery of {config.gallery.synthetic} synthetic people")
        try:
            return url, build_synthetic(url, config, stop)
        except GalleryExistsError:  # another driver was quicker, or the answer to our own commit was lost
            return url, read_info(url)


def _version_for(config: Config, run: Run) -> str:
    """URL of the gallery, or of the version of it, that a run is to use (``gallery.version``)."""
    url = absolute(config.gallery.url)
    store, wanted = Store(url), config.gallery.version
    if store.folder.exists(INDEX):  # a gallery without versions, or a version's own folder
        return url
    current = store.current()
    if current is None:
        raise GalleryNotFoundError(f"no finished gallery at {url}")
    if wanted == "kept":
        before = run.read_json("run.json").get("gallery", {}) if run.has("run.json") else {}
        wanted = before["version"] if before.get("version") and before.get("store") == url else "current"
        if wanted != "current" and not store.version(wanted).exists(INDEX):
            raise GalleryNotFoundError(
                f"{url} has no version {wanted} any more, with which {run.url} began; "
                f"--set gallery.version=current goes on with {current}, and fuses all faces anew"
            )
    return store.version(current if wanted == "current" else wanted).url


def expected_weights(config: Config) -> dict[str, str]:
    """Fingerprints of the networks that a gallery's codes and embeddings have to come from, by their part."""
    store = config.engine.models
    return {
        "generator": fingerprints.mapping_fingerprint(config.generator, store),
        "encoder": fingerprints.encoder_fingerprint(config.encoder, store),
        "recogniser": fingerprints.recogniser_fingerprint(fingerprints.INVERSION_RECOGNISER),
    }
