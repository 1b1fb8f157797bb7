"""Shared by all tests: Hypothesis profiles, and small caches made by the real pipeline."""

import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import settings

os.environ["XDG_STATE_HOME"] = mkdtemp(prefix="embedcache-tests-")  # which records what sources were indexed here
os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: without it each look-up waits for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is: two test processes share two cores
os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # UMAP's, which it would set for torch and FAISS, too

import tests.flushes  # noqa: F401 - before anything is written
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.registry import Trust, trust_code
from embedcache.sources import open_source
from tests.images import write_images
from tests.toy import IMAGE, TEXT

settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

trust_code("tests")  # caches of the tests name encoders of this package

FEATURES = ("cls", "patches", "mean", "tokens")
LONGEST = (
    *("pipelines/icons/test_icons", "pipelines/avsr/test_avsr", "pipelines/test_parallel"),
    *("pipelines/uniperceiver/test_pipeline", "pipelines/summit/test_summit"),
    *("quickstart/test_quickstart", "net/test_kill", "test_ray", "serve/test_page", "extract/test_remote"),
    *("cli/test_foreign_caches", "test_own_plugins", "sweep/test_sweep", "pipelines/avsr/test_train"),
    *("search/test_damage", "search/test_building", "sources/test_remote", "pipelines/avsr/test_transcribe"),
    *("train/test_train", "export/test_formats", "encoders/test_lite", "export/test_export", "test_api"),
    *("train/test_distributed", "train/test_data", "encoders/test_derived", "pipelines/test_shapes"),
    *("extract/test_kill", "encoders/test_sentence_transformers", "sweep/test_trials", "test_packaging"),
)
"""The files that take longest, which start first so that both test processes end together."""


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, except with `-m gpu`: all other tests compare with what a CPU computes."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_STATE_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Restore the handler of Ctrl-C, which a program that has ended does not need any more."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def as_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open files as a process that has been given no name and knows no package."""
    monkeypatch.setattr("embedcache.registry._TRUST", Trust())


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Collect no garbage while modules are imported, and never look at what they hold: a million objects at a time.

    Tests collect garbage more rarely than Python would, which took 7 % of their time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the longest files to the front; all others keep their order."""
    order = {f"tests/{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


def pytest_collection_finish() -> None:
    """Start the server of forked processes from this folder: in another one it would find `tests` of other packages."""
    if "tests.crash" in sys.modules:
        forkserver.ensure_running()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred images with a caption each."""
    return write_images(tmp_path_factory.mktemp("source") / "images", 300)


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of ten images in chunks of four; an image and a caption have failed. Not to be changed."""
    folder = tmp_path_factory.mktemp("small")
    source = write_images(folder / "source", 10)
    (source / "00001.txt").write_text("a first caption\nand a second one\n")
    (source / "00003.png").write_bytes(b"")
    (source / "00006.txt").write_text("")
    settings = ExtractSettings(features=FEATURES, chunk_size=4)
    extract(open_source(source), folder / "cache", image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)
    return folder / "cache"


@pytest.fixture(scope="session")
def cache_path(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the images with vectors, fixed tokens and ragged tokens, in chunks of 64. Not to be changed."""
    path = tmp_path_factory.mktemp("caches") / "cache"
    settings = ExtractSettings(features=FEATURES, chunk_size=64)
    extract(open_source(image_folder), path, image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)
    return path


@pytest.fixture(scope="session")
def two_caches(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two caches of one encoder, 40 and 80 images with equal keys at their start. Not to be changed."""
    folder = tmp_path_factory.mktemp("two")
    for name, count, seed in (("a", 40, 1), ("b", 80, 2)):
        image_folder = write_images(folder / f"{name}-source", count, seed=seed)
        settings = ExtractSettings(features=FEATURES, chunk_size=32)
        extract(open_source(image_folder), folder / name, image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)
    return [folder / "a", folder / "b"]


@pytest.fixture(scope="session")
def run_path(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained on the shared cache. Not to be changed."""
    from tests.evaluate.test_retrieval import train_run

    return train_run(cache_path, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="session")
def artifacts(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one artifact of each kind: cache, run, index, study and selection. Not to be changed."""
    from embedcache.curate.select.select import select
    from embedcache.curate.settings import SelectSettings
    from embedcache.search.index import build_index
    from embedcache.search.settings import IndexSettings
    from embedcache.sweep.sweep import sweep
    from tests.train.runs import IMAGE, TEXT, run

    folder = tmp_path_factory.mktemp("artifacts")
    shutil.copytree(cache_path, folder / "cache")
    run(folder / "cache", folder / "run", epochs=1, seed=3)
    build_index(folder / "cache", folder / "index", IndexSettings(run=folder / "run", factory="Flat"))
    select(folder / "cache", folder / "selection.parquet", "random", SelectSettings(budget=20, feature=IMAGE))

    space = "[fixed]\nsplit = 'key'\nepochs = 1\nshared_width = 8\n[space]\nlr = [1e-3, 1e-2]"
    (folder / "space.toml").write_text(space)
    options = {"sampler": "grid", "top_configs": 1, "seeds_per_config": 1}
    features = {"feature": {"image": IMAGE, "text": TEXT}}
    sweep(folder / "cache", folder / "study", folder / "space.toml", **features, **options)
    return folder


@pytest.fixture(scope="session")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images in two splits and two classes, in chunks of 16. Not to be changed."""
    folder = tmp_path_factory.mktemp("labeled")
    for number, name in enumerate(("train/cat", "train/dog", "val/cat", "val/dog")):
        write_images(folder / "s" / name, 15, seed=number)
    settings = ExtractSettings(chunk_size=16)
    extract(open_source(folder / "s"), folder / "cache", image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)
    return folder / "cache"


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cats, with four captions, with two German and two others, and with none; and two dogs without captions."""
    folder = tmp_path_factory.mktemp("captioned")
    for name, count in (("cat", 3), ("dog", 2)):
        for path in sorted(write_images(folder / "s" / name, count).glob("*.txt")):
            path.unlink()
    (folder / "s/cat/00000.txt").write_text("one\ntwo\nthree\nfour\n")
    (folder / "s/cat/00001.json").write_text(json.dumps({"caption": ["rot", "blau"], "language": "de"}))
    (folder / "s/cat/00001.txt").write_text("red\nblue\n")
    settings = ExtractSettings(chunk_size=4)
    extract(open_source(folder / "s"), folder / "cache", image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)
    return folder / "cache"
