"""What more than one stage does to a face: refinement and attack, as the configuration says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from pipelines.config.sections import Config, Section
from pipelines.networks import load as networks
from pipelines.stages.crops import as_codes, geometry_in_crop, photo_side
from pipelines.stages.rows import Row
from scol_ops.attack import AttackResult, AttackSettings, attack
from scol_ops.inspection import inspect_components
from scol_ops.refinement import RefineSettings, refine
from scol_ops.tuning import TuneResult


def settings_of(kind: type, section: Section):
    """An operator's settings from the section that has fields of the same names."""
    return kind(**{field.name: getattr(section, field.name) for field in fields(kind)})


class Refiner:
    """Refinement of one face, as the configuration says.

    Args:
        device: where the features' networks are loaded, and for the id-lock the generator.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config, self._device, store = config, device, config.engine.models
        networks.load_features(config.refine.identity, device, config.encoder, store)
        self._generator = networks.generator(config.generator, device, store) if config.refine.id_lock else None

    def __call__(
        self,
        row: Row,
        fused: np.ndarray | None,
        picture: Tensor,
        original: Tensor,
        mask: Tensor,
        margins: Sequence[float],
        settings: RefineSettings,
        seed: int,
        deadline: float,
    ) -> TuneResult:
        """Refine a picture (1, 3, S, S) of the face of a row with ``align``'s geometry.

        Args:
            fused: the face's fused code, a manifest's vector; needed for the id-lock alone.
            picture, original, mask, margins, settings, seed, deadline: see ``refine``.
        """
        config, device = self._config, self._device
        landmarks, box = geometry_in_crop(row, config.crop_size, device, "align.")
        identity = [
            networks.identity_feature(name, device, landmarks, box, config.encoder, config.engine.models)
            for name in config.refine.identity
        ]
        locked = None
        if self._generator is not None:
            with torch.no_grad():
                first = self._generator(as_codes(fused, device)).clamp(-1, 1)
                locked = [feature(first) for feature in identity]
        return refine(
            picture,
            original,
            mask,
            identity,
            margins,
            locked,
            settings,
            seed=seed,
            deadline=deadline,
            photo_side=photo_side(row, "align."),
        )


class Attacker:
    """Inspection and attack of one face, as the configuration says.

    Args:
        std: (L, 512) of the gallery, where ``inspect.unit`` is ``std``.
        device: where the encoder is loaded.
    """

    def __init__(self, config: Config, std: np.ndarray | None, device: torch.device) -> None:
        self._inspect, self._device = config.inspect, device
        absolute = config.inspect.unit == "absolute"
        self._std = None if absolute else torch.from_numpy(np.array(std, np.float32)).to(device)
        self._encoder = networks.encoder(device, config.encoder, config.engine.models)

    def _look(self, faces: Tensor) -> Tensor:
        return self._encoder(networks.at_encoder_size(faces))

    def __call__(
        self, row: Row, picture: Tensor, mask: Tensor, settings: AttackSettings, seed: int, deadline: float
    ) -> tuple[AttackResult, float]:
        """Attack a picture (1, 3, S, S) of the face of a row with ``invert.code`` and ``fuse.target``.

        Returns:
            the result, and the share of the components that count as identity related.
        """
        own, target = as_codes(row["invert.code"], self._device), as_codes(row["fuse.target"], self._device)
        inspection = inspect_components(own, target, self._inspect.tau, unit=self._inspect.unit, std=self._std)
        result = attack(
            self._look, picture, inspection.target, inspection.mask, mask, settings, seed=seed, deadline=deadline
        )
        return result, float(inspection.share[0])
