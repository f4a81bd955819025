"""``scol plan``: what protecting a source would take on this machine."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from cluster.session import usable_cpus
from pipelines.archive.entry import SourceRow
from pipelines.archive.listing import list_source
from pipelines.archive.paths import SourceError
from pipelines.archive.reading import read_bytes
from pipelines.config.sections import Config
from pipelines.networks.load import Networks
from pipelines.photos.codec import decode
from pipelines.photos.photo import PhotoError
from pipelines.run.folder import Run, RunError
from pipelines.run.text import duration
from pipelines.stages.pools import layout
from pipelines.stages.saving import limits_of
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
    counts = count_faces(chosen, config)
    mean = sum(counts) / len(counts) if counts else 0.0
    spread = (sum((c - mean) ** 2 for c in counts) / max(1, len(counts) - 1)) ** 0.5 if counts else 0.0
    readable = good * len(counts) / max(1, len(chosen))
    faces = mean * readable
    error = spread / math.sqrt(len(counts)) * readable if len(chosen) < good and counts else 0.0
    per_face, basis = seconds_a_face(config, run_url)
    workers = layout(config, [_this_machine()])["generator"].actors
    found = {
        "photos": len(listing),
        "unusable": len(listing) - good,
        "bytes": size,
        "skipped": listing.skipped,
        "sampled": len(chosen),
        "sample_unreadable": len(chosen) - len(counts),
        "faces": faces,
        "faces_standard_error": error,
        "seconds_per_face": per_face,
        "basis": basis,
        "workers": workers,
        "seconds": faces * per_face / workers,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if run_url is None else None,
    }
    words = _words(found, mean, _more_words(config, run_url))
    digits = {"faces": 1, "faces_standard_error": 1, "seconds_per_face": 2, "seconds": 1}
    return {**found, **{k: round(found[k], n) for k, n in digits.items()}, "words": words}


def count_faces(rows: list[SourceRow], config: Config) -> list[int]:
    """Faces of each photo, of those that can be read."""
    detector, limits, counts = Networks(config).detector, limits_of(config), []
    for row in rows:
        try:
            counts.append(len(detector.detect([decode(read_bytes(row.url, limits.max_bytes), limits).pixels])[0]))
        except (PhotoError, SourceError):
            continue
    return counts


def seconds_a_face(config: Config, run_url: str | None) -> tuple[float, str]:
    """Seconds, and where they are from: an earlier run where one is named, else `calibrate`.

    Raises:
        RunError: the earlier run has no finished face.
    """
    if run_url is None:
        per_face, threads = calibrate(config)
        return per_face, f"a few steps timed now with {threads} thread(s), times the steps of the configuration"
    earlier = Run(run_url).read_json("summary.json")
    if not earlier.get("seconds_per_face"):
        raise RunError(f"{run_url} has no finished face to take times from")
    return earlier["seconds_per_face"], f"{earlier['faces']} faces of {run_url}"


def _words(found: dict[str, Any], mean: float, more: str) -> dict[str, str]:
    unusable, peak = found["unusable"], found["peak_bytes"]
    return {
        "photos": f"{found['photos']}" + (f", {unusable} of them unusable" if unusable else ""),
        "bytes": f"{found['bytes'] / 1e6:.1f} MB",
        "faces": f"about {found['faces']:.0f} +- {found['faces_standard_error']:.0f} ({mean:.2f} a photo in a sample "
        f"of {found['sampled']}, {found['sample_unreadable']} unreadable)",
        "time a face": f"{found['seconds_per_face']:.1f} s ({found['basis']})",
        "workers": f"{found['workers']} here",
        "time": f"about {duration(found['seconds'])}{more}",
        "memory": "not measured" if peak is None else f"about {peak / 2**30:.1f} GiB a worker (measured now)",
    }


def _more_words(config: Config, run_url: str | None) -> str:
    """How often the closed loop looks, and who goes back, is known only then; an earlier run's times have it in
    them."""
    rounds, steps, looks = config.strengthen.rounds, config.strengthen.steps, config.strengthen.looks
    if not config.has_stage("strengthen") or run_url is not None:
        return ""
    words = f", and more for the closed loop (up to {1 + rounds + looks} looks at a face"
    return words + (f", {rounds} round(s) of {steps} steps for those that it sends back)" if rounds else ")")


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
    threads = layout(config, [_this_machine()])["generator"].resources.threads
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return sum(_seconds(call, steps, networks.device) for call, steps in _operators(config, networks)), threads
    finally:
        torch.set_num_threads(before)


def _operators(config: Config, networks: Networks) -> Iterator[tuple[Callable[[int], Any], int]]:
    """Each operator as a call for so many steps, and the configuration's steps."""
    generator, encoder = networks.generator, networks.encoder
    code = generator.mean_code.expand(1, config.num_codes, -1).contiguous()
    with torch.no_grad():
        face = generator(code).clamp(-1, 1)
    landmarks, box = (t.to(networks.device) for t in ffhq_mean_geometry(1, config.crop_size))
    mask = torch.ones_like(face[:, :1])

    def features(names):
        return networks.features(names, landmarks, box)

    tuning = dataclasses.replace(settings_of(TuneSettings, config.tune), target_psnr=1000.0)
    identity, margins = config.tune.identity, config.tune.margin_of_each()
    yield lambda n: tune(
        generator, code, face, mask, features(identity), margins, dataclasses.replace(tuning, steps=n)
    ), tuning.steps  # fmt: skip
    if config.refines:
        refining = settings_of(RefineSettings, config.refine)
        names, bounds = config.refine.identity, config.refine.margin_of_each()
        yield lambda n: refine(
            face, face, mask, features(names), bounds, None, dataclasses.replace(refining, steps=n)
        ), refining.steps  # fmt: skip
    inverting = InvertSettings(**config.invert.model_dump())
    yield lambda n: invert(
        encoder, face, generator, dataclasses.replace(inverting, refine_steps=n)
    ), inverting.refine_steps  # fmt: skip
    if config.attack.enabled:
        attacking, every = settings_of(AttackSettings, config.attack), torch.ones_like(code, dtype=torch.bool)
        yield lambda n: attack(
            networks.encode, face, code, every, mask,
            dataclasses.replace(attacking, steps=n),
        ), attacking.steps  # fmt: skip


def _seconds(call: Callable[[int], Any], wanted: int, device: torch.device) -> float:
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
