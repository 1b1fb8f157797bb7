from dataclasses import replace
from pathlib import Path

import pytest

from embedcache.errors import DiskFullError
from embedcache.extract.extract import Plan, PlannedFeature, plan
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from tests.extract.cases import FEATURES, run, tree
from tests.toy import IMAGE, TEXT

SETTINGS = ExtractSettings(features=FEATURES, chunk_size=64)


def planned_for(image_folder: Path, cache: Path, settings: ExtractSettings = SETTINGS) -> Plan:
    return plan(open_source(image_folder), cache, image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)


@pytest.mark.slow
def test_planned_bytes_match_the_stored_features(image_folder: Path, tmp_path: Path) -> None:
    planned = planned_for(image_folder, tmp_path / "c")
    assert [feature.name for feature in planned.features] == ["open_toy/cls", "open_toy/patches", "open_toy/tokens"]
    assert [feature.num_items for feature in planned.features] == [300, 300, 300]
    run(image_folder, tmp_path / "c", features=FEATURES)
    for feature in planned.features:
        folder = tmp_path / "c" / feature.modality / feature.name
        stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "zarr.json")
        assert feature.num_items * feature.item_bytes == pytest.approx(stored, rel=0.1)  # the last chunk is padded


def test_plan_measures_a_rate_and_stores_nothing(image_folder: Path, tmp_path: Path) -> None:
    planned = planned_for(image_folder, tmp_path / "c")
    assert not [name for name in tree(tmp_path / "c") if "chunks" in name or "/c/" in name]
    assert planned.rates["image"] > 1
    assert planned.hours("image") == pytest.approx(300 / planned.rates["image"] / 3600)


@pytest.mark.slow
def test_plan_skips_existing_chunks(image_folder: Path, tmp_path: Path) -> None:
    run(image_folder, tmp_path / "c", features=("cls",), chunk_size=64, shard="0/5")
    planned = planned_for(image_folder, tmp_path / "c")
    assert {feature.name: feature.num_items for feature in planned.features}["open_toy/cls"] == 236
    run(image_folder, tmp_path / "c", features=FEATURES)
    assert planned_for(image_folder, tmp_path / "c").features == []


def test_plan_beyond_disk_space_raises() -> None:
    feature = PlannedFeature(name="e/patches", modality="image", num_items=20_000_000, item_bytes=530_000)
    planned = Plan(
        cache=Path("c"),
        features=[feature],
        rates={"image": 1000.0},
        num_processes=2,
        free_bytes=10**12,
        chunk_size=2048,
    )
    assert planned.hours("image") == pytest.approx(2.78, abs=0.01)
    assert planned.memory_bytes == 2 * 2048 * 530_000
    with pytest.raises(DiskFullError, match=r"expected 10,600\.48 GB of free disk space, got 1,000\.00 GB"):
        planned.check_space()
    replace(planned, free_bytes=None).check_space()
