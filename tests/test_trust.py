"""A stranger's cache, run or index names code: none of it runs unless the user says so."""

import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from embedcache.errors import PathError, SettingError
from embedcache.extract.extract import extract
from embedcache.provenance import read_json
from embedcache.registry import (
    Registry,
    Trust,
    adopt_trust,
    current_trust,
    mark_as_read,
    names_from,
    trust_code,
    trust_files,
)
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.sources import SourceSettings, reopen_source
from embedcache.sources.folder import FolderSource
from embedcache.store.cache import Cache
from tests.cli.run import embedcache
from tests.edits import edit_record
from tests.images import write_images
from tests.toy import IMAGE

EVIL = """
from pathlib import Path
Path(__file__).with_name("pwned").touch()
def open_it(*arguments, **options):
    raise ValueError("opened")
"""
TABLE = Registry("number", {"pi": "math:pi"}, group="embedcache.numbers", has_objects=True)

pytestmark = pytest.mark.usefixtures("as_stranger")


@pytest.fixture
def stranger(run_path: Path, cache_path: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder with a stranger's cache, run and index, and the module that their files name, beside them."""
    shutil.copytree(cache_path, tmp_path / "cache")
    shutil.copytree(run_path, tmp_path / "run")
    trust_code("tests")
    build_index(tmp_path / "cache", tmp_path / "index", IndexSettings(feature="open_toy/cls"))
    (tmp_path / "evil.py").write_text(EVIL)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "x.png")
    info = tmp_path / "evil-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[embedcache.sources]\nharmless = evil:open_it\n")
    yield tmp_path
    sys.modules.pop("evil", None)


def name_source(folder: Path, name: str = "evil:open_it") -> None:
    path = folder / "cache" / "cache.json"
    edit_record(path, source={**read_json(path)["source"], "type": name})


def name_entry_point(folder: Path) -> None:
    name_source(folder, "harmless")


def name_projector(folder: Path, name: str = "evil:open_it") -> None:
    path = folder / "run" / "run.json"
    values = read_json(path)
    settings = values["settings"]
    model = {**settings["model"], "projector": name}
    edit_record(path, arguments={**values["arguments"], "projector": name}, settings={**settings, "model": model})


def name_projector_of_odd_name(folder: Path) -> None:
    name_projector(folder, "glu+evil:open_it+x")


def name_network(folder: Path) -> None:
    edit_record(folder / "run" / "run.json", kind="evil:open_it", arguments={})


def name_encoder(folder: Path) -> None:
    edit_record(folder / "index" / "card.json", spec="evil:open_it:model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tamper", "command"),
    [
        (name_source, "verify cache --reencode 100%"),
        (name_source, "curate dedup cache --feature open_toy/cls out.parquet --cosine 0.5 --html out.html"),
        (name_entry_point, "verify cache --reencode 100%"),
        (name_projector, "evaluate retrieval cache run"),
        (name_projector, "train cache new --config run/run.json --epochs 0"),
        (name_projector_of_odd_name, "train cache new --config run/run.json --epochs 0"),
        (name_network, "derive cache --run run --output x"),
        (name_encoder, "search index --query-image x.png"),
    ],
)
def test_opened_files_run_nothing(stranger: Path, tamper: Callable[[Path], None], command: str) -> None:
    tamper(stranger)
    done = embedcache(*command.split(), cwd=stranger)
    assert "Traceback" not in done.stderr
    assert not (stranger / "pwned").exists(), done.stderr
    assert str(stranger) not in sys.path
    if tamper is not name_entry_point:  # the command does open the name
        for path in stranger.glob("out.*"):  # an existing report is not overwritten
            path.unlink()
        done = embedcache(*command.split(), "--trust", cwd=stranger)
        assert (stranger / "pwned").exists(), done


def test_names_that_files_may_hold() -> None:
    with names_from("cache.json"):
        assert TABLE.load("pi") == TABLE.load("math:pi")
        with pytest.raises(SettingError, match="cache.json names the number 'math:e', which is custom code"):
            TABLE.load("math:e")
        with trust_files():
            TABLE.load("math:e")
    TABLE.load("math:e")  # given by the user, who may then open what it wrote
    with names_from("cache.json"):
        TABLE.load("math:e")
    mark_as_read("config.json", ["math:tau"])
    with pytest.raises(SettingError, match="config.json names"):
        TABLE.load("math:tau")


def test_worker_processes_trust_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    TABLE.load("math:e")
    sent = pickle.dumps(current_trust())
    monkeypatch.setattr("embedcache.registry._TRUST", Trust())
    with names_from("cache.json"):
        with pytest.raises(SettingError):
            TABLE.load("math:e")
        adopt_trust(pickle.loads(sent))  # noqa: S301
        TABLE.load("math:e")


def test_source_given_as_an_object_is_known(tmp_path: Path) -> None:
    """Its class was given to this process without its name."""
    write_images(tmp_path / "photos", 2)
    source = Photos(str(tmp_path / "photos"), SourceSettings())
    with pytest.raises(PathError, match="its source is tests.test_trust:Photos:.*, which may read and run anything"):
        reopen_source(source.describe())
    extract(source, tmp_path / "cache", image_encoder=[IMAGE])
    info = Cache(tmp_path / "cache").info
    assert reopen_source(info.source, info.index_digest).describe() == source.describe()


class Photos(FolderSource):
    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "type": "tests.test_trust:Photos"}
