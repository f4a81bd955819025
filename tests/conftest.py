"""Faces for tests: people who do not exist, drawn by the embedded generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

Pixels = np.ndarray

# Every process of the tests computes with one thread; two of them, and Ray's workers, share the machine.
torch.set_num_threads(1)


# Files that take longest, longest first: begun last, one of them would keep one process busy while the other is idle.
LONGEST = (
    "test_end_to_end.py", "test_figures.py", "test_engine.py", "test_evaluate.py", "test_demo.py", "test_golden.py",
    "test_end_to_end_public.py", "test_s3.py", "test_ablation.py", "test_chaos.py", "test_methods.py", "test_tables.py",
    "test_strengthen.py", "test_malformed.py", "test_mobilestylegan.py", "test_gallery_actors.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Reports that pytest-xdist can send: of paths that are no UTF-8, tests capture words with lone surrogates."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def draw_face() -> Callable[[int], Pixels]:
    """Seed -> uint8 (256, 256, 3): an FFHQ-aligned face, the same for the same seed."""
    from scol_ops.metrics import to_uint8
    from scol_ops.models.embedded import load_mobilestylegan

    generator = load_mobilestylegan(256)

    def draw(seed: int) -> Pixels:
        z = torch.randn(1, 512, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            w = generator.mapping(z)
            w = generator.mean_code + 0.7 * (w - generator.mean_code)
            return to_uint8(generator(w[:, None].expand(-1, 16, -1))[0])

    return draw


@pytest.fixture(scope="session")
def draw_photo(draw_face) -> Callable[..., Pixels]:
    """(seeds, width, height) -> uint8 photo with those people side by side on a plain ground."""

    def draw(seeds: list[int], width: int = 420, height: int = 340) -> Pixels:
        photo = np.full((height, width, 3), (112, 124, 131), np.uint8)
        step = width // max(1, len(seeds))
        for i, seed in enumerate(seeds):
            left, top = i * step + (step - 256) // 2, (height - 256) // 2
            photo[top : top + 256, left : left + 256] = draw_face(seed)
        return photo

    return draw


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray of two cores for all tests of this process; whatever asks for a Ray inside uses it."""
    from cluster import ray_session
    from tests.helpers.warm_workers import warm

    with warm(), ray_session(num_cpus=2):
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator:
    """`s3_server.S3Server`: S3 over HTTP, with an empty bucket."""
    import boto3

    from tests.helpers.s3_server import BUCKET, S3Server

    server = S3Server()
    boto3.client(
        "s3",
        endpoint_url=server.url,
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    ).create_bucket(Bucket=BUCKET)
    yield server
    server.close()


@pytest.fixture
def s3(s3_server, monkeypatch, request) -> Iterator:
    """The same for one test, which this process reaches by `s3://` without further ado; `s3.root` is a prefix of its
    own."""
    import fsspec
    import s3fs

    from tests.helpers.s3_server import BUCKET

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    timeouts = {"read_timeout": 2, "connect_timeout": 2}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": timeouts})
    s3fs.S3FileSystem.clear_instance_cache()
    s3_server.faults.clear()
    s3_server.requests.clear()
    s3_server.root = f"s3://{BUCKET}/{abs(hash(request.node.nodeid)):x}"
    yield s3_server
    s3_server.faults.clear()
    s3fs.S3FileSystem.clear_instance_cache()
