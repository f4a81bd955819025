"""What a photo's file becomes: the faces' changes pasted back, and the whole encoded as the original was.

``strengthen`` judges these bytes and ``publish`` writes them, so both make them here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipelines.archive.paths import SourceError
from pipelines.archive.reading import digest_of
from pipelines.config.sections import Config
from pipelines.photos.codec import decode, encode
from pipelines.photos.photo import Limits, Photo
from pipelines.stages.crops import allowed, decode_png, geometry_in_crop
from pipelines.stages.reading import Reader
from pipelines.stages.rows import Row
from scol_ops.paste import paste_back


def limits_of(config: Config) -> Limits:
    """Of the run's photos."""
    return Limits(config.align.max_pixels, config.align.max_bytes)


def read_unchanged(reader: Reader, row: Row) -> bytes:
    """The file of a photo, from a row with ``source.url`` and ``align.content``.

    Raises:
        SourceError: CHANGED, it is not the one that the faces were looked for in; others as ``Reader.read``.
    """
    data, known = reader.read(row["source.url"]), row["align.content"]
    if known is not None and digest_of(data) != known:  # rows of runs before the column was there have none
        raise SourceError("CHANGED", "the photo has changed since its faces were looked for")
    return data


class Pasting:
    """A photo and its faces.

    Args:
        data: the photo's file.
        rows: one for each of its faces, with ``align``'s crop, geometry and size of the photo.
        config: of the run.

    Attributes:
        photo: decoded.
        originals: (N, 3, S, S) in [-1, 1], the crops as they were cut.
        masks: (N, 1, S, S) in [0, 1], where each may change.

    Raises:
        PhotoError: it cannot be decoded.  SourceError CHANGED: it is not the photo that the faces were found in.
    """

    def __init__(self, data: bytes, rows: Sequence[Row], config: Config) -> None:
        self.photo: Photo = decode(data, limits_of(config))
        if (self.photo.width, self.photo.height) != (rows[0]["align.width"], rows[0]["align.height"]):
            raise SourceError("CHANGED", "the photo has changed since its faces were looked for")
        size, device = config.crop_size, torch.device("cpu")
        self.originals = torch.cat([decode_png(row["align.crop"]) for row in rows])
        self.masks = torch.cat([allowed(geometry_in_crop(row, size, device, "align.")[0], config) for row in rows])
        self._quads = torch.from_numpy(np.stack([np.array(row["align.quad"]).reshape(4, 2) for row in rows]))

    def file(self, protected: Tensor) -> bytes:
        """The file with these faces, (N, 3, S, S) in [-1, 1]. Raises PhotoError ENCODE_FAILED."""
        # Tuning, refinement and attack have confined the change to the mask already.
        pixels = paste_back(self.photo.pixels, self.originals, protected, self.masks, self._quads, masked=True)
        return encode(self.photo, pixels)
