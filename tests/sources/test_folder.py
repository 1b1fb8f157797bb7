import json
import re
from pathlib import Path

import pytest

from embedcache.errors import ItemError
from embedcache.sources import Sample, Source, TextItem, open_source
from embedcache.testing.sources import SourceContract
from tests.sources.files import jpeg, write


class TestFolder(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        write(
            tmp_path,
            {
                "b.JPG": jpeg("red"),
                "b.txt": "a red square\n\n  a square  \n",
                "animals/dog.jpeg": jpeg("green"),
                "animals/dog.json": json.dumps({"captions": ["ein Hund"], "language": "de"}),
                "no-captions.jpg": jpeg("blue"),
            },
        )
        return open_source(tmp_path)


def only_sample(folder: Path) -> Sample:
    (sample,) = open_source(folder).samples()
    return sample


def test_samples_are_sorted_by_path(tmp_path: Path) -> None:
    names = ["b.jpg", "a/z.png", "a/b/c.WEBP", "z.tiff", "a.gif"]
    write(tmp_path, dict.fromkeys(names, jpeg()))
    samples = list(open_source(tmp_path).samples())
    paths = [item.path for sample in samples for item in sample.images]
    assert paths == ["a.gif", "a/b/c.WEBP", "a/z.png", "b.jpg", "z.tiff"]
    assert [sample.key for sample in samples] == ["a", "a/b/c", "a/z", "b", "z"]


@pytest.mark.parametrize(
    ("path", "columns"),
    [
        ("x.jpg", {}),
        ("cat/x.jpg", {"folder": "cat", "label": "cat"}),
        ("pets/cat/x.jpg", {"folder": "pets/cat", "label": "cat"}),
        ("train/cat/x.jpg", {"folder": "train/cat", "label": "cat", "split": "train"}),
        ("Validation/a/b/x.jpg", {"folder": "Validation/a/b", "label": "b", "split": "Validation"}),
        ("test/x.jpg", {"folder": "test", "split": "test"}),
        ("cat/test/x.jpg", {"folder": "cat/test", "label": "test"}),
    ],
)
def test_label_and_split_from_folders(tmp_path: Path, path: str, columns: dict[str, str]) -> None:
    write(tmp_path, {path: jpeg()})
    assert only_sample(tmp_path).columns == columns


def test_json_overrides_folders(tmp_path: Path) -> None:
    write(tmp_path, {"train/cat/x.jpg": jpeg(), "train/cat/x.json": '{"label": "lynx", "split": "test"}'})
    assert only_sample(tmp_path).columns == {"folder": "train/cat", "label": "lynx", "split": "test"}


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x1c"])
def test_only_line_ends_separate_captions(tmp_path: Path, separator: str) -> None:
    write(tmp_path, {"x.jpg": jpeg(), "x.txt": f"one{separator}more\rtwo\n"})
    assert only_sample(tmp_path).texts == (TextItem(text=f"one{separator}more"), TextItem(text="two"))


def test_json_captions_language_and_columns(tmp_path: Path) -> None:
    fields = {"caption": "a dog", "texts": ["x", "y"], "language": "en", "split": "test"}
    write(tmp_path, {"x.jpg": jpeg(), "x.json": json.dumps({**fields, "label": 3, "boxes": [1]})})
    sample = only_sample(tmp_path)
    assert sample.texts == tuple(TextItem(text=t, language="en") for t in ("a dog", "x", "y"))
    assert sample.columns == {"split": "test", "label": 3}


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_txt_is_one_empty_caption(tmp_path: Path, content: str) -> None:
    write(tmp_path, {"x.jpg": jpeg(), "x.txt": content})
    assert only_sample(tmp_path).texts == (TextItem(text=""),)


def test_hidden_files_and_link_loops_are_skipped(tmp_path: Path) -> None:
    write(tmp_path, {"x.jpg": jpeg(), ".y.jpg": jpeg(), ".trash/z.jpg": jpeg(), "sub/a.jpg": jpeg()})
    write(tmp_path, {"b.svg": "", "c.SVG": "", "README": ""})
    (tmp_path / "sub" / "up").symlink_to(tmp_path, target_is_directory=True)
    source = open_source(tmp_path)
    for _ in range(2):
        assert [sample.key for sample in source.samples()] == ["sub/a", "x"]
        assert source.skipped == {".svg": 2, "files without a suffix": 1}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"caption": ', "not valid JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"caption": 7}', "expected a string"),
        (b'{"caption": ["a", null]}', "expected a string"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_invalid_json_is_reported_in_a_column(tmp_path: Path, content: bytes, words: str) -> None:
    write(tmp_path, {"sub/x.jpg": jpeg(), "sub/x.json": content})
    sample = only_sample(tmp_path)
    assert sample.texts == ()
    assert re.match(rf"sub/x\.json.*{words}", str(sample.columns["caption_error"]))


def test_invalid_txt_keeps_captions_of_json(tmp_path: Path) -> None:
    write(tmp_path, {"x.jpg": jpeg(), "x.txt": "Käse".encode("latin-1"), "x.json": '{"caption": "cheese", "n": 1}'})
    sample = only_sample(tmp_path)
    assert sample.texts == (TextItem(text="cheese"),)
    assert sample.columns["n"] == 1
    assert re.match(r"x\.txt is not UTF-8.*save it as UTF-8", str(sample.columns["caption_error"]))


def test_missing_sidecar_is_reported_in_a_column(tmp_path: Path) -> None:
    write(tmp_path, {"x.jpg": jpeg(), "y.jpg": jpeg(), "y.txt": "words"})
    (tmp_path / "x.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "z.jpg").symlink_to(tmp_path / "nowhere")
    source = open_source(tmp_path)
    first, second, third = source.samples()
    with pytest.raises(ItemError, match="no such file"):
        source.read(third.images[0])
    assert first.columns == {"caption_error": "cannot read x.txt: No such file or directory"}
    assert second.texts == (TextItem(text="words"),)
