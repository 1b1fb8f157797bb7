"""Plug-ins of an installed package: a tiny distribution, installed by pip, with an entry point of every kind."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from embedcache.curate.select.select import SELECTORS
from embedcache.derive.rules import RULES
from embedcache.encoders.open import ENCODERS
from embedcache.encoders.views import VIEWS
from embedcache.errors import PathError
from embedcache.evaluate.classifiers import METHODS
from embedcache.projectors.base import PROJECTORS
from embedcache.registry import Registry
from embedcache.runs import NETWORKS
from embedcache.sources import reopen_source
from embedcache.sources.open import SOURCES
from embedcache.store.cache import Cache
from embedcache.train.losses import LOSSES
from tests.blocks import ROOT
from tests.cli.run import embedcache, succeed
from tests.images import write_images

MODULE = """
from embedcache.encoders.open import EncoderSpec
from embedcache.encoders.views import View
from embedcache.sources import Sample, TextItem
from embedcache.modeling.heads import LinearProjector as Head
from tests.toy import open_toy as open_encoder
from embedcache.runs import NETWORKS


class Words:
    items_are_files = True

    def __init__(self, location, settings):
        self.words = location.split("+")

    def describe(self):
        return {"type": "plugged", "path": "+".join(self.words), "settings": {}}

    def samples(self):
        if "broken" in self.words:
            raise ZeroDivisionError("of the plug-in")
        return (Sample(key=word, texts=(TextItem(text=word),)) for word in self.words)

    def read(self, item):
        raise AssertionError


def open_view(argument):
    return View(
        name=f"plugged:{argument}",
        modality="image",
        apply=lambda image: image.rotate(int(argument)),
        fingerprint={"name": f"plugged:{argument}"},
    )


class Anything:
    def __init__(self, *arguments, **options):
        pass

    def __call__(self, *arguments, **options):
        raise ZeroDivisionError("of the plug-in")
"""
REGISTRIES: dict[str, tuple[Registry, str]] = {
    "encoders": (ENCODERS, "open_encoder"),
    "losses": (LOSSES, "Anything"),
    "methods": (METHODS, "Anything"),
    "networks": (NETWORKS, "Anything"),
    "projectors": (PROJECTORS, "Head"),
    "rules": (RULES, "Anything"),
    "selectors": (SELECTORS, "Anything"),
    "sources": (SOURCES, "Words"),
    "views": (VIEWS, "open_view"),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the distribution."""
    folder = tmp_path_factory.mktemp("site")
    wheel, info = folder / "plugged-1.0-py3-none-any.whl", "plugged-1.0.dist-info"
    points = [f"[embedcache.{group}]\nplugged = plugged:{name}\n" for group, (_, name) in REGISTRIES.items()]
    files = {
        "plugged.py": MODULE,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "\n".join(points),
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", folder / "packages", wheel], check=True)
    return folder / "packages"


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "plugged", raising=False)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("group", REGISTRIES)
def test_plugin_of_every_kind(group: str) -> None:
    registry, attribute = REGISTRIES[group]
    assert registry.group == f"embedcache.{group}"
    assert "plugged" in registry
    assert registry.load("plugged") is getattr(sys.modules["plugged"], attribute)


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_installed_plugins_need_no_trust(tmp_path: Path) -> None:
    succeed("extract", "plugged:red+green", "c", "--text-encoder", "plugged:toy", cwd=tmp_path)
    assert "2 items encoded again" in succeed("verify", "c", "--reencode", "100%", cwd=tmp_path)
    with pytest.raises(PathError, match="its source is plugged:red.green, which may read and run anything"):
        reopen_source(Cache(tmp_path / "c").info.source)  # of other rows than those that were extracted here
    write_images(tmp_path / "photos", 3)
    words = ("--image-encoder", "plugged:toy", "--view", "plugged:90")
    assert "toy@plugged-90 (cls): encoded 3" in succeed("extract", "photos", "i", *words, cwd=tmp_path)
    assert "toy@plugged-90/cls: 3 items encoded again" in succeed("verify", "i", "--reencode", "100%", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "extract plugged:red+broken c --text-encoder plugged:toy",
        "train {cache} r --loss plugged --split key --feature image=open_toy/cls --feature text=open_toy/mean",
    ],
    ids=["source", "loss"],
)
@pytest.mark.usefixtures("installed")
def test_error_in_a_plugin_names_it(tmp_path: Path, cache_path: Path, line: str) -> None:
    done = embedcache(*line.format(cache=cache_path).split(), cwd=tmp_path)
    assert done.code == 70
    assert "ZeroDivisionError: of the plug-in" in done.stderr
    assert "run the contract test of plugged, see" in done.stderr
    assert "bug in embedcache" not in done.stderr


@pytest.mark.slow
def test_artifacts_of_plugins_that_are_not_installed(tmp_path: Path, cache_path: Path, site: Path) -> None:
    features = "--feature image=open_toy/cls --feature text=open_toy/mean"
    train = f"train {cache_path} run --projector plugged+linear --split key --epochs 1 {features}"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        succeed(*train.split(), cwd=tmp_path)
        succeed("extract", "plugged:red+green", "c", "--text-encoder", "plugged:toy", cwd=tmp_path)
    sys.modules.pop("plugged")
    for line in (
        f"evaluate retrieval {cache_path} run",
        f"train {cache_path} again --config run/run.json",
        "verify c --reencode 100%",
    ):
        done = embedcache(*line.split(), cwd=tmp_path)
        assert done.code == 1
        (error,) = (text for text in done.stderr.splitlines() if text.startswith("error: "))
        assert "'plugged'" in error
        assert "install" in error


def test_every_registry_is_tested_here() -> None:
    code = "".join(path.read_text() for path in (ROOT / "embedcache").rglob("*.py"))
    assert sorted(re.findall(r'group="embedcache\.(\w+)"', code)) == sorted(REGISTRIES)
