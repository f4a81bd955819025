"""Store of style codes with ids, and the exact search for the most and the least similar ones.

A gallery is a folder, local or on any fsspec URL::

    codes-NNNNN-SHA.parquet   ids and codes, as given (see ``gallery_index.table``)
    layer-LL-SHA.faiss        one IndexFlatIP a stored layer, over the mode's unit vectors
    mean-SHA.npy, norms-SHA.npy
    index.json                what it is, and the sha256 of every file; written last

It is built once and never changed.  Build: ``GalleryBuilder``, ``build``, ``synthetic_codes``; use: ``Gallery``.
"""

from gallery_index.builder import CodeBatch, GalleryBuilder, build
from gallery_index.errors import (
    BadCodesError,
    GalleryCorruptError,
    GalleryError,
    GalleryExistsError,
    GalleryMismatchError,
    GalleryNotFoundError,
    NotEnoughCodesError,
    QueryError,
)
from gallery_index.gallery import Gallery, SearchResult
from gallery_index.info import Expectation, GalleryInfo
from gallery_index.scoring import MODES
from gallery_index.synthetic import synthetic_codes

__all__ = [
    "MODES",
    "BadCodesError",
    "CodeBatch",
    "Expectation",
    "Gallery",
    "GalleryBuilder",
    "GalleryCorruptError",
    "GalleryError",
    "GalleryExistsError",
    "GalleryInfo",
    "GalleryMismatchError",
    "GalleryNotFoundError",
    "NotEnoughCodesError",
    "QueryError",
    "SearchResult",
    "build",
    "synthetic_codes",
]
