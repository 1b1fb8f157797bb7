"""The pages of encoders of one's own: their encoders pass their contracts, and a modality of one's own works."""

import importlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from embedcache.testing.encoders import AudioEncoderContract, ImageEncoderContract, TextEncoderContract
from tests.blocks import ROOT, blocks_of
from tests.crash import call_elsewhere

PAGE = ROOT / "docs" / "howto" / "own_modality.md"
IMAGES = ROOT / "docs" / "howto" / "own_encoder.md"
MODULES = {
    "loudness": (PAGE, 0),
    "my_module": (IMAGES, 0),
    "my_convolution": (IMAGES, 2),
    "test_convolution": (IMAGES, 3),
    "my_letters": (IMAGES, 4),
}
"""Module -> page, and which of its blocks of Python it is."""


@pytest.fixture(scope="module", autouse=True)
def _modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Save blocks of the pages as modules on the path."""
    folder = tmp_path_factory.mktemp("own")
    for name, (page, number) in MODULES.items():
        code = [block.code for block in blocks_of(page) if block.language == "python"][number]
        (folder / f"{name}.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield
    for name in MODULES:
        sys.modules.pop(name, None)


class TestLoudness(AudioEncoderContract):
    has_weights = False

    @pytest.fixture
    def spec(self) -> str:
        return "loudness:open_loudness"


class TestThumbnails(ImageEncoderContract):
    has_weights = False

    @pytest.fixture
    def spec(self) -> str:
        return "my_module:open_mine"


class TestConvolution(ImageEncoderContract):
    @pytest.fixture
    def spec(self, tmp_path: Path) -> str:
        return save_convolution(tmp_path / "weights.safetensors", first=0.0)

    @pytest.fixture
    def other_spec(self, tmp_path: Path) -> str:
        return save_convolution(tmp_path / "others.safetensors", first=1.0)


class TestLetters(TextEncoderContract):
    has_weights = False

    @pytest.fixture
    def spec(self) -> str:
        return "my_letters:open_letters"


def test_tolerance_is_relative_to_the_length() -> None:
    contract = TextEncoderContract()
    vector = np.full((3, 8), 1e3, np.float32)
    contract._assert_close(vector + 0.01, vector)
    with pytest.raises(AssertionError, match="differ by"):
        contract._assert_close(vector / 1e6 + 1e-6, vector / 1e6)


def save_convolution(path: Path, *, first: float) -> str:
    spec: str = importlib.import_module("test_convolution").save(path, first)
    return spec


ENCODER = """
from embedcache.store.layout import Axis
from embedcache.encoders.base import NO_WEIGHTS, Fingerprint


class Motion:
    modality = "motion"
    features = {"mean": (3,), "steps": (-1, 3)}
    axes = {"steps": Axis(kind="time", rate_hz=100.0, start_s=0.0)}
    batch_size = 4
    fingerprint = Fingerprint(
        family="motion", model="motion", weights=NO_WEIGHTS, preprocessing={}, pooling={"mean": "", "steps": ""}
    )

    def prepare(self, items):
        return list(items)

    def encode(self, prepared, names):
        outputs = {"mean": [steps.mean(axis=0) for steps in prepared], "steps": list(prepared)}
        return {name: outputs[name] for name in names}


def open_motion(spec, *, modality, settings):
    return Motion()
"""


@pytest.mark.slow
def test_additions_of_the_page_make_a_modality(tmp_path: Path) -> None:
    """A copy of the package with the additions of the page's table reads folders and tables of its own."""
    package = tmp_path / "embedcache"
    shutil.copytree(ROOT / "embedcache", package)
    decoder = [block.code for block in blocks_of(PAGE) if block.language == "python"][-1]
    for file, name, before, indent in (
        ("modalities.py", "Modality(name=", 'Modality(name="text"', 8),
        ("sources/files.py", '"motion": frozenset', '"image": IMAGE_SUFFIXES', 4),
        ("sources/table.py", '"motion": (', '"audio": (', 4),
    ):
        ((added,),) = [re.findall(rf"^\| `embedcache/{file}` \|.*`({re.escape(name)}.*?)`", PAGE.read_text(), re.M)]
        _add(package / file, before, f"{added.replace(chr(92), '')},\n{' ' * indent}")
    _add(package / "modalities.py", '"image", "text", "audio"', '"motion", ')
    (package / "sources" / "motion.py").write_text(decoder)
    (tmp_path / "motion.py").write_text(ENCODER)
    (tmp_path / "scans").mkdir()
    steps = np.arange(30, dtype="<f4").reshape(10, 3)
    for name, data in {"a": steps.tobytes(), "b": b"short", "c": steps[:4].tobytes()}.items():
        (tmp_path / "scans" / f"{name}.imu").write_bytes(data)
    (tmp_path / "some.csv").write_text("imu\nscans/a.imu\nscans/c.imu\n")
    encoder = ("--encoder", "motion=motion:open_motion")
    commands = (
        ("extract", "scans", "cache", *encoder, "--feature", "mean,steps"),
        ("verify", "cache", "--reencode", "100%", "--trust"),
        ("extract", "some.csv", "some", *encoder),
    )
    results = call_elsewhere(run_copy, tmp_path, commands, environment=os.environ)
    assert not any(code for code, _ in results), results
    shown = [text for _, text in results]
    assert "encoded 3 motion recordings, reused 0, failed 1: 1 expected triples of float32" in shown[0]
    assert "mean" in shown[1]
    assert "encoded 2 motion recordings" in shown[2]


def _add(path: Path, before: str, text: str) -> None:
    code = path.read_text()
    assert code.count(before) == 1
    path.write_text(code.replace(before, text + before))


def run_copy(folder: Path, commands: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """Run commands in a folder with the copy of the package in it; return the exit code and what is shown of each."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("embedcache", "tests")]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    run = importlib.import_module("tests.cli.run")  # whose `main` is that of the copy
    results = [run.embedcache(*words, cwd=folder) for words in commands]
    return [(result.code, result.stdout + result.stderr) for result in results]
