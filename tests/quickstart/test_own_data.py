"""The quickstart on a folder of one's own: real images with names, and what goes wrong in such folders."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from embedcache.cli.main import main
from embedcache.errors import EmbedcacheError, PathError, SourceError
from embedcache.quickstart.quickstart import QuickstartReport, frequent_things, quickstart
from embedcache.sources import open_source
from tests.recorded import RecordedProgress
from tests.toy import IMAGE, TEXT

NUM_IMAGES = 48


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of captioned images with a copy, a truncated file, and one without a caption."""
    folder = tmp_path_factory.mktemp("own") / "photos"
    folder.mkdir()
    source = open_source("openmoji:en")
    samples = [sample for sample in source.samples() if sample.columns["label"] == "Animals & Nature"]
    for sample in samples[:NUM_IMAGES]:
        (folder / f"{sample.key}.png").write_bytes(source.read(sample.images[0]))
        (folder / f"{sample.key}.txt").write_text(sample.texts[0].text)
    first, *_, last = sorted(folder.glob("*.png"))
    shutil.copy(first, folder / "copy.png")
    (folder / "damaged.png").write_bytes(last.read_bytes()[:500])
    return folder


def run(data: Path, folder: Path) -> QuickstartReport:
    return quickstart(data, folder, image_encoder=IMAGE, text_encoder=TEXT)


@pytest.fixture(scope="module")
def report(photos: Path) -> QuickstartReport:
    return quickstart(photos, photos.parent / "mine")


def test_one_command_does_everything(report: QuickstartReport, photos: Path) -> None:
    assert not report.missing
    assert set(report.retrieval) == {"projectors", "closed form", "shuffled pairs"}
    assert report.coverage is not None
    assert report.coverage.pool_counts.num_items == NUM_IMAGES + 1
    assert len(report.duplicates.removed(None)) >= 1
    captions = {path.read_text() for path in photos.glob("*.txt")}
    assert len(report.hits) == 5
    assert set(report.hits) < captions


def test_page_shows_images_copies_and_failures(report: QuickstartReport) -> None:
    page = report.page_path.read_text()
    assert page.count("data:image/webp") > 24
    for words in ("equal bytes", "hash distance", "damaged.png", "held out from training", "embedcache serve"):
        assert words in page


def test_data_are_never_written_to(report: QuickstartReport, photos: Path) -> None:
    assert len(list(photos.rglob("*"))) == 2 * NUM_IMAGES + 2


def test_second_run_reuses_everything(report: QuickstartReport, photos: Path) -> None:
    notes = RecordedProgress()
    again = quickstart(photos, photos.parent / "mine", progress=notes)
    output = "\n".join(notes.notes)
    assert "encoded 0 images" in output
    assert output.count("reused, trained earlier") == 3
    assert again.retrieval == report.retrieval


def test_printed_trainings_reuse_the_runs(
    report: QuickstartReport, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [stage.command for stage in report.stages if stage.name.startswith("train")]
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit):
            main()
    assert capsys.readouterr().out.count("reused, trained earlier") == len(commands) == 3


def test_images_without_captions_are_indexed_and_compared(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "bare", ignore=shutil.ignore_patterns("*.txt"))
    report = run(tmp_path / "bare", tmp_path / "mine")
    assert "no captions" in report.missing[0]
    assert not report.run_paths
    assert len(report.hits) == 5
    assert len(report.duplicates.removed(None)) >= 1


def test_images_without_captions_are_searched_by_what_a_classifier_knows(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "bare", ignore=shutil.ignore_patterns("*.txt"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "names.txt").write_text("bird\ndog\nfish\ncat\ntree\nsnail\n")
    report = quickstart(tmp_path / "bare", tmp_path / "mine")
    assert not report.retrieval
    assert report.run_paths
    assert report.coverage is not None
    assert set(report.hits) < {"bird", "dog", "fish", "cat", "tree", "snail"}


def test_too_few_pairs_are_searched_by_image(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    for path in sorted(photos.glob("1*"))[:4]:
        shutil.copy(path, tmp_path / "few")
    report = run(tmp_path / "few", tmp_path / "mine")
    assert "too few captions" in report.missing[0]
    assert report.hits
    assert report.page_path.is_file()


@pytest.mark.parametrize(
    ("data", "folder", "error", "words"),
    [
        ("photos", "photos", PathError, "name the data first"),
        ("photos", "photos/mine", PathError, "outside the data"),
        ("absent", "new", PathError, "does not exist"),
        ("empty", "new", SourceError, "no image"),
        ("names.txt", "new", SourceError, "expected images"),
        ("names.txt", "names.txt", PathError, "outside the data"),
    ],
)
def test_bad_paths_are_refused(
    photos: Path, tmp_path: Path, data: str, folder: str, error: type[EmbedcacheError], words: str
) -> None:
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "empty").mkdir()
    (tmp_path / "names.txt").write_text("dog\n")
    with pytest.raises(error, match=words):
        run(tmp_path / data, tmp_path / folder)
    assert not (tmp_path / "new").exists()


def test_one_path_with_images_shows_the_form_with_two(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["embedcache", "quickstart", str(photos)])
    with pytest.raises(SystemExit):
        main()
    assert f"embedcache quickstart {photos} embedcache-quickstart" in capsys.readouterr().err


def test_frequent_things_are_the_last_words_of_phrases() -> None:
    captions = ["A red apple on the kitchen table.", "an apple and a brown dog", "Apple, apple!"]
    assert frequent_things(captions, 2) == ["apple", "table"]
