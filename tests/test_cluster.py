"""Workers get processors so that all of them find a node."""

import pytest
import ray

from bigseg.cluster import Cluster, connect
from bigseg.errors import ResourceError


@pytest.mark.parametrize(
    ("nodes", "n_workers", "wanted"),
    [
        ([(2, 0)], 1, 2),
        ([(2, 0)], 2, 1),
        ([(8, 0), (8, 0)], 1, 8),
        ([(8, 0), (8, 0)], 2, 8),
        ([(8, 0), (8, 0)], 3, 4),
        ([(4, 0), (16, 0)], 2, 8),
        ([(2, 0)], 5, 1),
        ([(8, 0), (8, 1), (8, 1)], 2, 8),
        ([(8, 0), (8, 1), (32, 4)], 5, 8),
        ([(16, 1)], 2, 8),
    ],
)
def test_all_workers_find_a_node_with_the_processors_that_they_ask_for(nodes, n_workers, wanted):
    assert Cluster(tuple(nodes)).cpus_a_worker(n_workers) == wanted


def test_an_address_where_nobody_answers_is_said(monkeypatch):
    monkeypatch.setenv("RAY_gcs_server_request_timeout_seconds", "1")
    monkeypatch.setattr(ray, "init", _refuse)
    with (
        pytest.raises(ResourceError, match=r"no Ray cluster could be reached at '1.2.3.4:6379'"),
        connect("1.2.3.4:6379"),
    ):
        pass


def _refuse(**_):
    raise ConnectionError("nobody there")


def test_a_head_without_processors_is_no_worker():
    cluster = Cluster(((0, 0), (16, 0)), is_local=False, memory=(2 << 30, 64 << 30))
    resources = cluster.resources()
    assert (resources.n_workers, resources.n_threads) == (4, 4)
    assert resources.memory_bytes == 16 << 30
