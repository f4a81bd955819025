"""Cards of the public models that users may bring: where published, under what licence, what for, what instead.

No torch here: the configuration reads names from it. Nothing is downloaded by this program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SIZES = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class PublicModel:
    """A model that its owner publishes.

    Attributes:
        name: as in the configuration and in ``scol models add``.
        family: key of ``scol_ops.models.checkpoints.FAMILIES``.
        role: ``generator``, ``encoder``, ``recogniser`` or ``perceptual loss``.
        what: in a few words.
        published: where its owner publishes it.
        licence: of the weights, and what it allows in short.
        file: its usual name.
        megabytes: its usual size, MB; of files that have not been seen here, what the entries add up to.
        used_in: stage or setting.
        instead: what to use without it.
        sha256: of the published file, or its beginning (torchvision's names hold eight digits); None: not known.
        facts: what the file must hold.
    """

    name: str
    family: str
    role: str
    what: str
    published: str
    licence: str
    file: str
    megabytes: float
    used_in: str
    instead: str
    sha256: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


_NVIDIA = (
    "NVIDIA Source Code License (1-Way Commercial): research and evaluation only, no commercial use; FFHQ's photos are "
    "under Creative Commons licences of their own"
)


def _stylegan2(size: int) -> PublicModel:
    return PublicModel(
        f"stylegan2-{size}", "stylegan2", "generator", f"StyleGAN2's generator at {size} px",
        "github.com/NVlabs/stylegan2-ada-pytorch (pretrained ffhq.pkl), or converted by "
        "github.com/rosinality/stylegan2-pytorch (stylegan2-ffhq-config-f.pt)", _NVIDIA,
        "stylegan2-ffhq-config-f.pt or ffhq.pkl", 133 if size == 1024 else 120,
        f'generator = "stylegan2-{size}": invert, tune', 'generator = "mobilestylegan-1024" or "mobilestylegan-256"',
        facts={"size": size},
    )  # fmt: skip


def _e4e(size: int) -> PublicModel:
    return PublicModel(
        f"e4e-{size}", "e4e", "encoder", f"the e4e encoder for StyleGAN2 at {size} px",
        "github.com/omertov/encoder4editing (e4e_ffhq_encode.pt)",
        "MIT for the code; the weights were trained against NVIDIA's StyleGAN2-FFHQ, whose licence excludes commercial "
        "use",
        "e4e_ffhq_encode.pt", 1200, f'encoder = "e4e-{size}": invert, attack, identity feature "encoder"',
        'encoder = "embedded", with an embedded generator', facts={"size": size},
    )  # fmt: skip


_CLIP2PROTECT = "github.com/fahadshamshad/Clip2Protect (its models' folder)"
_RECOGNISER = "identity feature (tune.identity, refine.identity) or judge (publish.judge)"
_TORCHVISION = "BSD-3-Clause for the code; trained on ImageNet, whose photos are for non-commercial research"

CARDS: dict[str, PublicModel] = {
    card.name: card
    for card in (
        *map(_stylegan2, SIZES),
        *map(_e4e, SIZES),
        PublicModel(
            "facenet", "facenet", "recogniser", "FaceNet (InceptionResnetV1), VGGFace2",
            "github.com/timesler/facenet-pytorch, release v2.2.9",
            "MIT for code and weights; VGGFace2's photos are for research", "20180402-114759-vggface2.pt", 111,
            _RECOGNISER, "mobilefacenet, dlib_resnet or faceres (embedded)", facts={"classes": 8631},
        ),
        PublicModel(
            "facenet-casia", "facenet", "recogniser", "FaceNet (InceptionResnetV1), CASIA-WebFace",
            "github.com/timesler/facenet-pytorch, release v2.2.9",
            "MIT for code and weights; CASIA-WebFace's photos are for research", "20180408-102900-casia-webface.pt",
            115, _RECOGNISER, "mobilefacenet, dlib_resnet or faceres (embedded)", facts={"classes": 10575},
        ),
        PublicModel(
            "irse50", "irse50", "recogniser", "IR-SE50 (ArcFace)",
            "github.com/TreB1eN/InsightFace_Pytorch (model_ir_se50.pth), linked by encoder4editing and Clip2Protect",
            "MIT for the code; trained on MS1M, which is for research", "model_ir_se50.pth or irse50.pth", 175,
            _RECOGNISER,
            "mobilefacenet, dlib_resnet or faceres (embedded)",
        ),
        PublicModel(
            "ir152", "ir152", "recogniser", "IR152 (ArcFace)", _CLIP2PROTECT,
            "none stated for the weights: ask their owner before any use but research", "ir152.pth", 261, _RECOGNISER,
            "mobilefacenet, dlib_resnet or faceres (embedded)",
        ),
        PublicModel(
            "mobilefacenet-512", "mobilefacenet-512", "recogniser", "MobileFaceNet with 512 numbers a face",
            _CLIP2PROTECT + ", from github.com/TreB1eN/InsightFace_Pytorch",
            "MIT for the code; trained on MS1M, which is for research", "mobile_face.pth", 5, _RECOGNISER,
            "mobilefacenet (embedded, 192 numbers)",
        ),
        PublicModel(
            "lpips-vgg", "lpips-vgg", "perceptual loss",
            "VGG16's features, for LPIPS (its linear layers are in the package)",
            "download.pytorch.org/models (torchvision)", _TORCHVISION, "vgg16-397923af.pth", 528,
            'tune.perceptual = "lpips-vgg" or "auto"', 'tune.perceptual = "ssim": multi-scale SSIM', sha256="397923af",
        ),
        PublicModel(
            "lpips-alex", "lpips-alex", "perceptual loss",
            "AlexNet's features, for LPIPS (its linear layers are in the package)",
            "download.pytorch.org/models (torchvision)", _TORCHVISION, "alexnet-owt-7be5be79.pth", 233,
            'tune.perceptual = "lpips-alex" or "auto"', 'tune.perceptual = "ssim": multi-scale SSIM', sha256="7be5be79",
        ),
    )
}  # fmt: skip

GENERATORS = {card.name: card.facts["size"] for card in CARDS.values() if card.role == "generator"}
ENCODERS = {card.name: card.facts["size"] for card in CARDS.values() if card.role == "encoder"}
RECOGNISERS = tuple(card.name for card in CARDS.values() if card.role == "recogniser")
PERCEPTUAL = tuple(card.name for card in CARDS.values() if card.role == "perceptual loss")


def codes_of(size: int) -> int:
    """L of a StyleGAN2 of this size, and of its encoder."""
    return 2 * (size.bit_length() - 1) - 2


def card_of(name: str) -> PublicModel:
    """A model's card.

    Raises:
        KeyError: unknown; its argument is words for people.
    """
    if name not in CARDS:
        raise KeyError(f"unknown model {name!r}; there are {', '.join(CARDS)}")
    return CARDS[name]
