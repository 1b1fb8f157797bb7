"""Several processes at one cache: of this machine, and of a Ray cluster that loses a machine."""

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.encoders.base import Encoder
from embedcache.errors import EmbedcacheError, SettingError, UnfinishedError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from tests.extract.cases import FEATURES, run, tree
from tests.pictures import write_pictures
from tests.toy import IMAGE, TEXT


class Told:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []
        self.what = ""

    def start(self, what: str, total: int, unit: str) -> None:
        self.what = what

    def advance(self, count: int) -> None:
        self.counts[self.what] += count

    def finish(self) -> None:
        pass

    def note(self, line: str) -> None:
        self.notes.append(line)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "source", 100)


def slow(source: Path, cache: Path, told: Told, *, delay_ms: int, image: str = IMAGE, **settings: object) -> list[str]:
    reports = extract(
        open_source(source),
        cache,
        image=[f"{image},delay_ms={delay_ms}"],
        text=[TEXT],
        settings=ExtractSettings(features=FEATURES, chunk_size=8, **settings),  # type: ignore[arg-type]
        progress=told,
    )
    return [report.line() for report in reports]


def same_bytes(one: Path, other: Path) -> bool:
    """Compare caches whose encoders differ in `delay_ms` alone, which stands in the spec."""
    trees = [
        {name: sha for name, sha in tree(cache).items() if name != "image/open_toy/zarr.json"} for cache in (one, other)
    ]
    return trees[0] == trees[1]


@pytest.mark.slow
def test_a_process_a_device_gives_the_bytes_of_one(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "one", features=FEATURES, chunk_size=8)
    told = Told()
    lines = slow(source, tmp_path / "two", told, delay_ms=50, devices=("cpu", "cpu"))
    assert lines == [
        "open_toy (cls, patches): encoded 100 images, reused 0, failed 0",
        "open_toy (tokens): encoded 100 texts, reused 0, failed 0",
    ]
    assert same_bytes(tmp_path / "one", tmp_path / "two")
    assert told.counts["encoding images"] <= 100, "no chunk was encoded twice"


def processes_of(parent: int) -> list[int]:
    """Find the worker processes of a process: those that multiprocessing spawned to run our work."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    lines = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return [child for child, line in lines.items() if b"spawn_main" in line]


@pytest.mark.slow
@pytest.mark.parametrize("num_killed", [1, 2])
def test_a_process_that_is_killed_leaves_its_chunks_to_the_others(
    source: Path, tmp_path: Path, num_killed: int
) -> None:
    commits = tmp_path / "c/image/open_toy/chunks"

    def kill() -> None:
        deadline = time.monotonic() + 60
        while len(list(commits.glob("*.parquet"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in processes_of(os.getpid())[:num_killed]:
            os.kill(process, signal.SIGKILL)

    told, killer = Told(), threading.Thread(target=kill)
    killer.start()
    if num_killed == 2:
        with pytest.raises(UnfinishedError, match="2 of 2 processes died; what is committed is kept: run the same"):
            slow(source, tmp_path / "c", told, delay_ms=200, devices=("cpu", "cpu"))
    else:
        slow(source, tmp_path / "c", told, delay_ms=200, devices=("cpu", "cpu"))
        assert told.notes == ["1 of 2 processes died; the others did their work"]
    killer.join()
    run(source, tmp_path / "c", features=FEATURES)
    run(source, tmp_path / "one", features=FEATURES, chunk_size=8)
    assert same_bytes(tmp_path / "one", tmp_path / "c")


@pytest.mark.slow
def test_what_goes_wrong_in_a_process_is_told_as_it_is(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown option of the encoder family 'tests.toy:open_toy' 'nonsense'"):
        slow(source, tmp_path / "c", Told(), delay_ms=0, image=f"{IMAGE},nonsense=1", devices=("cpu", "cpu"))


def open_with_a_bug(spec: object, **_: object) -> Encoder:
    raise ZeroDivisionError("a bug")


@pytest.mark.slow
def test_a_bug_in_a_process_shows_where_it_was(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)in open_with_a_bug.*ZeroDivisionError: a bug"):
        extract(
            open_source(source),
            tmp_path / "c",
            image=["tests.extract.test_engines:open_with_a_bug"],
            settings=ExtractSettings(devices=("cpu", "cpu")),
        )


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_shares_of_a_worker_are_its_chunks_each_once(num_workers: int, num_devices: int, data: st.DataObject) -> None:
    worker = data.draw(st.integers(0, num_workers - 1))
    whole = ExtractSettings(worker=f"{worker}/{num_workers}")
    shares = [whole.share(number, num_devices) for number in range(num_devices)]
    for chunk in range(40):
        assert sum(share.takes(chunk) for share in shares) == whole.takes(chunk)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"image": [IMAGE, f"{IMAGE},scale=2"]}, "2 image encoders or views would be stored as open_toy"),
        ({"image": [IMAGE], "views": ("flip", "flip")}, "2 image encoders or views would be stored as open_toy@flip"),
        ({"text": [TEXT], "views": ("flip",)}, "the view flip is of images, and no encoder of images is named"),
        ({"image": [IMAGE], "devices": ("cuda:7",)}, "no device 'cuda:7' here"),
        ({"image": [IMAGE], "views": ("flop",)}, "unknown view 'flop'; did you mean 'flip'"),
        ({"image": ["toy"]}, "'toy' does not name an encoder"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_numbered(
    source: Path, tmp_path: Path, asked: dict[str, Any], words: str
) -> None:
    encoders = {name: asked.pop(name) for name in ("image", "text") if name in asked}
    with pytest.raises(EmbedcacheError, match=words):
        extract(open_source(source), tmp_path / "c", **encoders, settings=ExtractSettings(**asked))
    assert not (tmp_path / "c").exists()


def test_an_unknown_engine_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown engine 'rays'; did you mean 'ray'"):
        run(source, tmp_path / "c", engine="rays")


def test_no_actor_at_all_is_refused() -> None:
    with pytest.raises(SettingError, match="num_actors is 0; it must be at least 1"):
        ExtractSettings(num_actors=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_that_loses_a_machine_gives_the_bytes_of_the_local_engine(source: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    told = Told()

    def lose_a_machine() -> None:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "c/image").glob("*/chunks/*.parquet"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        cluster.remove_node(nodes[1], allow_graceful=False)

    loser = threading.Thread(target=lose_a_machine)
    loser.start()
    try:
        lines = slow(source, tmp_path / "c", told, delay_ms=300, engine="ray")
        with pytest.raises(EmbedcacheError, match="unknown option of the encoder family"):
            slow(source, tmp_path / "c", told, delay_ms=0, image=f"{IMAGE},nonsense=1", engine="ray")
        assert sum(node["Alive"] for node in ray.nodes()) == 2, "a machine was lost"
    finally:
        loser.join()
        ray.shutdown()
        cluster.shutdown()
    assert lines == [
        "open_toy (cls, patches): encoded 100 images, reused 0, failed 0",
        "open_toy (tokens): encoded 100 texts, reused 0, failed 0",
    ]
    assert told.counts == {"encoding images": 100, "encoding texts": 100, "indexing": 100, "checking samples": 100}
    run(source, tmp_path / "one", features=FEATURES, chunk_size=8)
    assert same_bytes(tmp_path / "one", tmp_path / "c")
