"""Settings of the operators for tests of their rules: plain values, to be changed by `dataclasses.replace`."""

from __future__ import annotations

from scol_ops.attack import AttackSettings
from scol_ops.refinement import RefineSettings
from scol_ops.tuning import TuneSettings

TUNE = TuneSettings(
    steps=120, lr=3e-4, parameters="all", l2_weight=10.0, ssim_weight=1.0, lpips_weight=1.0, id_lock=1.0, hinge=1.0,
    diversity=1.0, blur=False, jpeg_quality=None, residual_sigma=0.0, target_psnr=40.0, bf16=False,
)  # fmt: skip
REFINE = RefineSettings(
    steps=100, lr=0.01, start=1.0, seen=0.0, surroundings=1.0, zoom=1.0, hinge=1.0, id_lock=0.0, draws=1,
    diversity=1.0, blur=False, jpeg_quality=None, photo_scale=False, shrink=0.0, limit=0.0, chroma=1.0,
    residual_sigma=0.0,
)  # fmt: skip
ATTACK = AttackSettings(
    eps=8 / 255, steps=10, step_size=2 / 255, random_start=1.0, diversity=0.0, blur=False, jpeg_quality=None,
    momentum=0.0, translation_sigma=0.0,
)  # fmt: skip
