"""Scores of heads and texts: what is computed, what a table holds, and what selection makes of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from embedcache.arrays import Floats, normalize
from embedcache.curate.score import best_per_sample, read_head, score
from embedcache.curate.select.select import select
from embedcache.curate.settings import ScoreSettings, SelectSettings
from embedcache.dataset.selections import read_scores, read_selection
from embedcache.errors import CorruptError, DataError, EmbedcacheError, PathError, SettingError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.runs import Run
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.images import write_images
from tests.toy import IMAGE

FEATURE, WIDTH = "open_toy/cls", 48


def scored(cache: Path, out: Path, **options: Any) -> Floats:
    """Score the samples and read the table again."""
    score(cache, out, ScoreSettings(**options))
    return read_scores(out, Cache(cache)).values


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A head that is the brightness of the first cells, with a bias."""
    path = tmp_path / "head.npy"
    np.save(path, np.append(np.linspace(1, 0, WIDTH), 0.25))
    return path


def test_linear_head(cache_path: Path, tmp_path: Path, weights: Path) -> None:
    found = scored(cache_path, tmp_path / "a.parquet", weights=weights, feature=FEATURE)
    stored = Cache(cache_path).feature("image", FEATURE).load()
    expected = normalize(stored).astype(np.float64) @ np.linspace(1, 0, WIDTH) + 0.25
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    raw = scored(cache_path, tmp_path / "b.parquet", weights=weights, feature=FEATURE, normalize=False)
    np.testing.assert_allclose(raw, stored.astype(np.float64) @ np.linspace(1, 0, WIDTH) + 0.25, rtol=1e-6)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["row", "key", "score"]
    record = json.loads(table.schema.metadata[b"embedcache"])
    assert (record["method"], record["feature"], record["num_scored"]) == ("score", FEATURE, 300)
    assert record["quantiles"]["1.0"] == pytest.approx(float(found.max()))


def test_texts_through_a_run(around: dict[str, Path], tmp_path: Path) -> None:
    """Check that images of red bars score higher by these words, and that a negative text is subtracted."""
    options = {"run": around["run"], "prompts": ("red bar left on white", "red bar right on white")}
    found = scored(around["cache"], tmp_path / "a.parquet", **options)
    captions = Cache(around["cache"]).items("text")["text"].to_pylist()
    is_red = np.array([caption.startswith("red") and caption.endswith("white") for caption in captions])
    assert is_red.sum() > 3
    assert found[is_red].min() > np.median(found)
    less = scored(around["cache"], tmp_path / "b.parquet", **options, negative=("blue bar top on black",))
    only = scored(around["cache"], tmp_path / "c.parquet", run=around["run"], prompts=("blue bar top on black",))
    np.testing.assert_allclose(less, found - only, atol=1e-6)
    record = json.loads(pq.read_table(tmp_path / "b.parquet").schema.metadata[b"embedcache"])
    assert {name: record[name] for name in ("prompts", "negative", "normalized", "run", "run_weights")} == {
        "prompts": list(options["prompts"]),
        "negative": ["blue bar top on black"],
        "normalized": True,
        "run": str(around["run"]),
        "run_weights": Run.open(around["run"]).info.weights,
    }


def test_captions_are_scored_by_their_own_encoder(cache_path: Path, tmp_path: Path) -> None:
    captions = Cache(cache_path).items("text")["text"].to_pylist()
    options = {"modality": "text", "feature": "open_toy/mean", "prompts": (captions[7],)}
    found = scored(cache_path, tmp_path / "a.parquet", **options)
    assert found[7] == pytest.approx(1, abs=1e-5)
    words = {" ".join(sorted(captions[row].split())) for row in np.flatnonzero(found > 1 - 1e-5)}
    assert words == {" ".join(sorted(captions[7].split()))}  # the toy encoder does not see their order


def test_best_item_of_a_sample() -> None:
    samples, values = np.array([0, 0, 2, 2, 2]), np.array([1, 2, 5, 7, 7], np.float32)
    highest, best = best_per_sample(4, samples, values)
    assert best.tolist() == [1, -1, 3, -1]
    np.testing.assert_array_equal(highest, [values[1], np.nan, values[3], np.nan])


def test_samples_without_an_item_have_no_score(tmp_path: Path, weights: Path) -> None:
    source = write_images(tmp_path / "source", 3)
    (source / "00001.png").write_bytes(b"not an image")
    extract(open_source(source), tmp_path / "cache", image_encoder=[IMAGE])
    report = score(tmp_path / "cache", tmp_path / "a.parquet", weights=weights)
    assert report.rows_S.tolist() == [0, -1, 2]
    assert np.isnan(report.scores_S).tolist() == [False, True, False]
    assert (report.to_json()["num_samples"], report.to_json()["num_scored"]) == (3, 2)
    assert (report.to_json()["run"], report.to_json()["run_weights"]) == (None, None)


def layers(*shapes: tuple[int, int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, (outputs, inputs) in enumerate(shapes):
        tensors[f"layers.{2 * number}.weight"] = torch.randn(outputs, inputs, generator=generator)
        tensors[f"layers.{2 * number}.bias"] = torch.randn(outputs, generator=generator)
    return tensors


def test_heads_of_torch(tmp_path: Path) -> None:
    """Check one layer, and layers as LAION's aesthetic predictor has them, against `torch.nn.Linear`."""
    vectors = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    linear = torch.nn.Linear(6, 1)
    torch.save(linear.state_dict(), tmp_path / "one.pth")
    head = read_head(tmp_path / "one.pth", 6)
    np.testing.assert_allclose(
        vectors.numpy() @ head.weights_P + head.bias, linear(vectors)[:, 0].detach().numpy(), atol=1e-5
    )

    torch.save({"weight": linear.weight, "bias": linear.bias}, tmp_path / "parameters.pth")  # which require gradients
    assert read_head(tmp_path / "parameters.pth", 6).weights_P.tolist() == head.weights_P.tolist()

    tensors = layers(*[(4, 6)] + [(4, 4)] * 10 + [(1, 4)])  # layers.10 comes after layers.2
    save_file(tensors, tmp_path / "many.safetensors")
    with pytest.raises(DataError, match="fold-layers"):
        read_head(tmp_path / "many.safetensors", 6)
    head = read_head(tmp_path / "many.safetensors", 6, fold_layers=True)
    values = vectors
    for number in range(12):
        values = torch.nn.functional.linear(
            values, tensors[f"layers.{2 * number}.weight"], tensors[f"layers.{2 * number}.bias"]
        )
    found = vectors.numpy() @ head.weights_P + head.bias
    np.testing.assert_allclose(found, values[:, 0].numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (7, 1)])
def test_heads_of_numpy(shape: tuple[int, ...], tmp_path: Path) -> None:
    np.save(tmp_path / "head.npy", np.arange(7).reshape(shape))
    head = read_head(tmp_path / "head.npy", 6)
    assert (head.weights_P.tolist(), head.bias) == ([0, 1, 2, 3, 4, 5], 6)
    head = read_head(tmp_path / "head.npy", 7)
    assert (head.weights_P.tolist(), head.bias) == ([0, 1, 2, 3, 4, 5, 6], 0)


class Opened:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("opened"),)


def test_wrong_heads_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"a": torch.ones(2)}, "named.safetensors")
    save_file({"weight": torch.ones(2, 6)}, "two.safetensors")
    save_file({"0.weight": torch.ones(3, 6), "1.weight": torch.ones(1, 4)}, "apart.safetensors")
    save_file({"weight": torch.ones(1, 6), "bias": torch.ones(2)}, "biases.safetensors")
    save_file({"weight": torch.full((1, 6), torch.nan)}, "nan.safetensors")
    Path("text.npy").write_text("1, 2, 3")
    np.save("wide.npy", np.ones(9))
    np.save("complex.npy", np.full(6, 1j))
    np.save("square.npy", np.ones((2, 3)))
    torch.save({"weight": Opened()}, "code.pth")
    for name, error, word in [
        ("none.npy", PathError, "none"),
        ("text.npy", CorruptError, "numbers"),
        ("complex.npy", CorruptError, "complex128"),
        ("wide.npy", DataError, r"\(1, 9\)"),
        ("square.npy", DataError, r"\(2, 3\)"),
        ("named.safetensors", DataError, r"\(2,\)"),
        ("two.safetensors", DataError, r"\(2, 6\)"),
        ("apart.safetensors", DataError, r"\(1, 4\)"),
        ("biases.safetensors", DataError, "bias"),
        ("nan.safetensors", DataError, "NaN"),
        ("code.pth", CorruptError, "tensors"),
    ]:
        with pytest.raises(error, match=word):
            read_head(Path(name), 6, fold_layers=True)
    assert not Path("opened").exists()
    with pytest.raises(DataError, match="expected one layer, got 2"):
        read_head(Path("apart.safetensors"), 6)


def test_wrong_settings_raise(cache_path: Path, run_path: Path, tmp_path: Path, weights: Path) -> None:
    for options, error, word in (
        ({"prompts": ("a",), "feature": FEATURE}, SettingError, "run"),
        ({"weights": weights, "run": run_path}, DataError, "16 weights"),
    ):
        with pytest.raises(error, match=word):
            score(cache_path, tmp_path / "a.parquet", ScoreSettings(**options))
    assert not (tmp_path / "a.parquet").exists()


# selection by a score


def chosen(cache: Path, out: Path, scores: Path, bounds: str = "", **options: Any) -> list[int]:
    select(cache, out, f"score:{bounds}" if bounds else "score", SelectSettings(scores=scores, **options))
    return read_selection(out, [Cache(cache)]).tolist()


def test_bounds_and_budget(cache_path: Path, tmp_path: Path, weights: Path) -> None:
    scores, out = tmp_path / "scores.parquet", tmp_path / "out.parquet"
    found = scored(cache_path, scores, weights=weights, feature=FEATURE)
    low, high = np.quantile(found, [0.4, 0.8]).tolist()
    assert chosen(cache_path, out, scores, f"at_least={low!r}") == np.flatnonzero(found >= np.float32(low)).tolist()
    assert chosen(cache_path, out, scores, f"at_most={low!r}") == np.flatnonzero(found <= np.float32(low)).tolist()
    best = sorted(np.argsort(-found, kind="stable")[:30].tolist())
    assert chosen(cache_path, out, scores, budget=0.1) == best
    between = chosen(cache_path, out, scores, f"at_most={high!r}", budget=5)
    assert found[between].min() >= np.sort(found[found <= np.float32(high)])[-5]
    table = pq.read_table(out)
    assert table["score"].to_pylist() == found[between].tolist()
    record = json.loads(table.schema.metadata[b"embedcache"])
    assert (record["settings"]["scores"], record["feature"]) == (str(scores), None)
    assert record["parameters"] == {"at_least": None, "at_most": high}
    (tmp_path / "some.txt").write_text("\n".join(Cache(cache_path).column("key").to_pylist()[:50]))
    some = chosen(cache_path, out, scores, budget=50, selection=tmp_path / "some.txt")
    assert some == list(range(50))


def test_scores_with_more_digits_than_float32_has(cache_path: Path, tmp_path: Path) -> None:
    keys = Cache(cache_path).column("key").to_pylist()[:3]
    table = {"key": keys, "time": [1_700_000_000, 1_700_000_001, 1_700_000_002], "loss": [1e300, 1 + 2**-40, 1.0]}
    pq.write_table(pa.table(table), tmp_path / "theirs.parquet")
    scores, out = tmp_path / "theirs.parquet", tmp_path / "out.parquet"
    assert chosen(cache_path, out, scores, "at_least=1700000001", score="time") == [1, 2]
    assert chosen(cache_path, out, scores, score="time", budget=1) == [2]
    assert chosen(cache_path, out, scores, f"at_least={1 + 2**-41!r}", score="loss") == [0, 1]


def test_wrong_selections_raise(cache_path: Path, tmp_path: Path, weights: Path) -> None:
    scores, out = tmp_path / "scores.parquet", tmp_path / "out.parquet"
    low = float(scored(cache_path, scores, weights=weights, feature=FEATURE).min())
    wrong: list[tuple[str, dict[str, Any], type[EmbedcacheError], str]] = [
        ("score", {"scores": scores}, SettingError, "budget"),
        ("score", {"budget": 3}, SettingError, "scores"),
        ("score", {"scores": scores, "budget": 3, "feature": FEATURE}, SettingError, "feature"),
        ("score", {"scores": scores, "budget": 3, "modality": "text"}, SettingError, "text"),
        ("score:at_least=99", {"scores": scores}, DataError, "0 of 300"),
        (f"score:at_most={low!r}", {"scores": scores, "budget": 2}, DataError, "1 of 300"),
        ("random", {"scores": scores, "budget": 3, "feature": FEATURE}, SettingError, "scores"),
        ("random:at_most=1", {"budget": 3}, UnknownNameError, "at_most"),
    ]
    for method, options, error, word in wrong:
        with pytest.raises(error, match=word):
            select(cache_path, out, method, SelectSettings(**options))
    assert not out.exists()
    assert len(chosen(cache_path, out, scores, f"at_most={low!r}", budget=1)) == 1
