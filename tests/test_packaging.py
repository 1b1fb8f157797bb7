"""What a package index and a user's pip see: extras, hints that name them, metadata, the README, the wheel."""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from embedcache.errors import MissingExtraError
from embedcache.provenance import RECORDED_PACKAGES
from embedcache.search.faiss_index import num_gpus
from tests.blocks import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def texts() -> Iterator[tuple[Path, str]]:
    """Iterate over the files of the repository that may tell a user what to install."""
    for pattern in (
        "embedcache/**/*.py",
        "pipelines/**/*.py",
        "benchmarks/**/*.py",
        "docs/**/*.md",
        "*.md",
        "justfile",
    ):
        for path in ROOT.glob(pattern):
            yield path, path.read_text()


def named_extras(text: str) -> set[str]:
    """Return the extras that a text names: in `embedcache[…]`, in `.[…]` and in `require(…, extra=…)`."""
    lists = re.findall(r"(?:embedcache|\"\.)\[([a-z][a-z,-]*)\]", text)
    return {name for names in lists for name in names.split(",")} | set(re.findall(r"extra=\"([^\"]+)\"", text))


def test_every_hint_names_an_extra() -> None:
    named = {name: path for path, text in texts() for name in named_extras(text) if name != "forbid"}  # of pydantic
    assert {"onnx", "demo", "cpu", "gpu"} <= set(named)
    assert {name: path for name, path in named.items() if name not in EXTRAS} == {}


def test_cpu_and_gpu_differ_in_faiss_alone() -> None:
    assert EXTRAS["cpu"] == ["embedcache[onnx,faiss-cpu]"]
    assert EXTRAS["gpu"] == ["embedcache[onnx,faiss-gpu]"]
    assert [name for name, needs in EXTRAS.items() if any("faiss-cpu" in need for need in needs)] == [
        "faiss-cpu",
        "cpu",
    ]


@pytest.mark.parametrize(
    ("has_cuda", "machine", "extra"),
    [
        (False, "x86_64", "faiss-cpu"),
        (True, "x86_64", "faiss-gpu"),
        (True, "aarch64", "faiss-cpu"),  # the only build that exists there
    ],
)
def test_hint_of_faiss_names_the_build_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, has_cuda: bool, machine: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(MissingExtraError, match=rf"'embedcache\[{extra}\]'"):
        num_gpus()


def test_only_faiss_itself_suggests_faiss() -> None:
    """Hints of other packages must not put one build of FAISS over the other: both own the folder `faiss/`."""
    with_faiss = {name for name, needs in EXTRAS.items() if any("faiss" in need for need in needs)}
    suggested = {
        path.name for path in (ROOT / "embedcache").rglob("*.py") if named_extras(path.read_text()) & with_faiss
    }
    assert suggested == {"faiss_index.py"}


DECIDES_NOTHING = {
    *("aiohttp", "fsspec", "gcsfs", "s3fs", "universal-pathlib", "google-crc32c", "threadpoolctl", "ray"),  # bytes move
    *("jinja2", "matplotlib", "pandas", "rich", "tqdm", "typer", "fastapi", "uvicorn"),  # what people see
    *("tensorboard", "wandb", "mlflow-skinny", "sqlalchemy", "alembic", "trackio"),
    *("umap-learn", "pocketsphinx", "easy-vqa"),  # write no artifact with a record
}


def test_records_name_every_library_that_decides_an_output() -> None:
    """A new dependency is recorded, or said to decide nothing."""
    extras = [needs for name, needs in EXTRAS.items() if name not in ("dev", "docs")]
    needed = {re.split(r"[<>=;\[ ]", need)[0] for needs in [PROJECT["dependencies"], *extras] for need in needs}
    assert needed - {"embedcache"} - set(RECORDED_PACKAGES) == DECIDES_NOTHING
