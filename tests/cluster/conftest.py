
import pytest

from cluster import ray_session  # noqa: E402


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray for all tests of a session."""
    with ray_session(num_cpus=2):
        yield
