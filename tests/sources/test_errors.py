"""Sources that cannot be opened or read: one error each, which names the cause."""

from pathlib import Path
from typing import Any

import pytest

from embedcache.errors import PathError, SourceError, UnknownNameError
from embedcache.sources import SourceSettings, open_source
from tests.sources.files import write

Files = dict[str, bytes | str]
KINDS = ("folder", "table", "prompts", "webdataset", "texts", "hf", "coco")
TABLES: list[tuple[str, bytes | str, dict[str, Any], str]] = [
    ("t.csv", "filename;caption\na.jpg;one\n", {}, "--delimiter"),
    ("t.csv", 'image,caption\na.jpg,one\nb.jpg,"two" three\n', {}, "line 3"),
    ("t.csv", 'image,caption\na.jpg,"5 inch pipe\nb.jpg,a "big" dog\n', {}, "line 3"),
    ("t.csv", "caption,caption\na,b\n", {}, "twice"),
    ("t.csv", '"caption" x,y\na,b\n', {}, "line 1"),
    ("t.csv", 'caption,image\nx\n"y,z', {}, "line"),
    ("t.csv", "words\nx\n", {}, "--item-column MODALITY=COLUMN and --caption-column"),
    ("t.csv", "words\nx\n", {"item_columns": {"image": "image"}}, "--item-column image"),
    ("t.csv", "words\nx\n", {"caption_columns": ("text",)}, "--caption-column"),
    ("t.csv", "caption\nx\n", {"omit_columns": ("number",)}, "--omit-column"),
    ("t.csv", "caption\nx\n", {"language_column": "lang"}, "--language-column"),
    ("t.csv", "image,caption,split\na,x,train\na,y,test\n", {"key_column": "image"}, "split"),
    ("t.csv", "image,caption,id\na,x,0\nb,y,0\n", {"key_column": "id"}, "images"),
    ("t.jsonl", '{"caption": "x"}\n{"capt', {}, "line 2"),
    ("t.jsonl", '{"caption": "a", "caption": "b"}\n', {}, "twice"),
    ("t.parquet", b"PAR1 no parquet", {}, "parquet"),
    *(
        ("t.csv", f"audio,start_s,stop_s\na.wav,{bounds}\n", {}, "row 0: expected seconds")
        for bounds in ("2,1", "-1,1", "nan,", "soon,", "0,inf", "0,nan")
    ),
]
"""A file, its content, settings, and a word of the error."""
LOCATIONS: list[tuple[str, Files, type[Exception], str]] = [
    ("nowhere", {}, PathError, "exist"),
    (".", {"a.docx": b""}, SourceError, "openmoji"),
    (".", {"a.mp3": b"", "a.wav": b""}, SourceError, r"a\.mp3 and a\.wav are both recordings of one sample; rename"),
    (".", {"dataset_dict.json": "{"}, SourceError, "cannot load the dataset"),
    (".", {"dataset_dict.json": '{"splits": ["train"]}'}, SourceError, "cannot load the dataset"),
    ("a.docx", {"a.docx": b""}, SourceError, "openmoji"),
    ("folder:a.docx", {"a.docx": b""}, PathError, "file"),
    ("coco:.", {}, PathError, "folder"),
    ("org/name[de]@v1", {}, PathError, r"org/name\[de\]@v1 does not exist; if you mean .*hf:org/name\[de\]@v1"),
    *((f"{kind}:", {}, SourceError, f"^{kind}: expected a location after the colon, got none") for kind in KINDS),
    *((place, {}, SourceError, f"^{place}: expected a path on both sides of ::") for place in ("::", "0.tar::")),
    ("{000..999999999}.tar", {}, SourceError, "expected at most 1,000,000 shards, got"),
    ("{0..999}{0..999}{a,b}.tar", {}, SourceError, "expected at most 1,000,000 shards, got"),
    ("texts:x", {}, PathError, "exist"),
    ("texts:t.npy", {"t.npy": b"\xff"}, SourceError, "expected a file of texts"),
    ("texts:t.txt", {"t.txt": b"\xff"}, SourceError, "t.txt .*as UTF-8"),
    ("prompts:none.json", {}, PathError, "none.json"),
    ("prompts:.", {}, SourceError, "classnames.txt"),
    ("prompts:n.txt", {"n.txt": ""}, SourceError, "n.txt"),
    ("prompts:n.txt", {"n.txt": "a\n\nb"}, SourceError, "blank"),
    ("prompts:n.txt+t.txt", {"n.txt": "a", "t.txt": "a photo"}, SourceError, "{c}"),
    ("prompts:n.txt+t.txt", {"n.txt": "a", "t.txt": b"\xff{c}"}, SourceError, "UTF-8"),
    ("prompts:p.json", {"p.json": "[1]"}, SourceError, "object"),
    ("prompts:p.json", {"p.json": '{"cat": ["x"], "cat": ["y"]}'}, SourceError, "twice"),
    ("prompts:p.json", {"p.json": '{"cat": ["x"], "dog": []}'}, SourceError, "dog"),
    ("prompts:p.json+t.txt", {"p.json": '{"cat": "x"}', "t.txt": "{c}"}, SourceError, "already"),
    ("prompts:imagenet", {}, UnknownNameError, "imagenet1k"),
]
"""A location, files there, the error, and a word of it."""


@pytest.mark.parametrize(("name", "content", "settings", "word"), TABLES)
def test_table_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes | str, settings: dict[str, Any], word: str
) -> None:
    write(tmp_path, {name: content})
    with pytest.raises(SourceError, match=word):
        list(open_source(tmp_path / name, settings=SourceSettings(**settings)).samples())


@pytest.mark.parametrize(("location", "files", "error", "word"), LOCATIONS)
def test_location_that_is_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, files: Files, error: type[Exception], word: str
) -> None:
    monkeypatch.chdir(write(tmp_path, files))
    with pytest.raises(error, match=word):
        list(open_source(location).samples())


@pytest.mark.parametrize(("languages", "word"), [(("de",), "ar, cn, en"), (("en", "it"), "one language")])
def test_prompts_of_other_languages(languages: tuple[str, ...], word: str) -> None:
    with pytest.raises(SourceError, match=word):
        list(open_source("prompts:imagenet1k", settings=SourceSettings(languages=languages)).samples())


def test_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="folder"):
        open_source(tmp_path, kind="foldr")
