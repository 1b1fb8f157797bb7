"""The input of a run: several caches, selections, all captions, token features."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.dataset.splits import read_split
from embedcache.errors import DataError, FingerprintError, SettingError
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.extract.extract import extract
from embedcache.runs import Run
from embedcache.sources import open_source
from embedcache.sources.settings import SourceSettings
from embedcache.store.cache import Cache
from embedcache.train.data import open_data
from tests.edits import edit_record
from tests.images import write_images
from tests.recorded import RecordedProgress
from tests.toy import IMAGE, TEXT
from tests.train.runs import IMAGE as IMAGE_FEATURE
from tests.train.runs import TEXT as TEXT_FEATURE
from tests.train.runs import beats_chance, run


@pytest.mark.slow
def test_two_caches_train_as_one(two_caches: list[Path], tmp_path: Path) -> None:
    report = run(two_caches, tmp_path / "run")
    assert sum(report.num_samples.values()) == 120
    split = read_split(tmp_path / "run/split.parquet", [Cache(path) for path in two_caches])
    for path, parts in zip(two_caches, (split.parts[:40], split.parts[40:]), strict=True):
        assert evaluate_retrieval(path, [tmp_path / "run"]).num_items["image"] == [parts.count("test")]
    assert run(two_caches, tmp_path / "run").reused
    with pytest.raises(FingerprintError, match="index_digest"):
        run(two_caches[::-1], tmp_path / "run")


def test_caches_of_different_encoders_are_refused(two_caches: list[Path], tmp_path: Path) -> None:
    source = open_source(write_images(tmp_path / "s", 10))
    extract(source, tmp_path / "c", image_encoder=["tests.toy:open_toy,scale=2"], text_encoder=[TEXT])
    with pytest.raises(FingerprintError, match="open_toy/cls"):
        open_data([two_caches[0], tmp_path / "c"], {"image": IMAGE_FEATURE, "text": TEXT_FEATURE}, memory_bytes=0)


def test_the_same_samples_twice_are_refused(two_caches: list[Path], tmp_path: Path) -> None:
    larger = Path(shutil.copytree(two_caches[1], tmp_path / "larger"))
    info = Cache(two_caches[0]).info
    edit_record(larger / "cache.json", earlier_versions=[{"index_digest": info.index_digest, "num_parts": 1}])
    for caches in ([two_caches[0], two_caches[0]], [two_caches[0], larger], [larger, two_caches[0]]):
        with pytest.raises(DataError, match="different samples"):
            open_data(caches, {"image": IMAGE_FEATURE, "text": TEXT_FEATURE}, memory_bytes=0)


@pytest.mark.slow
def test_captions_in_several_languages_are_trained_on_in_the_first(tmp_path: Path) -> None:
    """Check captions in two languages, of which the encoder finds those of the second alike."""
    folder = write_images(tmp_path / "s", 80)
    rows = ["file_name,caption,language"]
    for number in range(80):
        caption = folder / f"{number:05d}.txt"
        rows += [f"{number:05d}.png,{caption.read_text().strip()},en", f"{number:05d}.png,ein Bild,de"]
        caption.unlink()
    (folder / "table.csv").write_text("\n".join(rows))
    source = open_source(folder / "table.csv", settings=SourceSettings(key_column="file_name"))
    extract(source, tmp_path / "c", image_encoder=[IMAGE], text_encoder=[TEXT])

    options = {"split": "strict", "cosine": 0.999, "epochs": 0, "batch_size": 16}
    progress = RecordedProgress()
    run(tmp_path / "c", tmp_path / "run", **options, progress=progress)
    assert Run.open(tmp_path / "run").info.settings["language"] == "en"
    assert any("only those in en" in note for note in progress.notes)
    assert run(tmp_path / "c", tmp_path / "run", **options, language="en").reused
    with pytest.raises(SettingError, match="language"):
        run(tmp_path / "c", tmp_path / "any", **options, language="any")


@pytest.mark.slow
def test_selection_limits_the_training_part(cache_path: Path, tmp_path: Path) -> None:
    keys = Cache(cache_path).samples["key"].to_pylist()
    (tmp_path / "keys.txt").write_text("\n".join(keys[:100]) + "\n")
    pq.write_table(pa.table({"row": range(100), "key": keys[:100], "reason": ["first"] * 100}), tmp_path / "s.parquet")
    whole = run(cache_path, tmp_path / "whole", epochs=1)
    texts, tables = (
        run(cache_path, tmp_path / name, selection=str(tmp_path / file), batch_size=32, epochs=1)
        for name, file in (("text", "keys.txt"), ("table", "s.parquet"))
    )
    split = read_split(tmp_path / "text/split.parquet", [Cache(cache_path)])
    assert texts.num_samples["train"] == split.parts[:100].count("train") < whole.num_samples["train"]
    assert {part: texts.num_samples[part] for part in ("val", "test")} == {
        part: whole.num_samples[part] for part in ("val", "test")
    }
    assert (tmp_path / "text/model.safetensors").read_bytes() == (tmp_path / "table/model.safetensors").read_bytes()
    assert tables.measures == texts.measures
    held_out = 100 - texts.num_samples["train"]
    assert f"WARNING: {held_out} of the selected samples are held out" in texts.line(tmp_path / "text")
    assert "WARNING" not in whole.line(tmp_path / "whole")
    whole_part = run(cache_path, tmp_path / "part", selection=str(tmp_path / "whole/split.parquet"), epochs=1)
    assert (whole_part.num_samples, whole_part.num_held_out) == (whole.num_samples, 0)


@pytest.mark.parametrize("keys", ["00003\nb\n", "\n"])
def test_selection_is_read_before_the_split_is_made(cache_path: Path, tmp_path: Path, keys: str) -> None:
    (tmp_path / "keys.txt").write_text(keys)
    with pytest.raises(DataError, match="keys"):
        run(cache_path, tmp_path / "run", selection=str(tmp_path / "keys.txt"))
    assert not (tmp_path / "run" / "split.parquet").exists()


@pytest.mark.slow
@pytest.mark.no_mutants
@pytest.mark.parametrize(
    ("image", "text", "projector"),
    [
        ("open_toy/patches", "open_toy/tokens", "token"),
        ("open_toy/patches", "open_toy/mean", "token+mlp"),
        ("open_toy/cls", "open_toy/tokens", "mlp+token_mlp"),
        ("open_toy/cls", "open_toy/mean", "token+token_mlp"),
    ],
)
def test_token_features_beat_chance(
    cache_path: Path, two_caches: list[Path], tmp_path: Path, image: str, text: str, projector: str
) -> None:
    run(cache_path, tmp_path / "run", image=image, text=text, projector=projector, epochs=8, lr=0.02)
    assert beats_chance(evaluate_retrieval(cache_path, [tmp_path / "run"]))
    run(two_caches, tmp_path / "two", image=image, text=text, projector=projector, epochs=1, memory=1)
