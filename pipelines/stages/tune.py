"""Stage ``tune``: tune the generator around the fused code, then refine the residual in pixels."""

from __future__ import annotations

from dataclasses import fields
from functools import partial

import torch

from cluster import Operator
from pipelines import models
from pipelines.config import Config, Section
from pipelines.stages.common import Row, as_codes, decode_png, each_face, encode_png, geometry_in_crop, photo_side
from scol_ops.metrics import psnr, ssim, to_uint8
from scol_ops.paste import face_mask
from scol_ops.refinement import RefineSettings, refine
from scol_ops.tuning import TuneResult, TuneSettings, tune


def settings_of(kind: type, section: Section):
    """An operator's settings from the section that has fields of the same names."""
    return kind(**{field.name: getattr(section, field.name) for field in fields(kind)})


def operator(config: Config, weights: str) -> Operator:
    """Loads the networks; the result takes rows of ``fuse`` with ``align.crop`` and the face's geometry."""
    models.set_up()
    device = models.pick_device(config.engine.device)
    store = config.engine.models
    generator = models.generator(config.generator, device, store)
    for name in (*config.tune.identity, *config.refine.identity):
        if name == "encoder":
            models.encoder(device, config.encoder, store)
        else:
            models.recogniser(name, device, store)
    perceptual = None if config.tune.perceptual == "ssim" else models.perceptual(config.tune.perceptual, device, store)
    tuning, refining = settings_of(TuneSettings, config.tune), settings_of(RefineSettings, config.refine)

    def treat(row: Row, deadline: float) -> Row:
        face, fused = decode_png(row["align.crop"], device), as_codes(row["fused"], device)
        landmarks, box = geometry_in_crop(row, config.crop_size, device, "align.")
        mask = face_mask(landmarks, config.crop_size)

        def features(names: tuple[str, ...]):
            return [models.identity_feature(name, device, landmarks, box, config.encoder, store) for name in names]

        tuned = tune(
            generator,
            fused,
            face,
            mask,
            features(config.tune.identity),
            config.tune.margin_of_each(),
            tuning,
            seed=row["seed"],
            deadline=deadline,
            perceptual=perceptual,
        )
        refined = TuneResult(tuned.picture, 0, 0.0)
        if refining.steps and config.refine.identity:
            identity, locked = features(config.refine.identity), None
            if refining.id_lock:
                with torch.no_grad():
                    first = generator(fused).clamp(-1, 1)
                    locked = [feature(first) for feature in identity]
            refined = refine(
                tuned.picture,
                face,
                mask,
                identity,
                config.refine.margin_of_each(),
                locked,
                refining,
                seed=row["seed"] ^ 1,
                deadline=deadline,
                photo_side=photo_side(row, "align."),
            )
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
