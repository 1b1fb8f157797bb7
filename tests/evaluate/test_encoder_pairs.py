import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from embedcache.arrays import Array, Ints, normalize
from embedcache.cli.main import app
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import read_split
from embedcache.errors import DataError, SettingError, UnfinishedError, UnknownNameError
from embedcache.evaluate.encoder_pairs import METRICS, PairFigures, PairsReport, evaluate_pairs
from embedcache.evaluate.pair_samples import _blocks
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.metrics.alignment import debiased_cka, linear_cka, mutual_knn, shuffled_cka
from embedcache.projectors.saved import split_path
from embedcache.reports.encoder_pairs import encoder_pairs_json, encoder_pairs_table, write_encoder_pairs_page
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.train.settings import ModelSettings, OptimizerSettings, TrainSettings
from embedcache.train.train import train
from tests.pictures import write_pictures
from tests.toy import IMAGE, TEXT

SPLIT = SplitSettings(val_fraction=0.25, image_cosine=0.995, text_cosine=0.95)
IMAGES, TEXTS = ["open_toy/cls", "open_toy/patches"], ["open_toy/mean", "open_toy/tokens"]
OTHER = "tests.toy:open_other"


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty pictures with one to three captions."""
    folder = write_pictures(tmp_path_factory.mktemp("source") / "s", 80, seed=3)
    for number, path in enumerate(sorted(folder.glob("*.txt"))):
        own = path.read_text().strip()
        path.write_text("\n".join([own, f"a {own} picture", f"{own} again"][: 1 + number % 3]))
    path = tmp_path_factory.mktemp("captioned") / "cache"
    settings = ExtractSettings(features=("cls", "patches", "mean", "tokens"), chunk_size=32)
    extract(open_source(folder), path, image_encoders=[IMAGE], text_encoders=[TEXT], settings=settings)
    return path


@pytest.fixture(scope="module")
def report(cache_path: Path) -> PairsReport:
    return evaluate_pairs(cache_path, split=SPLIT, num_draws=200)


def trained_run(cache_path: Path, run_path: Path, split: SplitSettings) -> Path:
    """The closed form alone, as a run."""
    settings = TrainSettings(
        model=ModelSettings(projector="linear", initialization="cca"),
        optimizer=OptimizerSettings(epochs=0),
        split=split,
    )
    train(cache_path, run_path, image=IMAGES[0], text=TEXTS[0], settings=settings)
    return run_path


def of(report: PairsReport, image: str, text: str) -> PairFigures:
    return next(pair for pair in report.pairs if (pair.image, pair.text) == (image, text))


def unit_means(cache: Cache, modality: str, name: str, samples: Ints) -> Array:
    """A sample's row, by the obvious loop."""
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


@pytest.mark.parametrize(("image", "text"), [(IMAGES[0], TEXTS[0]), (IMAGES[1], TEXTS[1])])
def test_figures_are_those_of_the_mean_unit_rows_outside_the_test_part(
    captioned: Path, tmp_path: Path, image: str, text: str
) -> None:
    split = replace(SPLIT, kind="key")
    report = evaluate_pairs(captioned, images=[image], texts=[text], split=split, k=5, num_draws=20)
    cut = read_split(split_path(trained_run(captioned, tmp_path / "run", split)), [Cache(captioned)])
    samples = np.flatnonzero(np.isin(cut.parts, ["train", "val"]))
    assert (report.num_drawn, report.num_compared, report.num_held) == (80, 60, 20)
    x, y = (unit_means(Cache(captioned), *side, samples) for side in (("image", image), ("text", text)))
    pair = report.pairs[0]
    assert pair.linear_cka.value == pytest.approx(linear_cka(x, y), abs=1e-5)
    assert pair.debiased_cka.value == pytest.approx(debiased_cka(x, y), abs=1e-5)
    assert pair.mutual_knn.value == pytest.approx(mutual_knn(x, y, 5), abs=0.01)  # equal captions tie
    assert pair.shuffled_cka == pytest.approx(shuffled_cka(x, y), abs=1e-5)


@pytest.mark.parametrize("kind", ["strict", "key"])
def test_the_probe_is_the_closed_form_that_training_starts_from(captioned: Path, tmp_path: Path, kind: str) -> None:
    split = replace(SPLIT, kind=kind, image_cosine=0.999, text_cosine=0.99)
    run = trained_run(captioned, tmp_path / "run", split)
    expected = evaluate_retrieval(captioned, [run], part="val")
    for given in (split, SplitSettings(kind=str(split_path(run)))):
        report = evaluate_pairs(captioned, images=IMAGES[:1], texts=TEXTS[:1], split=given)
        found = {"i2t": report.pairs[0].i2t, "t2i": report.pairs[0].t2i}
        for way, estimate in found.items():
            assert estimate.value == pytest.approx(expected.recalls[way]["r@10"].value, abs=0.03)  # one may tie
            assert estimate.low == pytest.approx(expected.recalls[way]["r@10"].low, abs=0.03)
            assert report.chance[way] == expected.chance[way]["r@10"]
    assert 0.1 < expected.recalls["i2t"]["r@10"].value < 1


def test_all_pairs_are_compared_best_probe_first(report: PairsReport) -> None:
    assert {(pair.image, pair.text) for pair in report.pairs} == {(image, text) for image in IMAGES for text in TEXTS}
    probes = [pair.probe for pair in report.pairs]
    assert probes == sorted(probes, reverse=True)
    assert probes[0] > probes[-1]
    cls, patches = of(report, IMAGES[0], TEXTS[0]), of(report, IMAGES[1], TEXTS[0])
    assert cls.probe > patches.probe + 0.1  # the mean color does not say where the bar is
    for pair in report.pairs:
        for estimate in (pair.i2t, pair.t2i, pair.mutual_knn, pair.debiased_cka, pair.linear_cka):
            assert estimate.low < estimate.value < estimate.high
        assert pair.debiased_cka.value < pair.linear_cka.value
        assert pair.shuffled_cka < pair.linear_cka.value


def test_pairs_are_in_order_of_their_probe_however_they_were_named(cache_path: Path) -> None:
    key = SplitSettings(kind="key", val_fraction=0.25)
    report = evaluate_pairs(cache_path, images=IMAGES[::-1], texts=TEXTS[:1], split=key, num_draws=20)
    assert [pair.image for pair in report.pairs] == IMAGES


def test_a_draw_is_decided_by_the_seed_and_bounded(cache_path: Path) -> None:
    def drawn(seed: int) -> PairsReport:
        key = SplitSettings(kind="key", val_fraction=0.25)
        return evaluate_pairs(
            cache_path, images=IMAGES[:1], texts=TEXTS[:1], num_samples=100, seed=seed, split=key, num_draws=20
        )

    assert drawn(0).num_drawn == 100
    assert drawn(0).num_compared == 75
    assert drawn(0).pairs == drawn(0).pairs != drawn(1).pairs


def test_what_decided_the_figures_is_recorded(report: PairsReport) -> None:
    assert report.pooling == {
        "open_toy/cls": "all colours",
        "open_toy/patches": "one colour a cell, mean of the tokens",
        "open_toy/mean": "mean of tokens",
        "open_toy/tokens": "letters, mean of the tokens",
    }
    line = report.line()
    assert line.startswith(f"{report.num_compared} samples outside the test part of 300 drawn (seed 0), split strict")
    assert 225 <= report.num_compared == report.num_trained + report.num_held < 235
    assert "split strict by open_toy/cls and open_toy/mean (cosine above 0.995 and 0.95)" in line
    assert "each item scaled to length 1, then the mean over a sample's images and over its captions" in line
    assert "CKA centered; kNN by cosine, k 10" in line
    assert f"95 % intervals over {report.num_groups} groups of near-duplicates" in line
    figures = json.loads(json.dumps(encoder_pairs_json(report)))
    assert figures["pairs"][0]["linear_cka"]["low"] == report.pairs[0].linear_cka.low
    assert (figures["k"], figures["centred"], figures["num_held"]) == (10, True, report.num_held)


def test_rows_end_with_chance(report: PairsReport) -> None:
    columns, rows = encoder_pairs_table(report)
    assert len(rows) == 5
    assert {len(row) for row in rows} == {len(columns)}
    assert rows[0][0] == f"{report.pairs[0].image} × {report.pairs[0].text}"
    assert rows[-1][0] == "chance"
    assert rows[-1][3] == f"{10 / (report.num_compared - 1):.3f}"


def test_page_has_one_heat_map_per_metric(report: PairsReport, tmp_path: Path) -> None:
    write_encoder_pairs_page(tmp_path / "pairs.html", report)
    page = (tmp_path / "pairs.html").read_text()
    assert page.count("<svg") == len(METRICS) == 4
    for pair in report.pairs:
        for metric in METRICS:
            assert f"<!-- {pair.value(metric):.3f} -->" in page  # matplotlib says in a comment what it draws
    assert "one colour a cell, mean of the tokens" in page


def test_an_unfinished_feature_is_left_out_with_a_line_or_refused_by_name(tmp_path: Path) -> None:
    source = open_source(write_pictures(tmp_path / "s", 60))
    extract(source, tmp_path / "c", image_encoders=[IMAGE, OTHER], text_encoders=[TEXT])
    next((tmp_path / "c" / "image" / "open_other" / "chunks").glob("*.parquet")).unlink()
    key = SplitSettings(kind="key", val_fraction=0.25)
    report = evaluate_pairs(tmp_path / "c", split=key, num_draws=20)
    assert [pair.image for pair in report.pairs] == ["open_toy/cls"]
    assert report.skipped == ["left out: feature open_other/cls is not finished: 1 of 1 chunks are missing; "
                              "run the same embedcache extract again to resume it"]  # fmt: skip
    with pytest.raises(UnfinishedError, match="feature open_other/cls is not finished"):
        evaluate_pairs(tmp_path / "c", images=["open_other"], split=key)
    next((tmp_path / "c" / "image" / "open_toy" / "chunks").glob("*.parquet")).unlink()
    with pytest.raises(UnfinishedError, match=r"no image feature of .* is finished; feature open_other/cls"):
        evaluate_pairs(tmp_path / "c", split=key)


def test_a_cache_without_one_modality_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat\na dog\n")
    extract(open_source(tmp_path / "prompts.txt"), tmp_path / "texts", text_encoders=[TEXT])
    with pytest.raises(UnknownNameError, match="no image features; add some: embedcache extract --image-encoder SPEC"):
        evaluate_pairs(tmp_path / "texts")
    extract(open_source(write_pictures(tmp_path / "s", 30)), tmp_path / "images", image_encoders=[IMAGE])
    with pytest.raises(UnknownNameError, match="no text features; add some: embedcache extract --text-encoder SPEC"):
        evaluate_pairs(tmp_path / "images")


def test_mistakes_are_named(cache_path: Path, captioned: Path, tmp_path: Path) -> None:
    key = SplitSettings(kind="key", val_fraction=0.25)
    with pytest.raises(UnknownNameError, match=r"unknown image feature .*; did you mean 'open_toy/cls'"):
        evaluate_pairs(cache_path, images=["open_toy/clz"])
    with pytest.raises(SettingError, match="num samples is 19; at least 20 are needed"):
        evaluate_pairs(cache_path, num_samples=19)
    for k in (0, 60):
        with pytest.raises(SettingError, match=f"k is {k}, and 60 samples are compared; give a k from 1 to 59"):
            evaluate_pairs(captioned, k=k, split=key)
    with pytest.raises(SettingError, match="leaves nothing to hold out of 300 samples"):
        evaluate_pairs(cache_path, split=replace(SPLIT, text_cosine=0.1))
    with pytest.raises(DataError, match="of 20 samples of .* 10 are for training and 5 for validation; at least 20"):
        evaluate_pairs(cache_path, num_samples=20, split=key)
    extract(
        open_source(write_pictures(tmp_path / "few", 19)), tmp_path / "f", image_encoders=[IMAGE], text_encoders=[TEXT]
    )
    with pytest.raises(DataError, match="19 samples of .* have all of the features; at least 20 are needed"):
        evaluate_pairs(tmp_path / "f", split=key)
    extract(
        open_source(write_pictures(tmp_path / "s", 60)),
        tmp_path / "c",
        image_encoders=[f"{IMAGE},scale=0"],
        text_encoders=[TEXT],
    )
    with pytest.raises(DataError, match="image feature open_toy/cls: the rows are all equal"):
        evaluate_pairs(tmp_path / "c", split=key)


def test_whole_groups_share_a_block_and_blocks_are_about_equal() -> None:
    groups = np.random.default_rng(0).integers(0, 300, 1000)
    blocks = _blocks(groups)
    assert {len(set(blocks[groups == group])) for group in set(groups)} == {1}
    sizes = np.bincount(blocks)
    assert len(sizes) == 50
    assert sizes.max() - sizes.min() <= 2
    assert _blocks(np.array([7, 7, 9])).tolist() == [0, 0, 1]


def test_the_command_prints_the_table_and_writes_both_files(cache_path: Path, tmp_path: Path) -> None:
    words = ["evaluate", "pairs", str(cache_path), "--image-feature", IMAGES[0]]
    words += ["--text-feature", TEXTS[0], "--text-feature", TEXTS[1]]
    words += ["--image-cosine", "0.995", "--text-cosine", "0.95", "-k", "5"]
    words += ["--output", str(tmp_path / "p.json"), "--html", str(tmp_path / "p.html")]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert "samples outside the test part of 300 drawn" in result.output
    assert "debiased CKA" in result.output
    figures = json.loads((tmp_path / "p.json").read_text())["pairs"]
    assert [pair["image"] for pair in figures["pairs"]] == IMAGES[:1] * 2
    assert figures["k"] == 5
    assert "<svg" in (tmp_path / "p.html").read_text()
