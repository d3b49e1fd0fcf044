from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray for all cluster tests of this folder: four CPUs by name, whatever the machine has."""
    import toy_workers
    from ray import cloudpickle

    from actors import cluster

    cloudpickle.register_pickle_by_value(toy_workers)  # this folder is not on the workers' path
    cluster.connect("local", num_cpus=4)
    yield
    cluster.disconnect()
