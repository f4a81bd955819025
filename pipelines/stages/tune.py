"""Stage ``tune``: tune the generator around the fused code, then refine the residual in pixels."""

from __future__ import annotations

from functools import partial

from cluster import Operator
from pipelines.config.sections import Config
from pipelines.networks import load as networks
from pipelines.stages.crops import as_codes, decode_png, encode_png, geometry_in_crop
from pipelines.stages.rows import Row, each_face
from pipelines.stages.treatments import Refiner, settings_of
from scol_ops.metrics import psnr, ssim, to_uint8
from scol_ops.paste import face_mask
from scol_ops.refinement import RefineSettings
from scol_ops.tuning import TuneResult, TuneSettings, tune


def operator(config: Config, weights: str) -> Operator:
    """Loads the networks; the result takes rows of ``fuse`` with ``align.crop`` and the face's geometry."""
    networks.set_up()
    device = networks.pick_device(config.engine.device)
    store = config.engine.models
    generator = networks.generator(config.generator, device, store)
    networks.load_features(config.tune.identity, device, config.encoder, store)
    refiner = Refiner(config, device) if config.refines else None
    perceptual = None if config.tune.perceptual == "ssim" else networks.perceptual(config.tune.perceptual, device, store)
    tuning, refining = settings_of(TuneSettings, config.tune), settings_of(RefineSettings, config.refine)

    def treat(row: Row, deadline: float) -> Row:
        face, fused = decode_png(row["align.crop"], device), as_codes(row["fused"], device)
        landmarks, box = geometry_in_crop(row, config.crop_size, device, "align.")
        mask = face_mask(landmarks, config.crop_size)
        tuned = tune(
            generator,
            fused,
            face,
            mask,
            [networks.identity_feature(n, device, landmarks, box, config.encoder, store) for n in config.tune.identity],
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
