"""The page of one's own plug-ins: its modules pass its tests and run."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pyarrow.parquet as pq
import pytest

from tests.blocks import ROOT, blocks_of
from tests.cli.run import TOY, succeed
from tests.images import write_images

HOWTO = ROOT / "docs" / "howto"
PAGE = HOWTO / "own_plugins.md"
MODULES = re.findall(r"^## .*`(my_\w+)\.py`$", PAGE.read_text(), re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with the modules of the page and its tests."""
    blocks = [block.code for block in blocks_of(PAGE) if block.language == "python"]
    for name, code in zip([*MODULES, "test_plugins"], blocks, strict=True):
        (tmp_path / f"{name}.py").write_text(code)
    yield tmp_path
    for name in (*MODULES, "test_plugins"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.usefixtures("as_stranger")
def test_modules_of_the_page_pass_its_tests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    words = ("-q", "-s", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--import-mode=importlib")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = pytest.main([*words, "test_plugins.py"])
    assert code == 0, printed.getvalue()
    assert re.search(r"^\d\d passed in", printed.getvalue(), re.MULTILINE), printed.getvalue()


@pytest.mark.slow
def test_modules_of_the_page_run_in_commands(folder: Path) -> None:
    write_images(folder / "photos", 60)
    with ZipFile(folder / "photos.zip", "w") as archive:
        for number, path in enumerate(sorted((folder / "photos").glob("*.png"))):
            caption = path.with_suffix(".txt").read_text().strip().replace(" ", "_")
            archive.write(path, f"{'ab'[number % 2]}/{caption}_{number}.png")
    (folder / "elsewhere").mkdir()
    extract = ("extract", "photos.zip", "cache", "--source-type", "my_sources:ZipSource", *TOY)
    assert "encoded 60" in succeed(*extract, cwd=folder)
    (folder / "my_sources.py").rename(folder / "elsewhere" / "my_sources.py")
    verify = ("verify", "../cache", "--reencode", "100%", "--trust")
    assert "60 items encoded again" in succeed(*verify, cwd=folder / "elsewhere")
    heads = (
        "--projector",
        "my_projectors:ResidualProjector+linear",
        "--loss",
        "my_losses:SoftMargin",
        "--split",
        "key",
    )
    succeed("train", "cache", "run", *heads, "--epochs", "2", cwd=folder)
    assert "R@1" in succeed("evaluate", "retrieval", "cache", "run", "--trust", cwd=folder)
    select = ("curate", "select", "cache", "unusual.parquet", "--method", "my_selectors:unusual", "--budget", "10%")
    succeed(*select, cwd=folder)
    cosines = pq.read_table(folder / "unusual.parquet")["cosine"].to_pylist()
    assert len(cosines) == 6
    assert all(0 < cosine < 1 for cosine in cosines)
    probe = ("evaluate", "probe", "cache", "--label", "label", "--split", "key")
    probe = (*probe, "--classifier", "my_probes:fit_centroids")
    assert "my_probes:fit_centroids" in succeed(*probe, cwd=folder)
