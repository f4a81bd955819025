"""The one typed configuration of a run: fields with units and ranges, and how a stage's part enters its key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from pipelines.config.names import (
    ALL_RECOGNISERS,
    CEILING,
    EMBEDDED,
    EMBEDDED_CODES,
    ENCODER,
    ENCODERS,
    GENERATORS,
    MARGINS,
    REFINE_MARGINS,
    codes_of_encoder,
    trunk_of,
)
from scol_ops.distortions import NONE, Distortion
from scol_ops.models import catalogue as public_models

# Options at their default are left out of the hashed configuration, so a new option does not invalidate old keys.
# Each line: the section, the option, its default, and the options left out where it has that.
_OMITTED_AT_DEFAULT: tuple[tuple[str, str, Any, tuple[str, ...]], ...] = (
    ("fuse", "source", "similar", ("source",)),
    ("fuse", "target", "least", ("target",)),
    ("mask", "scale", 1, ("scale",)),
    ("mask", "features", 1, ("features",)),
    ("tune", "perceptual", "ssim", ("perceptual", "lpips_weight")),
    ("tune", "blur", False, ("blur",)),
    ("tune", "jpeg_quality", None, ("jpeg_quality",)),
    ("attack", "momentum", 0, ("momentum",)),
    ("attack", "translation_sigma", 0, ("translation_sigma",)),
    ("publish", "min_jod", 0, ("min_jod",)),
)
# What the closed loop goes by, of the section publish.
_LOOKED_AT = ("judge", "max_ism", "max_ism_distorted", "min_jod", "distortions")


def _none_word(value: Any) -> Any:
    """TOML has no null: the word ``none`` stands for it."""
    return None if isinstance(value, str) and value.strip().lower() in ("none", "null", "") else value


def _split(value: Any) -> Any:
    """``a,b`` for a list, so that --set needs no brackets; a single number for a list of one."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,) if isinstance(value, int | float) else value


def _split_integers(value: Any) -> Any:
    return tuple(map(str.strip, value.split(","))) if isinstance(value, str) else _split(value)


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_split)]
QualityRange = Annotated[Annotated[tuple[int, int], BeforeValidator(_split)] | None, BeforeValidator(_none_word)]


class Section(BaseModel):
    """Frozen, strict about unknown keys; NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class AlignConfig(Section):
    """Reading photos, finding faces, cutting FFHQ crops."""

    min_face_size: float = Field(20.0, ge=12, le=1000, description="smallest face searched for, px of the search copy")
    min_confidence: float = Field(0.9, ge=0, lt=1, description="least confidence of a face, 0..1")
    max_side: int = Field(1600, ge=100, le=20000, description="longest side of the detector's search copy, px")
    max_faces: int = Field(
        99, ge=1, le=99, description="most faces of a photo; a photo with more fails, none is left out"
    )
    max_pixels: int = Field(100_000_000, ge=1, description="larger photos are refused before decoding, px")
    max_bytes: int = Field(512 * 1024 * 1024, ge=1, description="larger files are refused before reading, bytes")


class InvertConfig(Section):
    """Face to W+ code: the encoder, then optional gradient steps on the code."""

    refine_steps: int = Field(
        0, ge=0, le=2000, description="Adam steps on the code after the encoder; 0: encoder alone"
    )
    lr: float = Field(0.02, gt=0, le=1, description="learning rate of these steps")
    stay: float = Field(0.1, ge=0, le=100, description="weight of the squared distance to the encoder's code")


class GalleryConfig(Section):
    """Style codes of other people, searched layer by layer."""

    url: Annotated[str | None, BeforeValidator(_none_word)] = Field(
        None, description="folder or fsspec URL of a gallery; none: a synthetic one is made in the run's folder"
    )
    version: str = Field(
        "kept",
        pattern=r"kept|current|[0-9]{6}-[0-9a-f]{12}",
        description="which version of `gallery.url`: kept, the one that the run began with, at first the current one | "
        "current, the current one, so that all faces are fused anew where it is another | a version's name",
    )
    search: Literal["exact", "compressed"] = Field(
        "exact",
        description="exact, over all codes in memory | compressed, by the FAISS indexes that the gallery was built "
        "with, "
        "which may miss a code (docs/gallery.md)",
    )
    shards: int = Field(
        1,
        ge=1,
        le=1024,
        description="actors that the gallery's layers and rows are spread over (exact search); 1: the whole in one",
    )
    synthetic: int = Field(20_000, ge=2, le=10_000_000, description="codes of the synthetic gallery")
    synthetic_seed: int = Field(0, ge=0, lt=2**63, description="its seed")
    truncation: float = Field(1.0, gt=0, le=1, description="its truncation psi; 1: full variety")
    similarity: Literal["centred", "cosine", "raw"] = Field(
        "centred", description="similarity of codes: minus the layer's mean and unit norm | unit norm | dot product"
    )


class FuseConfig(Section):
    """Identity-obfuscating fusion of the most similar codes of other people."""

    source: Literal["similar", "random"] = Field(
        "similar",
        description="the k most similar codes of other people | one code of other people, drawn by the face's seed, "
        "for "
        "comparison with them (k and weighting say nothing then; exact search alone)",
    )
    target: Literal["least", "random"] = Field(
        "least",
        description="what the attack moves to: at each layer the least similar code (the paper) | one code of other "
        "people, drawn by the face's seed, for comparison (exact search alone)",
    )
    k: int = Field(10, ge=1, le=1000, description="most similar codes to fuse, at each layer")
    weighting: Literal["mean", "softmax"] = Field("mean", description="plain mean, or softmax of the similarities")
    temperature: float = Field(0.1, gt=0, le=100, description="of the softmax, in units of similarity")
    layers: Annotated[tuple[int, ...] | None, BeforeValidator(_split_integers), BeforeValidator(_none_word)] = Field(
        None, description="layers that take the fused code, 0..L-1, the others keep the face's own; none: all"
    )

    identity_ceiling: Annotated[float | None, BeforeValidator(_none_word)] = Field(
        None,
        ge=-1,
        le=1,
        description="codes of faces whose MobileFaceNet cosine to the face is above are left out, besides those of the "
        "same "
        "photo and person; needs a gallery made of photos; none: off",
    )

    @field_validator("layers")
    @classmethod
    def _in_range(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and (not layers or any(layer < 0 for layer in layers)):
            raise ValueError(f"layers are 0..L-1, at least one: {layers}")
        return layers


def _margins_field(defaults: dict[str, float]) -> Any:
    public = public_models.RECOGNISERS
    words = ", ".join(f"{name} {margin:g}" for name, margin in defaults.items() if name not in public)
    words += f", public recognisers {defaults[public[0]]:g}"
    return Field(
        (), description=f"cosine to the original below which the hinge rests, one a feature, -1..1; empty: {words}"
    )


class IdentitySection(Section):
    """Common to the sections that steer by identity features."""

    default_margins: ClassVar[dict[str, float]] = MARGINS

    identity: Names = Field(
        ("mobilefacenet", "dlib_resnet"),
        description=f"identity features: any of {', '.join((*ALL_RECOGNISERS, ENCODER))}; empty: none",
    )
    margins: Numbers = _margins_field(MARGINS)

    @field_validator("identity")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        known = (*ALL_RECOGNISERS, ENCODER)
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ValueError(
                    f"unknown identity feature {name!r}"
                    + (f", did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}")
                )
        if len(set(names)) < len(names):
            raise ValueError("an identity feature is named twice")
        return names

    @field_validator("margins")
    @classmethod
    def _cosines(cls, margins: tuple[float, ...]) -> tuple[float, ...]:
        if any(not -1 <= m <= 1 for m in margins):
            raise ValueError(f"margins are cosines, -1..1: {margins}")
        return margins

    @model_validator(mode="after")
    def _one_margin_each(self):
        if self.margins and len(self.margins) != len(self.identity):
            raise ValueError(f"{len(self.margins)} margins for {len(self.identity)} identity features")
        return self

    def span_of_each(self) -> tuple[float, ...]:
        """From the cosine of different people to 1, one for each identity feature: what a margin is compared in."""
        return tuple(1 - MARGINS[name] for name in self.identity)

    def margin_of_each(self) -> tuple[float, ...]:
        """One margin for each identity feature."""
        return self.margins or tuple(self.default_margins[name] for name in self.identity)


class MaskConfig(Section):
    """Where a face may change."""

    scale: float = Field(
        1.7,
        gt=0,
        le=4,
        description="outline of the change; 1: the face alone, 1.7: with hair, ears and what is beside them",
    )
    features: float = Field(
        0.9, ge=0, le=1, description="share of the change that brows, eyes, nose and mouth may have, where people look"
    )


class TuneConfig(IdentitySection):
    """Generator tuning with the id-lock."""

    steps: int = Field(0, ge=0, le=10_000, description="Adam steps on the generator's weights")
    lr: float = Field(5e-4, gt=0, le=1e-2, description="learning rate (2e-3 diverged when it was tried)")
    parameters: Literal["all", "convolutions", "late"] = Field("late", description="which generator weights move")
    l2_weight: float = Field(10.0, ge=0, le=1e4, description="weight of the pixel L2")
    ssim_weight: float = Field(1.0, ge=0, le=1e4, description="weight of 1 - multi-scale SSIM")
    perceptual: Literal["ssim", "auto", "lpips-alex", "lpips-vgg"] = Field(
        "ssim",
        description="what stands beside the pixel L2: multi-scale SSIM | LPIPS if the model store has it, else SSIM | "
        "LPIPS (AlexNet) | LPIPS (VGG16)",
    )
    lpips_weight: float = Field(1.0, ge=0, le=1e4, description="weight of LPIPS where it is used, in place of SSIM's")
    id_lock: float = Field(0.3, ge=0, le=1e3, description="the paper's lambda of the id-lock")
    hinge: float = Field(0.3, ge=0, le=1e3, description="weight of the hinge on the cosine to the original")
    diversity: float = Field(
        1.0, ge=0, le=2, description="strength of random resize and shift before the features; 0: none"
    )
    blur: bool = Field(False, description="random blur as well (EOT)")
    jpeg_quality: QualityRange = Field(
        None, description="random JPEG of a quality in this range (1..100) as well (EOT); none: off"
    )
    residual_sigma: float = Field(
        0.0, ge=0, le=32, description="Gaussian low-pass of the residual, px of the crop; 0: none"
    )
    target_psnr: float = Field(40.0, ge=0, le=100, description="stop early at this PSNR with the hinge met, dB")
    bf16: bool = Field(True, description="generator in bfloat16 autocast, where the device has instructions for it")


class RefineConfig(IdentitySection):
    """Refinement of the tuned residual in pixels."""

    default_margins: ClassVar[dict[str, float]] = REFINE_MARGINS

    margins: Numbers = _margins_field(REFINE_MARGINS)
    steps: int = Field(120, ge=0, le=10_000, description="Adam steps on the residual; 0: off")
    lr: float = Field(0.02, gt=0, le=1, description="learning rate, units of [-1, 1] a step")
    start: float = Field(0.0, ge=0, le=1, description="share of the tuned residual to begin with; 0: from the photo")
    seen: float = Field(
        1.3, ge=0, le=1e4, description="weight of what a person sees of the change, JOD lost; 0: nobody looks"
    )
    surroundings: float = Field(
        0.4, ge=0, le=1, description="how much a place outside the middle of the crop counts in it"
    )
    zoom: float = Field(
        1.0, gt=0, le=16, description="how many times the photo is enlarged where it is looked at; JOD is told at 1"
    )
    hinge: float = Field(1.0, ge=0, le=1e3, description="weight of the hinge on the cosine to the original")
    id_lock: float = Field(0.0, ge=0, le=1e3, description="weight of the pull to the fused identity")
    draws: int = Field(1, ge=1, le=64, description="random transformations before the features, at each step")
    diversity: float = Field(1.0, ge=0, le=2, description="strength of random resize and shift before the features")
    blur: bool = Field(True, description="random blur as well (EOT)")
    jpeg_quality: QualityRange = Field(
        (60, 95), description="random JPEG of a quality in this range (1..100) as well (EOT); none: off"
    )
    photo_scale: bool = Field(True, description="the features see the face at the size that it has in the photo")
    shrink: float = Field(
        0.7, ge=0, le=1, description="share of the draws in which they see it smaller, down to less than half (EOT)"
    )
    limit: float = Field(14 / 255, ge=0, le=1, description="largest change of a pixel, in [0, 1] pixel units; 0: none")
    chroma: float = Field(
        0.35, ge=0, le=1, description="share of the change of colour that stays; 0: lightness alone changes"
    )
    residual_sigma: float = Field(
        0.8,
        ge=0,
        le=32,
        description="Gaussian low-pass of the residual, px of the photo or of the crop, whichever are larger; 0: none",
    )


class InspectConfig(Section):
    """Latent component inspection: which components the attack may use."""

    tau: float = Field(3.0, ge=0, le=1e6, description="a component is identity related where |w_inv - w| <= tau units")
    unit: Literal["absolute", "std"] = Field(
        "std",
        description="unit of tau: the code's own numbers, or standard deviations of each component over the gallery",
    )


class AttackConfig(Section):
    """Identity inversion attack: PGD on the pixels through the encoder."""

    enabled: bool = Field(False, description="off: the refined face is published as it is")
    eps: float = Field(
        1 / 255,
        ge=0,
        le=1,
        description="bound of the change, in [0, 1] pixel units (paper: 8/255)",
    )
    steps: int = Field(10, ge=0, le=1000, description="PGD steps")
    step_size: float = Field(0.25 / 255, ge=0, le=1, description="of one signed step, in [0, 1] pixel units")
    random_start: float = Field(1.0, ge=0, le=1, description="share of eps of the random start")
    diversity: float = Field(0.0, ge=0, le=2, description="random resize and shift (EOT); 0: the paper")
    blur: bool = Field(False, description="random blur (EOT)")
    jpeg_quality: QualityRange = Field(None, description="random JPEG quality range (EOT), 1..100; none: off")
    momentum: float = Field(0.0, ge=0, le=1, description="decay of earlier steps' gradients (MI); 0: the paper")
    translation_sigma: float = Field(
        0.0, ge=0, le=32, description="Gaussian smoothing of the gradient, px of the crop (TI); 0: the paper"
    )


class StrengthenConfig(Section):
    """Closed loop: each face gets the smallest share of its change at which the judge does not know it in the photo's
    file, as saved and after `publish.distortions`; where the whole does not hide it, and shows less than
    `publish.min_jod` allows, it is refined and attacked again."""

    rounds: int = Field(1, ge=0, le=20, description="most rounds of a stronger change; 0: none")
    steps: int = Field(40, ge=0, le=10_000, description="refinement steps of a round")
    seen_factor: float = Field(2.0, ge=1, le=100, description="`refine.seen` is divided by it each round")
    looks: int = Field(
        4,
        ge=0,
        le=16,
        description="looks at shares of a change after that at the whole, each halving what is left to search; 0 with "
        "no rounds: the stage is left out",
    )


class PublishConfig(Section):
    """Paste-back, saving, and the verdict on the saved file."""

    judge: str = Field(
        "faceres", description=f"recogniser of the verdict, one of {', '.join(ALL_RECOGNISERS)}; never used inside"
    )
    max_ism: Annotated[
        Annotated[float, Field(ge=-1, le=1)] | Literal["threshold"] | None, BeforeValidator(_none_word)
    ] = Field(
        None,
        description="ok up to this cosine to the original, weak above; none: the judge's bar, above which it may know "
        "the "
        "person in other photos (docs/results.md) | threshold: its threshold, below which it takes even the very photo "
        "for "
        "another person's",
    )
    distortions: Names = Field(
        ("jpeg75+half",),
        description="transformations after which the judge looks at each face of the saved file again, named as for "
        "`scol evaluate --distortion`; empty: none",
    )
    judge_distorted: bool = Field(
        True,
        description="what the judge sees after `publish.distortions` decides the verdict too; false: it is only told",
    )
    max_ism_distorted: Annotated[float | None, BeforeValidator(_none_word)] = Field(
        None, ge=-1, le=1, description="the bar after `publish.distortions`; none: the same as of the file as saved"
    )
    min_psnr: float = Field(0.0, ge=0, le=100, description="weak below this PSNR over the face crop, dB; 0: no limit")
    min_jod: float = Field(
        9.2,
        ge=0,
        le=10,
        description="weak below this JOD of the face window (10: no difference is seen, 9: three of four viewers tell "
        "both apart); 0: no limit",
    )
    on_fail: Literal["skip", "copy"] = Field(
        "skip", description="a photo with a failed face: leave it out, or copy it unprotected"
    )

    @field_validator("judge")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ALL_RECOGNISERS:
            raise ValueError(f"unknown recogniser {name!r}; there are {', '.join(ALL_RECOGNISERS)}")
        return name

    @field_validator("distortions")
    @classmethod
    def _known_distortions(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            Distortion(name)
        if NONE in names or len(set(names)) < len(names):
            raise ValueError(f"each once, and without {NONE!r}, the file as saved, which is always looked at: {names}")
        return names


class EngineConfig(Section):
    """How the work is spread. Enters no key: results do not depend on it."""

    workers: Annotated[int | None, BeforeValidator(_none_word)] = Field(
        None, ge=1, le=4096, description="actors that hold a generator; none: one a GPU, or as cores allow"
    )
    threads: Annotated[int | None, BeforeValidator(_none_word)] = Field(
        None, ge=1, le=256, description="PyTorch threads of such an actor; none: its share of the cores, at most 4"
    )
    shard_photos: Annotated[int | None, BeforeValidator(_none_word)] = Field(
        None, ge=1, le=1024, description="most photos in one part; none: by the size of the run, at most 16"
    )
    align_batch: int = Field(8, ge=1, le=256, description="photos that are decoded and searched for faces together")
    face_seconds: float = Field(600.0, gt=0, le=86400, description="time limit of a face at one stage, s")
    stop_after_errors: int = Field(
        50,
        ge=0,
        le=1_000_000,
        description="the run stops where so many photos of a stage ended in the same type of exception and none ended "
        "well "
        "before: a broken installation; photos that are bad for reasons of their own do not count; 0: never",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where networks run; auto: a GPU if there is one"
    )
    ray_address: Annotated[str | None, BeforeValidator(_none_word)] = Field(
        None, description="of a running Ray cluster (HOST:PORT or auto); none: a local one is started"
    )
    models: Annotated[str | None, BeforeValidator(_none_word)] = Field(
        None,
        description="model store, a folder or fsspec URL that all nodes read; none: $SCOL_MODELS, else the user's "
        "cache folder",
    )


def _one_of(name: str, what: str, known: Sequence[str]) -> str:
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f", did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
        raise ValueError(f"unknown {what} {name!r}{hint}")
    return name


class Config(Section):
    """Everything that a run of ``scol protect`` depends on besides the photos and the weights."""

    seed: int = Field(0, ge=0, lt=2**63, description="of the run; each face's own is hashed from it and the face's id")
    generator: str = Field(
        "mobilestylegan-256",
        description=f"generator, and with it the crop's size in px; one of {', '.join(GENERATORS)} (docs/models.md)",
    )
    encoder: str = Field(
        EMBEDDED,
        description=f"encoder to the generator's W+, one of {', '.join(ENCODERS)} (docs/models.md)",
    )
    align: AlignConfig = AlignConfig()
    invert: InvertConfig = InvertConfig()
    gallery: GalleryConfig = GalleryConfig()
    fuse: FuseConfig = FuseConfig()
    mask: MaskConfig = MaskConfig()
    tune: TuneConfig = TuneConfig()
    refine: RefineConfig = RefineConfig()
    inspect: InspectConfig = InspectConfig()
    attack: AttackConfig = AttackConfig()
    strengthen: StrengthenConfig = StrengthenConfig()
    publish: PublishConfig = PublishConfig()
    engine: EngineConfig = EngineConfig()

    @field_validator("generator")
    @classmethod
    def _known_generator(cls, name: str) -> str:
        return _one_of(name, "generator", tuple(GENERATORS))

    @field_validator("encoder")
    @classmethod
    def _known_encoder(cls, name: str) -> str:
        return _one_of(name, "encoder", ENCODERS)

    @model_validator(mode="after")
    def _consistent(self):
        given = codes_of_encoder(self.encoder)
        if given != self.num_codes:
            fitting = [name for name in ENCODERS if codes_of_encoder(name) == self.num_codes]
            raise ValueError(
                f"generator {self.generator!r} takes {self.num_codes} codes, encoder {self.encoder!r} gives {given}: "
                f"W+ does not agree; encoders that fit: {', '.join(fitting)}"
            )
        if self.fuse.layers is not None and max(self.fuse.layers) >= self.num_codes:
            raise ValueError(
                f"fuse.layers: layers are 0..{self.num_codes - 1} with {self.generator!r}: {self.fuse.layers}"
            )
        for section in ("tune", "refine"):
            if self.publish.judge in getattr(self, section).identity:
                raise ValueError(
                    f"publish.judge: {self.publish.judge!r} is in {section}.identity; what is used inside never judges"
                )
        through = [name for name in ("tune", "refine") if ENCODER in getattr(self, name).identity]
        if self.publish.judge == self.encoder_trunk and (through or self.attack.enabled):
            raise ValueError(
                f"publish.judge: {self.encoder_trunk!r} is part of the encoder, which {(through or ['attack'])[0]} "
                "works through; "
                "what is used inside never judges"
            )
        if self.publish.judge == CEILING and self.fuse.identity_ceiling is not None:
            raise ValueError(
                f"publish.judge: fuse.identity_ceiling chooses by {CEILING!r}; what is used inside never judges"
            )
        for section in ("tune", "refine", "attack"):
            quality = getattr(self, section).jpeg_quality
            if quality is not None and not 1 <= quality[0] <= quality[1] <= 100:
                raise ValueError(f"{section}.jpeg_quality: LOW,HIGH with 1 <= LOW <= HIGH <= 100, got {quality}")
        if self.strengthen.rounds and not self.refines_again and not self.attacks_again:
            raise ValueError("strengthen.rounds: neither refinement nor attack is there to be strengthened")
        for name in ("source", "target"):
            if getattr(self.fuse, name) == "random" and self.gallery.search != "exact":
                raise ValueError(
                    f"fuse.{name}: random needs gallery.search = exact, since indexes find what is similar"
                )
        if self.fuse.source == "random" and self.fuse.identity_ceiling is not None:
            raise ValueError("fuse.identity_ceiling: fuse.source = random does not look at it")
        if self.gallery.url is None and self.fuse.k >= self.gallery.synthetic:
            raise ValueError(f"fuse.k: {self.fuse.k} codes cannot come from a gallery of {self.gallery.synthetic}")
        return self

    @property
    def crop_size(self) -> int:
        """Side of the aligned crop in px: the generator's resolution."""
        return GENERATORS[self.generator]

    @property
    def num_codes(self) -> int:
        """L: how many codes the generator takes."""
        return public_models.codes_of(self.crop_size) if self.generator in public_models.GENERATORS else EMBEDDED_CODES

    @property
    def refines(self) -> bool:
        """Whether ``tune`` refines."""
        return bool(self.refine.steps and self.refine.identity)

    @property
    def refines_again(self) -> bool:
        """Whether rounds of ``strengthen`` refine: a refinement that is off stays off there."""
        return bool(self.strengthen.rounds and self.refines and self.strengthen.steps)

    @property
    def attacks_again(self) -> bool:
        """Whether rounds of ``strengthen`` attack."""
        return bool(self.strengthen.rounds and self.attack.enabled)

    def has_stage(self, stage: str) -> bool:
        """Whether a run makes this stage of ``names.STAGES``: one without anything to do is left out."""
        return stage != "strengthen" or self.strengthen.rounds > 0 or self.strengthen.looks > 0

    @property
    def encoder_trunk(self) -> str:
        """The recogniser that the encoder reads the features of, or was made from."""
        return trunk_of(self.encoder)

    def stage_config(self, stage: str) -> dict[str, Any]:
        """The part of the configuration that a stage's result depends on; it enters the stage's key."""

        def of(section: str) -> dict[str, Any]:
            said = getattr(self, section).model_dump(mode="json")
            off = [left for name, key, value, left in _OMITTED_AT_DEFAULT if name == section and said[key] == value]
            return {key: value for key, value in said.items() if not any(key in left for left in off)}

        parts: dict[str, dict[str, Any]] = {
            "align": {"align": of("align"), "crop_size": self.crop_size, "seed": self.seed},
            "invert": {"invert": of("invert"), "generator": self.generator},
            "fuse": {"fuse": of("fuse")},
            # A refinement that is off has no settings: what its defaults are matters to nobody then.
            # The mask of later stages is in their keys through this one's.
            "tune": {
                "tune": of("tune"),
                "refine": of("refine") if self.refine.steps else {"steps": 0},
                **({"mask": mask} if (mask := of("mask")) else {}),
            },
            "attack": {"inspect": of("inspect"), "attack": of("attack")},
            # The settings of refinement and attack are in the keys of the stages before.
            "strengthen": {
                "strengthen": of("strengthen"),
                "publish": {name: value for name, value in of("publish").items() if name in _LOOKED_AT},
            },
            "publish": {"publish": of("publish")},
        }
        if stage not in parts:
            raise ValueError(f"no stage {stage!r}; there are {', '.join(parts)}")
        return parts[stage]

    def canonical(self, stage: str) -> str:
        """``stage_config`` as JSON with sorted keys: equal text for equal settings."""
        return json.dumps(self.stage_config(stage), sort_keys=True, separators=(",", ":"))
