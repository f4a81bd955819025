"""What more than one stage does to a face: refinement and attack, as the configuration says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from pipelines.config.sections import Config, Section
from pipelines.networks.load import Networks
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
        networks: of the run: those of the features are loaded now, and for the id-lock the generator.
    """

    def __init__(self, config: Config, networks: Networks) -> None:
        self._config, self._networks = config, networks
        networks.load_features(config.refine.identity)
        self._generator = networks.generator if config.refine.id_lock else None

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
        config, device = self._config, self._networks.device
        landmarks, box = geometry_in_crop(row, config.crop_size, device, "align.")
        identity = self._networks.features(config.refine.identity, landmarks, box)
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
            spans=config.refine.span_of_each(),
        )


class Attacker:
    """Inspection and attack of one face, as the configuration says.

    Args:
        std: (L, 512) of the gallery, where ``inspect.unit`` is ``std``.
        networks: of the run; the encoder is loaded now.
    """

    def __init__(self, config: Config, std: np.ndarray | None, networks: Networks) -> None:
        self._inspect, self._networks = config.inspect, networks
        absolute = config.inspect.unit == "absolute"
        self._std = None if absolute else torch.from_numpy(np.array(std, np.float32)).to(networks.device)
        _ = networks.encoder

    def __call__(
        self, row: Row, picture: Tensor, mask: Tensor, settings: AttackSettings, seed: int, deadline: float
    ) -> tuple[AttackResult, float]:
        """Attack a picture (1, 3, S, S) of the face of a row with ``invert.code`` and ``fuse.target``.

        Returns:
            the result, and the share of the components that count as identity related.
        """
        device = self._networks.device
        own, target = as_codes(row["invert.code"], device), as_codes(row["fuse.target"], device)
        inspection = inspect_components(own, target, self._inspect.tau, unit=self._inspect.unit, std=self._std)
        result = attack(
            self._networks.encode,
            picture,
            inspection.target,
            inspection.mask,
            mask,
            settings,
            seed=seed,
            deadline=deadline,
        )
        return result, float(inspection.share[0])
