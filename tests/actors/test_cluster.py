import pytest

from actors.cluster import WorkerPlan, worker_plan


def test_gpus_come_first() -> None:
    assert worker_plan("auto", "auto", {"CPU": 16, "GPU": 2}) == WorkerPlan(2, 1.0, 1.0, 2)
    assert worker_plan("auto", "cpu", {"CPU": 16, "GPU": 2}) == WorkerPlan(16, 1.0, 0.0, 16)
    assert worker_plan("auto", "auto", {"CPU": 16}) == WorkerPlan(16, 1.0, 0.0, 16)
    assert worker_plan(5, "auto", {"CPU": 2, "GPU": 0}) == WorkerPlan(5, 1.0, 0.0, 5)


def test_a_range_follows_the_cluster_and_may_begin_without_what_it_asks_for() -> None:
    workers = {"min": 2, "max": 64}
    assert worker_plan(workers, "auto", {"CPU": 2, "GPU": 0}) == WorkerPlan(2, 1.0, 0.0, 64)
    assert worker_plan(workers, "cuda", {"CPU": 2, "GPU": 0}) == WorkerPlan(2, 1.0, 1.0, 64)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cluster\.device=cuda .* has no GPU"):
        worker_plan("auto", "cuda", {"CPU": 16, "GPU": 0})
    with pytest.raises(ValueError, match=r"cluster\.workers=0"):
        worker_plan(0, "cpu", {"CPU": 16})


@pytest.mark.cluster
def test_a_local_start_counts_its_cpus_and_a_second_connect_changes_nothing(local_ray: None) -> None:
    from actors import cluster

    assert cluster.connect("local") is False
    assert cluster.resources() == {"CPU": 4.0, "GPU": 0.0}
    assert len(cluster.nodes()) == 1
