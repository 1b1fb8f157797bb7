import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.arrays import Array, Ints, normalize
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import Split, read_split, write_split
from embedcache.derive.derive import derive_from_run
from embedcache.errors import DataError, EmbedcacheError, SettingError, UnfinishedError, UnknownNameError
from embedcache.evaluate.encoder_pairs import PairMetrics, PairsReport, _assign_blocks, evaluate_pairs
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.evaluate.settings import PairsSettings, RetrievalSettings
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.settings import replace_fields
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.train.settings import ModelSettings, OptimizerSettings, TrainSettings
from embedcache.train.train import train
from tests.images import write_images
from tests.metrics.test_alignment import debiased_cka, mutual_knn
from tests.toy import IMAGE, TEXT

SPLIT = SplitSettings(val_fraction=0.25, cosines={"image": 0.995, "text": 0.95})
IMAGES, TEXTS = ("open_toy/cls", "open_toy/patches"), ("open_toy/mean", "open_toy/tokens")
OTHER = "tests.toy:open_other"


def compare(cache_path: Path, feature: Any = None, **settings: Any) -> PairsReport:
    return evaluate_pairs(cache_path, PairsSettings(**settings), feature=feature)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of eighty images with one to three captions."""
    folder = write_images(tmp_path_factory.mktemp("source") / "s", 80, seed=3)
    for number, path in enumerate(sorted(folder.glob("*.txt"))):
        own = path.read_text().strip()
        path.write_text("\n".join([own, f"a {own} picture", f"{own} again"][: 1 + number % 3]))
    path = tmp_path_factory.mktemp("captioned") / "cache"
    settings = ExtractSettings(features=("cls", "patches", "mean", "tokens"), chunk_size=32)
    extract(open_source(folder), path, image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)
    return path


@pytest.fixture(scope="module")
def report(cache_path: Path) -> PairsReport:
    return compare(cache_path, split=SPLIT)


def trained_run(cache_path: Path, run_path: Path, split: SplitSettings) -> Path:
    """Train a run of zero epochs, which keeps the closed form."""
    settings = TrainSettings(
        model=ModelSettings(projector="linear", initialization="cca"),
        optimizer=OptimizerSettings(epochs=0),
        split=split,
    )
    train(cache_path, run_path, feature={"image": IMAGES[0], "text": TEXTS[0]}, settings=settings)
    return run_path


def of(report: PairsReport, image: str, text: str) -> PairMetrics:
    return next(pair for pair in report.pairs if [*pair.features.values()] == [image, text])


def unit_means(cache: Cache, modality: str, name: str, samples: Ints) -> Array:
    """Compute the row of each sample in a plain loop."""
    feature, owner = cache.feature(modality, name), cache.items(modality)["sample"].to_numpy()
    rows = []
    for sample in samples:
        items = feature.gather_tokens(np.flatnonzero(owner == sample)) if "t" in name.partition("/")[2] else None
        vectors = (
            [tokens.astype(np.float32).mean(axis=0) for tokens in items]
            if items is not None
            else list(feature.gather(np.flatnonzero(owner == sample)).astype(np.float32))
        )
        rows.append(normalize(np.stack(vectors)).mean(axis=0))
    return np.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize(("image", "text"), [(IMAGES[0], TEXTS[0]), (IMAGES[1], TEXTS[1])])
def test_metrics_match_the_plain_formulas(captioned: Path, tmp_path: Path, image: str, text: str) -> None:
    split = replace_fields(SPLIT, kind="key")
    report = compare(captioned, feature={"image": (image,), "text": (text,)}, split=split, k=5)
    cut = read_split(trained_run(captioned, tmp_path / "run", split) / "split.parquet", [Cache(captioned)])
    samples = np.flatnonzero(np.isin(cut.parts, ["train", "val"]))
    assert (report.num_drawn, report.num_compared, report.num_held) == (80, 60, 20)
    x, y = (unit_means(Cache(captioned), *side, samples) for side in (("image", image), ("text", text)))
    pair = report.pairs[0]
    assert pair.debiased_cka.value == pytest.approx(debiased_cka(x, y), abs=1e-5)
    assert pair.mutual_knn.value == pytest.approx(mutual_knn(x, y, 5), abs=0.01)  # equal captions tie


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["strict", "key"])
def test_probe_matches_a_run_with_closed_form(captioned: Path, tmp_path: Path, kind: str) -> None:
    split = replace_fields(SPLIT, kind=kind, cosines={"image": 0.999, "text": 0.99})
    run = trained_run(captioned, tmp_path / "run", split)
    expected = evaluate_retrieval(captioned, [run], RetrievalSettings(part="val"))
    for given in (split, SplitSettings(kind=str(run / "split.parquet"))):
        report = compare(captioned, feature={"image": IMAGES[:1], "text": TEXTS[:1]}, split=given)
        found = report.pairs[0].recalls
        for direction, estimate in found.items():
            assert estimate.value == pytest.approx(expected.recalls[direction]["r@10"].value, abs=0.03)  # one may tie
            assert estimate.low == pytest.approx(expected.recalls[direction]["r@10"].low, abs=0.03)
            assert report.chance[direction] == expected.chance[direction]["r@10"]
    assert 0.1 < expected.recalls["i2t"]["r@10"].value < 1


def test_pairs_are_sorted_by_probe(report: PairsReport) -> None:
    assert {tuple(pair.features.values()) for pair in report.pairs} == {
        (image, text) for image in IMAGES for text in TEXTS
    }
    probes = [pair.probe for pair in report.pairs]
    assert probes == sorted(probes, reverse=True)
    assert probes[0] > probes[-1]
    cls, patches = of(report, IMAGES[0], TEXTS[0]), of(report, IMAGES[1], TEXTS[0])
    assert cls.probe > patches.probe + 0.1  # the mean color does not say where the bar is
    for pair in report.pairs:
        for estimate in (*pair.recalls.values(), pair.mutual_knn, pair.debiased_cka):
            assert estimate.low < estimate.value < estimate.high


@pytest.mark.slow
def test_draw_is_bounded_and_seeded(cache_path: Path) -> None:
    def drawn(seed: int) -> PairsReport:
        key = SplitSettings(kind="key", val_fraction=0.25)
        return compare(
            cache_path,
            feature={"image": IMAGES[:1], "text": TEXTS[:1]},
            num_samples=100,
            seed=seed,
            split=key,
        )

    assert drawn(0).num_drawn == 100
    assert drawn(0).num_compared == 75
    assert drawn(0).pairs == drawn(0).pairs != drawn(1).pairs


@pytest.mark.slow
def test_unfinished_feature_is_skipped_or_refused(tmp_path: Path) -> None:
    source = open_source(write_images(tmp_path / "s", 60))
    extract(source, tmp_path / "c", image_encoder=[IMAGE, OTHER], text_encoder=[TEXT])
    next((tmp_path / "c" / "image" / "open_other" / "chunks").glob("*.json")).unlink()
    key = SplitSettings(kind="key", val_fraction=0.25)
    report = compare(tmp_path / "c", split=key)
    assert [pair.features["image"] for pair in report.pairs] == ["open_toy/cls"]
    assert "open_other/cls" in report.skipped[0]
    with pytest.raises(UnfinishedError, match="open_other/cls"):
        compare(tmp_path / "c", feature={"image": ("open_other",)}, split=key)
    next((tmp_path / "c" / "image" / "open_toy" / "chunks").glob("*.json")).unlink()
    with pytest.raises(UnfinishedError, match="complete"):
        compare(tmp_path / "c", split=key)


@pytest.mark.slow
def test_feature_of_a_run_is_compared_only_by_name(cache_path: Path, tmp_path: Path) -> None:
    shutil.copytree(cache_path, tmp_path / "c")
    split = SplitSettings(kind="key", val_fraction=0.25)
    derive_from_run(tmp_path / "c", trained_run(tmp_path / "c", tmp_path / "run", split))
    report = compare(tmp_path / "c", feature={"text": TEXTS[0]}, split=split)
    assert [pair.features["image"] for pair in report.pairs] == [*IMAGES]
    assert "run-projected/projected was computed by a run" in report.skipped[0]
    named = compare(tmp_path / "c", feature={"image": "run-projected", "text": TEXTS[0]}, split=split)
    assert [pair.features["image"] for pair in named.pairs] == ["run-projected/projected"]


@pytest.mark.slow
def test_invalid_settings_raise(cache_path: Path, captioned: Path, tmp_path: Path) -> None:
    key = SplitSettings(kind="key", val_fraction=0.25)
    ten = Split(parts=["train"] * 290 + ["val"] * 10, groups=np.arange(300))
    write_split(tmp_path / "ten.parquet", [Cache(cache_path)], ten)
    for name, count, image in (("few", 19, IMAGE), ("equal", 60, f"{IMAGE},scale=0")):
        source = open_source(write_images(tmp_path / f"{name}-source", count))
        extract(source, tmp_path / name, image_encoder=[image], text_encoder=[TEXT])
    wrong: list[tuple[Path, dict[str, Any], type[EmbedcacheError], str]] = [
        (cache_path, {"feature": {"image": ("open_toy/clz",)}}, UnknownNameError, "clz"),
        (captioned, {"k": 60, "split": key}, SettingError, "60"),
        (cache_path, {"split": replace_fields(SPLIT, cosines={"image": 0.995, "text": 0.1})}, SettingError, "300"),
        (cache_path, {"num_samples": 20, "split": key}, DataError, "10 and 5"),
        (cache_path, {"split": SplitSettings(kind=str(tmp_path / "ten.parquet"))}, DataError, "got 10"),
        (tmp_path / "few", {"split": key}, DataError, "got 19"),
        (tmp_path / "equal", {"split": key}, DataError, "equal rows"),
        (cache_path, {"split": key, "device": "cuda:9"}, SettingError, "cuda:9"),
    ]
    for path, options, error, word in wrong:
        with pytest.raises(error, match=word):
            compare(path, **options)


def test_blocks_hold_whole_groups() -> None:
    groups = np.random.default_rng(0).integers(0, 300, 1000)
    blocks = _assign_blocks(groups)
    assert {len(set(blocks[groups == group])) for group in set(groups)} == {1}
    sizes = np.bincount(blocks)
    assert len(sizes) == 50
    assert sizes.max() - sizes.min() <= 2
    assert _assign_blocks(np.array([7, 7, 9])).tolist() == [0, 0, 1]
