"""Selecting into a file: what is written, what training takes, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedcache.curate.select.combine import combine_selections, sample_selection
from embedcache.curate.select.select import SelectSettings, select
from embedcache.dataset.selections import read_selection
from embedcache.errors import DataError, FingerprintError, PathError, SettingError, UnknownNameError
from embedcache.evaluate.runs import recipes
from embedcache.extract.extract import extract
from embedcache.projectors.saved import read_config
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.train.settings import train_settings
from embedcache.train.train import train
from tests.curate.select.conftest import FEATURES

TEXT_FEATURE, IMAGE_FEATURE = FEATURES["text"], FEATURES["image"]


def chosen(around: dict[str, Path], out: Path, method: str = "random", **options: Any) -> np.ndarray:
    """Select from the pool, and read the rows again."""
    names = ("share", "feature", "concepts_path", "joins_names", "run_path", "target_path", "within", "modality")
    given = {name: options.pop(name) for name in names if name in options}
    given.setdefault("feature", IMAGE_FEATURE if "concepts_path" not in given else TEXT_FEATURE)
    select(around["cache"], out, method, settings=SelectSettings(**options), **given)
    return read_selection(out, [Cache(around["cache"])])


def test_a_selection_says_how_it_was_made(around: dict[str, Path], tmp_path: Path) -> None:
    rows = chosen(around, tmp_path / "a.parquet", "rare-first", per_concept=5, concepts_path=around["concepts"])
    table = pq.read_table(tmp_path / "a.parquet")
    about = json.loads(table.schema.metadata[b"embedcache"])
    assert len(rows) == 20
    assert (about["method"], about["modality"], about["feature"]) == ("rare-first", "text", TEXT_FEATURE)
    assert about["settings"]["per_concept"] == 5
    assert "concept '" in table["reason"][0].as_py()


def test_a_share_of_the_pool_is_a_budget(around: dict[str, Path], tmp_path: Path) -> None:
    assert len(chosen(around, tmp_path / "a.parquet", share=0.1)) == 30


def test_the_same_command_writes_the_same_bytes(around: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        chosen(around, tmp_path / name, "k-center", budget=9, seed=2)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_selection_is_selected_from_and_trained_on(around: dict[str, Path], tmp_path: Path) -> None:
    fitting = tmp_path / "fit.parquet"
    first = chosen(around, fitting, "clip-score", budget=150, run_path=around["run"], feature=None)
    for seed in (0, 1):
        second = chosen(around, tmp_path / f"some-{seed}.parquet", budget=90, within=fitting, seed=seed)
        assert set(second) < set(first)
    pattern = f"{tmp_path}/some-{{seed}}.parquet"
    recipe = {"projector": "linear", "epochs": 0, "split": "key", "selection": pattern}
    runs = [tmp_path / f"run-{seed}" for seed in (0, 1)]
    for seed, run in enumerate(runs):
        settings = train_settings({**recipe, "seed": seed})
        train(around["cache"], run, image=IMAGE_FEATURE, text=TEXT_FEATURE, settings=settings)
    assert len({read_config(run).given["selection"] for run in runs}) == 2
    assert list(recipes(runs).values()) == [runs]  # seeds of one recipe, each with a selection of its own


def test_selections_are_combined(around: dict[str, Path], tmp_path: Path) -> None:
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    one, other = set(chosen(around, a, budget=100, seed=1)), set(chosen(around, b, budget=100, seed=2))
    cache = Cache(around["cache"])
    assert combine_selections(around["cache"], tmp_path / "and.parquet", a, "and", b) == len(one & other)
    assert set(read_selection(tmp_path / "and.parquet", [cache])) == one & other
    assert pq.read_table(tmp_path / "and.parquet")["reason"][0].as_py().count("drawn at random") == 2
    combine_selections(around["cache"], tmp_path / "minus.parquet", a, "minus", b)
    assert set(read_selection(tmp_path / "minus.parquet", [cache])) == one - other
    sample_selection(around["cache"], tmp_path / "some.parquet", tmp_path / "minus.parquet", 10, seed=3)
    assert len(found := set(read_selection(tmp_path / "some.parquet", [cache]))) == 10
    assert found < one - other


def test_a_list_of_keys_is_a_selection_too(around: dict[str, Path], tmp_path: Path) -> None:
    keys = Cache(around["cache"]).samples["key"].to_pylist()[:5]
    (tmp_path / "keys.txt").write_text("\n".join(keys))
    chosen(around, tmp_path / "a.parquet", budget=300)
    combine_selections(around["cache"], tmp_path / "b.parquet", tmp_path / "a.parquet", "minus", tmp_path / "keys.txt")
    assert read_selection(tmp_path / "b.parquet", [Cache(around["cache"])]).tolist() == list(range(5, 300))


def test_what_leaves_nothing_is_refused(around: dict[str, Path], tmp_path: Path) -> None:
    chosen(around, tmp_path / "a.parquet", budget=4)
    with pytest.raises(DataError, match=r"is empty: they select 4 and 4 samples of .*, 4 of them both"):
        combine_selections(
            around["cache"], tmp_path / "b.parquet", tmp_path / "a.parquet", "minus", tmp_path / "a.parquet"
        )
    with pytest.raises(SettingError, match="cannot draw 5 of the 4 samples"):
        sample_selection(around["cache"], tmp_path / "b.parquet", tmp_path / "a.parquet", 5)
    assert not (tmp_path / "b.parquet").exists()


MISTAKES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (
        "rare-frist",
        {"budget": 3},
        UnknownNameError,
        "unknown method of selection 'rare-frist'; did you mean 'rare-first'",
    ),
    ("random", {}, SettingError, "--method random needs one of --budget, and got none"),
    ("random", {"budget": 301}, SettingError, "the budget is 301, and the pool has 300 samples"),
    ("random", {"budget": 0}, SettingError, "budget is 0; it must be at least 1"),
    ("random", {"share": 1.5}, SettingError, "share of 1.5; it must be above 0 and at most 1"),
    ("random", {"share": 0.5, "budget": 3}, SettingError, "as a number and as a share"),
    ("rare-first", {"budget": 3}, SettingError, "--method rare-first needs --concepts CACHE, made by"),
    ("clip-score", {"budget": 3}, SettingError, "--method clip-score needs --run RUN"),
    ("image-based", {"budget": 3}, SettingError, "--method image-based needs --target CACHE"),
    ("clip-score", {"threshold": 1.5}, SettingError, "threshold is 1.5; a cosine lies between -1 and 1"),
    (
        "hierarchical",
        {"budget": 3, "clusters": (5, 9)},
        SettingError,
        "each level must have fewer than the one before it",
    ),
    ("hierarchical", {"budget": 3, "clusters": (999,)}, SettingError, "999 clusters of 300 vectors"),
    ("k-center", {"budget": 9, "drawn": 5}, SettingError, "--drawn 5 is fewer than the budget of 9"),
]


@pytest.mark.parametrize(("method", "options", "error", "words"), MISTAKES)
def test_mistakes_are_told(
    around: dict[str, Path], tmp_path: Path, method: str, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        chosen(around, tmp_path / "a.parquet", method, **options)
    assert not (tmp_path / "a.parquet").exists()


def test_inputs_that_a_method_does_not_look_at_are_refused(around: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--method random does not look at --concepts"):
        chosen(around, tmp_path / "a.parquet", budget=3, concepts_path=around["concepts"])
    with pytest.raises(SettingError, match="leave --modality out"):
        chosen(around, tmp_path / "a.parquet", "clip-score", budget=3, run_path=around["run"], modality="text")


def test_a_threshold_that_nothing_passes_is_told(around: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 300 cosines reaches 1.0; they lie between"):
        chosen(around, tmp_path / "a.parquet", "clip-score", threshold=1.0, run_path=around["run"], feature=None)


def test_a_selection_ends_in_parquet(around: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PathError, match=r"end it in .parquet"):
        chosen(around, tmp_path / "a.txt", budget=3)


def test_concepts_are_texts_of_the_same_encoder(around: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="feature open_toy/cls cannot be compared with prompts; project both with"):
        chosen(
            around,
            tmp_path / "a.parquet",
            "rare-first",
            budget=3,
            concepts_path=around["concepts"],
            modality="image",
            feature=IMAGE_FEATURE,
        )
    (tmp_path / "names.txt").write_text("red\nblue\nred\n")
    extract(
        open_source(f"prompts:{tmp_path}/names.txt"), tmp_path / "louder", text_encoders=["tests.toy:open_toy,scale=2"]
    )
    with pytest.raises(FingerprintError, match="extract the concepts with the pool's encoder"):
        chosen(around, tmp_path / "a.parquet", "rare-first", budget=3, concepts_path=tmp_path / "louder")
    with pytest.raises(UnknownNameError, match="column of samples of .* 'label'"):
        chosen(around, tmp_path / "a.parquet", "rare-first", budget=3, concepts_path=around["target"])


def test_concepts_of_one_name_are_refused_or_one(around: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("red\nblue\nred\n")
    extract(open_source(f"prompts:{tmp_path}/names.txt"), tmp_path / "names", text_encoders=["tests.toy:open_toy"])
    path = tmp_path / "a.parquet"
    with pytest.raises(DataError, match="1 of 2 concepts of .* stand twice, counted from 0: 'red'"):
        chosen(around, path, "rare-first", per_concept=4, concepts_path=tmp_path / "names")
    rows = chosen(around, path, "rare-first", per_concept=4, concepts_path=tmp_path / "names", joins_names=True)
    assert len(rows) == 8


def test_a_concept_without_a_prompt_is_told(around: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"red": ["red"], "nothing": ["x"]}))
    extract(open_source(f"prompts:{tmp_path}/c.json"), tmp_path / "c", text_encoders=["tests.toy:open_toy"])
    assert len(chosen(around, tmp_path / "a.parquet", "rare-first", per_concept=4, concepts_path=tmp_path / "c")) == 8


def test_images_are_compared_with_concepts_through_a_run(around: dict[str, Path], tmp_path: Path) -> None:
    rows = chosen(
        around,
        tmp_path / "a.parquet",
        "top-score",
        budget=20,
        concepts_path=around["concepts"],
        run_path=around["run"],
        modality="image",
        feature=None,
    )
    assert len(rows) == 20
