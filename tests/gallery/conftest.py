
import numpy as np
import pytest
import torch

from gallery_index import CodeBatch, Gallery, build  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def make(tmp_path):
    """Build and load a gallery; ids are shuffled so that their order is not the store's."""

    def _make(codes, mode="centred", ids=None, name="g", photo_ids=None, person_ids=None, embeddings=None, **options):
        rng = np.random.default_rng(7)
        ids = [f"p{i:05d}" for i in rng.permutation(len(codes))] if ids is None else ids
        url = tmp_path / name
        batch = CodeBatch(codes, ids if photo_ids is None else photo_ids, person_ids, ids, embeddings)
        build(url, [batch], mode=mode, weights=options.pop("weights", {"generator": "g1", "encoder": "e1"}), **options)
        return Gallery.load(url)

    return _make
