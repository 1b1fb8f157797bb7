"""What a user's pip installs: extras that hints name, and a wheel that works without the repository."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, built from a copy of its files."""
    folder = tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "embedcache", folder / "embedcache", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta as meta; meta.build_wheel('.')"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_has_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if ".dist-info/" not in name}
    files = {path for path in (ROOT / "embedcache").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert packed == {str(path.relative_to(ROOT)) for path in files}


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
