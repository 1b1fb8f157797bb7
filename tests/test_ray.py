"""A Ray cluster of two machines computes what one process computes, and loses one of them."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.dataset.vectors import Vectors
from embedcache.errors import EmbedcacheError
from embedcache.files import remove_partials
from tests.blocks import ROOT
from tests.dataset.test_vectors import scan_all
from tests.extract.cases import FEATURES, NUM_IMAGES, extract_slowly, run, same_bytes
from tests.images import write_images
from tests.recorded import RecordedProgress
from tests.toy import IMAGE

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Start a cluster of one machine with two cores, to which the driver is connected."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    checks = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 2000}
    system = checks | {"health_check_failure_threshold": 3}
    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": system}  # a process less to start
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_workers_of_an_own_cluster_are_as_nice_as_their_caller() -> None:
    """Check before the cluster of the other tests runs, which this one would join."""
    pytest.importorskip("ray")
    code = (
        "import os; from embedcache.processes import connected\n"
        "with connected(None) as ray: print(ray.get(ray.remote(lambda: os.nice(0)).remote()) - os.nice(0))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "0"


def test_pass_is_identical(cluster: Any, cache_path: Path) -> None:
    here, there = (scan_all(Vectors(cache_path, "image", "open_toy/cls"), engine=engine) for engine in ("local", "ray"))
    assert here[0] == there[0] == list(range(300))
    assert np.array_equal(here[1], there[1])


def test_lost_machine_leaves_its_chunks_to_others(cluster: Any, tmp_path: Path) -> None:
    source, cache = write_images(tmp_path / "source", NUM_IMAGES), tmp_path / "c"
    run(source, tmp_path / "one", features=FEATURES, chunk_size=8)
    machine, progress = cluster.add_node(num_cpus=1), RecordedProgress()
    num_committed: list[int] = []

    def lose_machine() -> None:
        deadline, commits = time.monotonic() + 120, cache / "image" / "open_toy" / "chunks"
        while len(list(commits.glob("*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        cluster.remove_node(machine, allow_graceful=False)
        num_committed.append(len(list(commits.glob("*.json"))))

    loser = threading.Thread(target=lose_machine)
    loser.start()
    try:
        lines = extract_slowly(source, cache, progress, delay_ms=200, engine="ray")
    finally:
        loser.join()
    assert 2 <= num_committed[0] < 8
    # The task of the lost machine is repeated, and finds what was committed there.
    counts = [re.search(r"encoded (\d+) \w+, reused (\d+), failed 0$", line) for line in lines]
    assert [sum(map(int, count.groups())) for count in counts if count] == [NUM_IMAGES] * 2
    assert progress.counts["encoding images"] >= NUM_IMAGES - 2 * 8
    assert progress.counts["encoding texts"] >= NUM_IMAGES - 2 * 8
    assert any("RAY_worker_niceness=0" in note for note in progress.notes)  # the cluster has Ray's default
    remove_partials(cache)  # as the next extraction does: the lost machine may have been writing a file
    assert same_bytes(tmp_path / "one", cache)


def test_error_in_an_actor_is_raised(cluster: Any, tmp_path: Path) -> None:
    source, options = write_images(tmp_path / "source", 2), {"delay_ms": 0, "engine": "ray", "actors": 1}
    with pytest.raises(EmbedcacheError, match="unknown option '.*' of the encoder family"):
        extract_slowly(source, tmp_path / "c", RecordedProgress(), image=f"{IMAGE},nonsense=1", **options)
