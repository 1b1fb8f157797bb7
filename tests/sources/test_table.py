import csv
import json
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest

from embedcache.errors import ItemError, SettingError, SourceError
from embedcache.sources import FileItem, Source, SourceSettings, TextItem, open_source, read_below
from embedcache.sources.open import below_named
from embedcache.store.indexing import index
from embedcache.testing.sources import SourceContract
from tests.sources.files import COLORS, jpeg, reopen, write, write_parquet

IMAGES = [jpeg(color) for color in COLORS]


class TestFolderOfHuggingFaceParquet(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        for part in ("train-0", "train-1"):
            cells = [{"bytes": data, "path": "x.jpg"} for data in IMAGES]
            captions = [["one", color] for color in COLORS]
            write_parquet(tmp_path / f"{part}.parquet", image=cells, caption=captions)
        return open_source(tmp_path)


class TestCsvOfPaths(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        write(tmp_path / "images", {f"{n}.jpg": data for n, data in enumerate(IMAGES)})
        rows = "".join(f"k{n},images/{n}.jpg,caption {n}\n" for n in range(5))
        write(tmp_path, {"t.csv": "id,image_path,caption\n" + rows})
        return open_source(tmp_path / "t.csv")


class TestJsonlWithSettings(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        rows = [f'{{"n": {n}, "photo": "{n}.jpg", "said": ["a", "b {n}"]}}' for n in range(5)]
        files = {f"{n}.jpg": data for n, data in enumerate(IMAGES)}
        write(tmp_path, {**files, "t.jsonl": "\n".join(rows)})
        settings = SourceSettings(item_columns={"image": "photo"}, caption_columns=("said",), key_column="n")
        return open_source(tmp_path / "t.jsonl", settings=settings)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_cell_lists_the_items_of_a_sample(tmp_path: Path, suffix: str) -> None:
    rows = [{"audio": ["a.wav", "b.wav"], "caption": "both"}, {"audio": [], "caption": "none"}]
    write(tmp_path, {"a.wav": b"1", "b.wav": b"2", "t.jsonl": "\n".join(map(json.dumps, rows))})
    write_parquet(tmp_path / "t.parquet", **{name: [row[name] for row in rows] for name in rows[0]})
    source = open_source(tmp_path / f"t.{suffix}")
    both, none = source.samples()
    assert [source.read(item) for item in both.files["audio"]] == [b"1", b"2"]
    assert none.files == {}


def test_keys_without_key_column(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_parquet(tmp_path / f"{name}.parquet", caption=["x", "y"])
    keys = [sample.key for sample in open_source(tmp_path).samples()]
    assert keys == ["a/0", "a/1", "b/0", "b/1"]


def write_captions(folder: Path, rows: str) -> Path:
    write(folder, {"a.jpg": IMAGES[0], "b.jpg": IMAGES[1], "t.csv": "filename,caption,lang,split\n" + rows})
    return folder / "t.csv"


def test_rows_of_one_key_are_one_sample(tmp_path: Path) -> None:
    path = write_captions(tmp_path, "a.jpg,one,en,train\na.jpg,zwei,de,train\nb.jpg,three,en,test\n")
    source = open_source(path, settings=SourceSettings(key_column="filename", item_columns={"image": "filename"}))
    first, second = source.samples()
    assert first.key == "a.jpg"
    assert first.images == (FileItem(path="a.jpg"),)
    assert first.texts == (TextItem(text="one", language="en"), TextItem(text="zwei", language="de"))
    assert [text.text for text in second.texts] == ["three"]
    assert list(reopen(source.describe()).samples()) == [first, second]


def test_rows_of_one_key_must_be_adjacent(tmp_path: Path) -> None:
    path = write_captions(tmp_path, "a.jpg,one,en,x\nb.jpg,two,en,x\na.jpg,three,en,x\na.jpg,four,en,x\n")
    keyed = open_source(path, settings=SourceSettings(key_column="filename"))
    with pytest.raises(SourceError, match=r"'a.jpg' is the key of rows 0 and 2 .*sort the rows by --key-column"):
        index(keyed, tmp_path / "keyed")
    write_captions(tmp_path, "a.jpg,one,en,x\na.jpg,three,en,x\nb.jpg,two,en,x\n")
    info = index(keyed, tmp_path / "keyed")
    assert (info.num_samples, dict(info.num_items)) == (2, {"image": 2, "text": 3})


FLICKR = """image_name| comment_number| comment
a.jpg| 0| Two "young" men .
a.jpg| 1| Men , and bushes
b.jpg| 0| A bar
"""


def test_captions_of_flickr30k_as_downloaded(tmp_path: Path) -> None:
    write(tmp_path, {"images/a.jpg": IMAGES[0], "images/b.jpg": IMAGES[1], "results.csv": FLICKR})
    settings = SourceSettings(
        delimiter="|",
        caption_columns=("comment",),
        key_column="image_name",
        omit_columns=("comment_number",),
        root=str(tmp_path / "images"),
    )
    source = open_source(tmp_path / "results.csv", settings=settings)
    first, second = source.samples()
    assert [text.text for text in first.texts] == ['Two "young" men .', "Men , and bushes"]
    assert first.columns == {}
    assert [first.images, second.images] == [(FileItem(path=f"images/{name}.jpg"),) for name in "ab"]
    assert source.read(second.images[0]) == IMAGES[1]
    assert list(reopen(source.describe()).samples()) == [first, second]
    write(tmp_path, {"results.csv": FLICKR + "b.jpg| 1| A | bar\n"})
    with pytest.raises(SourceError, match=r"results.csv line 5: expected 3 cells, got 4"):
        list(source.samples())


def test_images_in_a_folder_elsewhere(tmp_path: Path) -> None:
    write(tmp_path, {"images/a.jpg": IMAGES[0], "table/t.csv": "image\na.jpg\n"})
    for root in (f"{tmp_path}/images", "s3://bucket/images"):
        source = open_source(tmp_path / "table/t.csv", settings=SourceSettings(root=root))
        assert [sample.images[0].path for sample in source.samples()] == [f"{root}/a.jpg"]


def test_delimiter_of_a_table_without_one_raises(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", caption=["a"])
    with pytest.raises(SettingError, match=r"t.parquet has no delimiter, as it is no text table"):
        list(open_source(path, settings=SourceSettings(delimiter=";")).samples())


def test_other_columns_are_kept(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", caption=["x"], split=["test"], label=[3], sprache=["de"], id=[7])
    (sample,) = open_source(path, settings=SourceSettings(language_column="sprache")).samples()
    assert (sample.key, sample.columns) == ("7", {"split": "test", "label": 3})
    assert sample.texts == (TextItem(text="x", language="de"),)


def test_dates_and_decimals_are_kept_as_text(tmp_path: Path) -> None:
    other = {
        "made": pa.array([datetime(2026, 11, 29, 5, 30)], pa.timestamp("ms", "UTC")),
        "price": pa.array([Decimal("1.50")]),
        "length": pa.array([timedelta(seconds=90)]),
        "tags": [["a"]],
    }
    (sample,) = open_source(write_parquet(tmp_path / "t.parquet", caption=["x"], **other)).samples()
    assert sample.columns == {"made": "2026-11-29T05:30:00+00:00", "price": "1.50", "length": "0:01:30"}


@pytest.mark.parametrize("names", [("caption_0", "caption_1"), ("sentence", "sentences"), ("text1", "text2")])
def test_several_caption_columns(tmp_path: Path, names: tuple[str, str]) -> None:
    path = write_parquet(tmp_path / "t.parquet", **{names[0]: ["a"], names[1]: ["b"]})
    (sample,) = open_source(path).samples()
    assert [item.text for item in sample.texts] == ["a", "b"]


def test_blank_captions_are_kept_unless_there_are_others(tmp_path: Path) -> None:
    for texts, columns in (
        (["a", ""], {"caption": [["a", " "]]}),
        (["a"], {"caption_1": ["a"], "caption_2": [" "]}),
        (["", ""], {"caption_1": [""], "caption_2": [" "]}),
    ):
        (sample,) = open_source(write_parquet(tmp_path / "t.parquet", **columns)).samples()
        assert [text.text for text in sample.texts] == texts


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_cells_keep_their_characters(tmp_path: Path, suffix: str) -> None:
    """Keys, captions and labels that look like numbers, dates, truth values or missing ones."""
    cells = ["007", "1e5", "2026-12-01", "TRUE", "NA", "null", " x", '"', "a, b\tc", "two\nlines", "\u00e4"]
    path = tmp_path / f"t{suffix}"
    if suffix == ".jsonl":
        rows = [json.dumps({"key": cell, "caption": f"a {cell}", "label": cell}) for cell in cells]
        path.write_text("\n".join(rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writerows([["key", "caption", "label"], *([cell, f"a {cell}", cell] for cell in cells)])
    samples = list(open_source(path).samples())
    assert [sample.key for sample in samples] == cells
    assert [sample.texts[0].text for sample in samples] == [f"a {cell}".strip() for cell in cells]
    assert [sample.columns for sample in samples] == [{"label": cell} for cell in cells]


def test_columns_of_jsonl_are_the_fields_of_its_first_rows(tmp_path: Path) -> None:
    late = {99: {"score": 0.5}, 100: {"site": "a"}}
    rows = ({"id": f"k{n}", "text": f"text {n}", "n": n, **late.get(n, {})} for n in range(200))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = list(open_source(tmp_path / "t.jsonl", settings=SourceSettings(key_column="id")).samples())
    assert [samples[row].columns for row in (99, 100)] == [{"n": 99, "score": 0.5}, {"n": 100, "score": None}]


def test_changed_table_raises_item_error(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    source = open_source(write_parquet(path, image=IMAGES))
    item = next(iter(source.samples())).images[0]
    assert item == FileItem(path="t.parquet#image")
    write_parquet(path, sound=IMAGES)
    with pytest.raises(ItemError, match=r"no column 'image': .*t\.parquet has others"):
        source.read(item)
    path.write_bytes(b"PAR1" + bytes(path.stat().st_size - 4))
    with pytest.raises(ItemError, match=r"t\.parquet"):
        open_source(write_parquet(tmp_path / "u.parquet", image=IMAGES)).read(FileItem(path="t.parquet#image"))


def test_empty_cell_raises_item_error(tmp_path: Path) -> None:
    image = pa.array([None, IMAGES[0]], pa.binary())
    source = open_source(write_parquet(tmp_path / "t.parquet", image=image))
    first, second = (sample.images[0] for sample in source.samples())
    with pytest.raises(ItemError, match=r"no item in column image: row 0 of .*t.parquet is empty"):
        source.read(first)
    assert source.read(second) == IMAGES[0]


def test_named_folders_are_read_alone(tmp_path: Path) -> None:
    """A stranger's table names files elsewhere, links that lead there, and addresses."""
    table = tmp_path / "table"
    write(table, {"a.jpg": IMAGES[0]})
    write(tmp_path, {"secret.jpg": IMAGES[1]})
    (table / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    urls = ["http://127.0.0.1:9/x.jpg", f"file://{tmp_path}/secret.jpg"]
    paths = ["a.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "/dev/zero", *urls]
    (table / "t.csv").write_text("\n".join(["image_path", *paths]) + "\n")
    with read_below(table):
        source = below_named(open_source(table / "t.csv"))
    first, *others = (sample.images[0] for sample in source.samples())
    assert source.read(first) == IMAGES[0]
    for item in others:
        with pytest.raises(ItemError, match="outside the source and --image-folder: "):
            source.read(item)
