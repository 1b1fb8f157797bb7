"""What a package index and a user's pip see: extras, hints that name them, metadata, the README, the wheel."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from collections.abc import Iterator
from email import message_from_string
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch

from embedcache.errors import MissingExtraError
from embedcache.records import RECORDED_PACKAGES
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
    *("jinja2", "matplotlib", "rich", "tqdm", "typer", "fastapi", "uvicorn"),  # what people see
    "pydantic",  # checks settings and manifests
}


def needed_packages(*extras: str) -> set[str]:
    """Return the packages that the project and some of its extras need, without itself."""
    groups = [PROJECT["dependencies"], *(EXTRAS[name] for name in extras)]
    return {re.split(r"[<>=;\[ ]", need)[0] for needs in groups for need in needs} - {"embedcache"}


def test_records_name_every_library_that_decides_an_output() -> None:
    """A new dependency is recorded, or said to decide nothing."""
    needed = needed_packages(*(EXTRAS.keys() - {"dev", "docs"}))
    assert needed - set(RECORDED_PACKAGES) == DECIDES_NOTHING, (
        "name the package in RECORDED_PACKAGES in embedcache/records.py, or here, if no artifact depends on it"
    )


def test_readme_renders_on_the_index_and_its_links_are_absolute(metadata: Message) -> None:
    readme = str(metadata.get_payload())
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert re.findall(r"\]\((?!https://)[^)]*\)", readme) == []
    source = PROJECT["urls"]["Source"]
    for path in re.findall(rf"\({source}/blob/main/([^)#]*)", readme):
        assert (ROOT / path).exists(), path
    markdown = pytest.importorskip("readme_renderer.markdown")
    shown = markdown.render(readme)
    assert "<table>" in shown
    assert "<pre" in shown
    assert re.search(r'<img [^>]*src="https://raw[^"]*/docs/images/search.png"', shown)


def test_image_builds_from_files_that_exist() -> None:
    text = (ROOT / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert {"pyproject.toml", "setup.py", "embedcache"} <= set(copied)
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in allowed
    for extras in re.findall(r"^ARG EXTRAS=(.*)$", text, re.MULTILINE):
        assert set(extras.split(",")) <= set(EXTRAS)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist and the wheel, built from a copy of their files and a test."""
    folder = tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "embedcache", folder / "embedcache", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    shutil.copy(__file__, folder / "tests")
    build = "from setuptools import build_meta as meta; meta.build_sdist('.'); meta.build_wheel('.')"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    """Return the wheel."""
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    """Return the metadata of the wheel."""
    with ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(file.read(name).decode())


def test_wheel_has_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if ".dist-info/" not in name}
    files = {path for path in (ROOT / "embedcache").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert packed == {str(path.relative_to(ROOT)) for path in files}


def test_sdist_has_the_changes_and_no_tests(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as file:
        names = {Path(*Path(name).parts[1:]).as_posix() for name in file.getnames()}
    assert {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names
    assert not [name for name in names if name.startswith("tests")]


@pytest.mark.slow
def test_installed_wheel_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    """An empty environment, in which other packages are those of this one, but embedcache is the wheel."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps", "--quiet"]
    pip.append("--no-compile")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*pip, str(wheel)], check=True, cwd=tmp_path, env=environment)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))  # read after the wheel, without its own .pth
    rng = np.random.default_rng(0)
    for name in ("images", "texts"):
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(60, 8)).astype(np.float16))
    keys = "".join(f'{{"key": "{number:02d}", "caption": "text {number}"}}\n' for number in range(60))
    (tmp_path / "rows.jsonl").write_text(keys)
    program = f"""
import sys
import embedcache
from embedcache.cli.main import app
assert {str(site)!r} in embedcache.__file__, embedcache.__file__
for line in sys.argv[1:]:
    app(line.split(), standalone_mode=False)
from importlib.resources import files
assert (files("embedcache.serve") / "page").is_dir()
"""
    lines = (
        "import npy cache --file image=images.npy --file text=texts.npy --table rows.jsonl",
        "train cache run --split key --epochs 1 --shared-width 4",
        "evaluate retrieval cache run --html page.html --json",
        "curate index cache index --run run",
    )
    done = subprocess.run(
        [python, "-c", program, *lines], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "<svg" in (tmp_path / "page.html").read_text()
    assert (tmp_path / "index" / "card.json").is_file()
    shown = subprocess.run(
        [tmp_path / "venv" / "bin" / "embedcache", "--version"], env=environment, capture_output=True, text=True
    )
    assert shown.stdout == f"embedcache {PROJECT['version']}\n"
