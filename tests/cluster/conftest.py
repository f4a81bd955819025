import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `arithmetic`, which the workers import too

from cluster import ray_session  # noqa: E402


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray for all tests of a session."""
    with ray_session(num_cpus=2):
        yield
