"""Stage ``tune``: tune the generator around the fused code, then refine the residual in pixels."""

from __future__ import annotations

from functools import partial

from cluster import Operator, Stage
from pipelines.config.sections import Config
from pipelines.networks.load import Networks
from pipelines.stages.crops import allowed, as_codes, decode_png, encode_png, geometry_in_crop
from pipelines.stages.declaration import GEOMETRY, Setting, declared
from pipelines.stages.rows import Row, each_face
from pipelines.stages.treatments import Refiner, settings_of
from scol_ops.metrics import psnr, ssim, to_uint8
from scol_ops.refinement import RefineSettings
from scol_ops.tuning import TuneResult, TuneSettings, tune


def stage(setting: Setting) -> Stage:
    """Reads the fused codes of ``fuse`` and the crops of ``align``. Each face has its own time limit."""
    joins = {"align": ["crop", *GEOMETRY]}
    return declared(
        "tune", setting, pool="generator", columns=["fused"], joins=joins, shard_items=setting.slow_shard
    )


def operator(config: Config, weights: str) -> Operator:
    """Loads the networks; the result takes rows of ``fuse`` with ``align.crop`` and the face's geometry."""
    networks = Networks(config)
    device, generator, perceptual = networks.device, networks.generator, networks.perceptual
    networks.load_features(config.tune.identity)
    refiner = Refiner(config, networks) if config.refines else None
    tuning, refining = settings_of(TuneSettings, config.tune), settings_of(RefineSettings, config.refine)

    def treat(row: Row, deadline: float) -> Row:
        face, fused = decode_png(row["align.crop"], device), as_codes(row["fused"], device)
        landmarks, box = geometry_in_crop(row, config.crop_size, device, "align.")
        mask = allowed(landmarks, config)
        tuned = tune(
            generator,
            fused,
            face,
            mask,
            networks.features(config.tune.identity, landmarks, box),
            config.tune.margin_of_each(),
            tuning,
            seed=row["seed"],
            deadline=deadline,
            perceptual=perceptual,
        )
        refined = TuneResult(tuned.picture, 0, 0.0)
        if refiner is not None:
            margins, seed = config.refine.margin_of_each(), row["seed"] ^ 1
            refined = refiner(row, row["fused"], tuned.picture, face, mask, margins, refining, seed, deadline)
        original, after = to_uint8(face[0]), to_uint8(refined.picture[0])
        return {
            "tuned": encode_png(tuned.picture),
            "refined": encode_png(refined.picture) if refined.steps else None,
            "psnr": psnr(original, after),
            "ssim": ssim(original, after),
            "tuned_psnr": psnr(original, to_uint8(tuned.picture[0])),
            "tune_steps": tuned.steps,
            "refine_steps": refined.steps,
            "tune_seconds": tuned.seconds,
            "refine_seconds": refined.seconds,
            "history": _history("tune", tuned) + _history("refine", refined),
        }

    return partial(each_face, "tune", weights=weights, limit=config.engine.face_seconds, treat=treat)


def _history(phase: str, result: TuneResult) -> list[Row]:
    names = ("psnr", "reconstruction", "id_lock", "hinge")
    return [
        {"phase": phase, "step": step} | {name: losses.get(name) for name in names}
        for step, losses in enumerate(result.history)
    ]
