import pytest


@pytest.fixture(scope="session")
def local_ray(local_ray: None) -> None:
    """The session's Ray, told to carry toy_workers along: this folder is not on the workers' path."""
    import toy_workers
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(toy_workers)
