"""``scol plan``: what protecting a source would take on this machine."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from cluster.session import usable_cpus
from pipelines.archive.listing import list_source
from pipelines.archive.paths import SourceError
from pipelines.archive.reading import read_bytes
from pipelines.config.sections import Config
from pipelines.networks.load import Networks
from pipelines.photos.codec import decode
from pipelines.photos.photo import Limits, PhotoError
from pipelines.run.folder import Run, RunError
from pipelines.run.text import duration
from pipelines.stages.pools import layout
from pipelines.stages.treatments import settings_of
from scol_ops.attack import AttackSettings, attack
from scol_ops.inversion import InvertSettings, invert
from scol_ops.models.recognisers import ffhq_mean_geometry
from scol_ops.refinement import RefineSettings, refine
from scol_ops.tuning import TuneSettings, tune


def plan(src: str, config: Config, *, run_url: str | None = None, sample: int = 16, seed: int = 0) -> dict[str, Any]:
    """What protecting SRC would take on this machine.

    Faces are counted in a random sample; seconds a face come from an earlier run where one is named, else from
    timing a few steps of every kind here.

    Raises:
        SourceError, ProtectError: SRC cannot be used.  RunError: the earlier run has no finished face.
    """

    listing = list_source(src)
    good, size = len(listing) - len(listing.failed), 0
    places = set(random.Random(seed).sample(range(good), min(sample, good)))
    chosen = []
    for place, row in enumerate(row for row in listing.rows() if row.error is None):
        size += row.size or 0
        if place in places:
            chosen.append(row)
    detector = Networks(config).detector
    counts, unreadable = [], 0
    for row in chosen:
        try:
            limits = Limits(config.align.max_pixels, config.align.max_bytes)
            counts.append(len(detector.detect([decode(read_bytes(row.url, limits.max_bytes), limits).pixels])[0]))
        except (PhotoError, SourceError):
            unreadable += 1
    mean = sum(counts) / len(counts) if counts else 0.0
    spread = (sum((c - mean) ** 2 for c in counts) / max(1, len(counts) - 1)) ** 0.5 if counts else 0.0
    readable = good * len(counts) / max(1, len(chosen))
    faces = mean * readable
    error = spread / math.sqrt(len(counts)) * readable if len(chosen) < good and counts else 0.0

    if run_url is not None:
        earlier = Run(run_url).read_json("summary.json")
        if not earlier.get("seconds_per_face"):
            raise RunError(f"{run_url} has no finished face to take times from")
        per_face, basis = earlier["seconds_per_face"], f"{earlier['faces']} faces of {run_url}"
        threads = 1
    else:
        per_face, threads = calibrate(config)
        basis = f"a few steps timed now with {threads} thread(s), times the steps of the configuration"
    pools = layout(config, [_this_machine()])
    workers = pools["generator"].actors
    seconds = faces * per_face / workers
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    words = {
        "photos": f"{len(listing)}" + (f", {len(listing) - good} of them unusable" if good < len(listing) else ""),
        "bytes": f"{size / 1e6:.1f} MB",
        "faces": f"about {faces:.0f} +- {error:.0f} ({mean:.2f} a photo in a sample of {len(chosen)}, "
        f"{unreadable} unreadable)",
        "time a face": f"{per_face:.1f} s ({basis})",
        "workers": f"{workers} here",
        "time": f"about {duration(seconds)}" + _more_words(config, run_url),
        "memory": f"about {peak / 2**30:.1f} GiB a worker (measured now)" if run_url is None else "not measured",
    }
    return {
        "photos": len(listing),
        "unusable": len(listing) - good,
        "bytes": size,
        "skipped": listing.skipped,
        "sampled": len(chosen),
        "sample_unreadable": unreadable,
        "faces": round(faces, 1),
        "faces_standard_error": round(error, 1),
        "seconds_per_face": round(per_face, 2),
        "basis": basis,
        "workers": workers,
        "seconds": round(seconds, 1),
        "peak_bytes": peak if run_url is None else None,
        "words": words,
    }


def _more_words(config: Config, run_url: str | None) -> str:
    """Who goes back to the closed loop is known only then; an earlier run's times have it in them."""
    if not config.strengthen.rounds or run_url is not None:
        return ""
    return f", and more for faces that go back (up to {config.strengthen.rounds} round(s) of {config.strengthen.steps} steps)"


def _this_machine() -> dict[str, float]:


    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "CPU": usable_cpus(),
        "GPU": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "memory": 0.7 * memory,
    }


def calibrate(config: Config) -> tuple[float, int]:
    """Seconds a face by timing a few steps of every operator on a generated face, and the threads used.

    Detection, search and publishing are left out: they take below a second or two.
    """
    networks = Networks(config)
    device = networks.device
    threads = layout(config, [_this_machine()])["generator"].resources.threads
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator, encoder = networks.generator, networks.encoder
        code = generator.mean_code.expand(1, config.num_codes, -1).contiguous()
        with torch.no_grad():
            face = generator(code).clamp(-1, 1)
        landmarks, box = (t.to(device) for t in ffhq_mean_geometry(1, config.crop_size))
        mask = torch.ones_like(face[:, :1])

        def features(names):
            return networks.features(names, landmarks, box)

        def steps(call: Callable[[int], Any], wanted: int) -> float:
            """Seconds of `wanted` steps, from 1 and 4 of them; the first call is thrown away."""
            if not wanted:
                return 0.0
            call(1)
            times = []
            for count in (1, 4):
                begin = time.perf_counter()
                call(count)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
            step = max(0.0, (times[1] - times[0]) / 3)
            return times[0] + step * (wanted - 1)

        tuning, refining = settings_of(TuneSettings, config.tune), settings_of(RefineSettings, config.refine)
        total = steps(
            lambda n: tune(
                generator,
                code,
                face,
                mask,
                features(config.tune.identity),
                config.tune.margin_of_each(),
                dataclasses.replace(tuning, steps=n, target_psnr=1000.0),
            ),
            tuning.steps,
        )
        if config.refines:
            total += steps(
                lambda n: refine(
                    face,
                    face,
                    mask,
                    features(config.refine.identity),
                    config.refine.margin_of_each(),
                    None,
                    dataclasses.replace(refining, steps=n),
                ),
                refining.steps,
            )
        inverting = InvertSettings(**config.invert.model_dump())
        total += steps(
            lambda n: invert(encoder, face, generator, dataclasses.replace(inverting, refine_steps=n)),
            inverting.refine_steps,
        )
        if config.attack.enabled:
            attacking = settings_of(AttackSettings, config.attack)
            total += steps(
                lambda n: attack(
                    networks.encode,
                    face,
                    code,
                    torch.ones_like(code, dtype=torch.bool),
                    mask,
                    dataclasses.replace(attacking, steps=n),
                ),
                attacking.steps,
            )
        return total, threads
    finally:
        torch.set_num_threads(before)
