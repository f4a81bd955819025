"""Store of style codes with ids, and the search for the most and the least similar ones, layer by layer.

A gallery is a folder, local or on any fsspec URL::

    codes-NNNNN-KEY.parquet    ids and codes, as given (see ``gallery_index.table``)
    mean-KEY.npy, norms-KEY.npy
    layer-LL-KEY.faiss         where it is compressed: a FAISS index of each layer (``gallery_index.compressed``), and
    exact-LL-KEY.npy           that layer's codes as one array, by which candidates are scored
    index.json                 what it is, and the sha256 of every file; written last

It is built once and never changed.  A store (``gallery_index.store``) holds versions of a gallery, each such a folder,
and a pointer to the current one.

Build: ``GalleryBuilder``, ``build``, ``synthetic_codes``; keep versions: ``Store``; look through: ``check``;
use: ``Gallery``.
"""

from gallery_index.builder import CodeBatch, GalleryBuilder, batches_of, build
from gallery_index.check import check
from gallery_index.compressed import Plan
from gallery_index.errors import (
    BadCodesError,
    GalleryBusyError,
    GalleryCheckError,
    GalleryConflictError,
    GalleryCorruptError,
    GalleryError,
    GalleryExistsError,
    GalleryMismatchError,
    GalleryNotFoundError,
    NotEnoughCodesError,
    QueryError,
)
from gallery_index.gallery import SEARCHES, Gallery, SearchResult
from gallery_index.info import Expectation, GalleryInfo
from gallery_index.scoring import MODES
from gallery_index.sharded import ShardedGallery, make_part
from gallery_index.store import Pruned, Store, Update, Version, open_gallery, read_info
from gallery_index.synthetic import synthetic_codes

__all__ = [
    "MODES",
    "SEARCHES",
    "BadCodesError",
    "CodeBatch",
    "Expectation",
    "Gallery",
    "GalleryBuilder",
    "GalleryBusyError",
    "GalleryCheckError",
    "GalleryConflictError",
    "GalleryCorruptError",
    "GalleryError",
    "GalleryExistsError",
    "GalleryInfo",
    "GalleryMismatchError",
    "GalleryNotFoundError",
    "NotEnoughCodesError",
    "Plan",
    "Pruned",
    "QueryError",
    "SearchResult",
    "ShardedGallery",
    "Store",
    "Update",
    "Version",
    "batches_of",
    "build",
    "check",
    "make_part",
    "open_gallery",
    "read_info",
    "synthetic_codes",
]
