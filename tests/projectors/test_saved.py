"""Runs of aligned pairs on disk: what is written is loaded, damage is named, and items are projected block by block."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.arrays import Inputs, normalize
from embedcache.errors import ArtifactError, CorruptError, DataError, FingerprintError, PathError
from embedcache.projectors import saved
from embedcache.projectors.saved import (
    PairConfig,
    TowerInput,
    build,
    check_feature,
    is_pair,
    load_pair,
    project,
    read_config,
    run_selection_path,
    save_pair,
)
from embedcache.provenance import DIGEST, read_json, write_record
from embedcache.settings import replace_fields

IMAGE = TowerInput(feature="a/cls", spec="a:m", fingerprint={"family": "a", "weights": "w"}, width=6)
TEXT = TowerInput(feature="b/mean", spec="b:m", fingerprint={"family": "b"}, width=5)


def config_of(first: str = "image", second: str = "text", projector: str = "linear") -> PairConfig:
    return PairConfig(
        projector=projector,
        shared_width=4,
        sides={first: IMAGE, second: TEXT},
        index_digest="d",
        training={"seed": 3},
        file_digests={"split": "s"},
    )


def write(folder: Path, config: PairConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    pair = build(config)
    folder.mkdir()
    (folder / "split.parquet").write_bytes(b"split")
    save_pair(folder, pair, config)
    return pair


@pytest.mark.parametrize("sides", [("image", "text"), ("audio", "text"), ("image", "audio")])
def test_what_is_saved_is_loaded(tmp_path: Path, sides: tuple[str, str]) -> None:
    config = config_of(*sides)
    pair = write(tmp_path / "run", config)
    values = json.loads((tmp_path / "run/config.json").read_text())
    assert (values["format"], values["kind"]) == (1, "pair")
    assert (values["index_digest"], values["file_digests"]) == ("d", {"split": "s"})
    assert is_pair(values)
    loaded, found = load_pair(tmp_path / "run")
    assert replace_fields(found, split_digest="", weights_digest="") == config
    assert len(found.split_digest) == len(found.weights_digest) == 64
    assert found.modalities == sides
    assert not loaded.training
    for name, value in pair.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert found.tower_input(sides[1]) == TEXT
    with pytest.raises(DataError, match="video"):
        found.tower_input("video")


def test_unfinished_damaged_and_other_runs_raise(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="is not a finished run"):
        read_config(tmp_path)
    run = tmp_path / "run"
    write(run, config_of())
    weights, config = run / "model.safetensors", run / "config.json"
    data, text = weights.read_bytes(), config.read_text()
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), None):
        weights.write_bytes(damaged) if damaged else weights.unlink()
        with pytest.raises(CorruptError, match="model.safetensors"):
            load_pair(run)
    config.write_text(text.replace('"shared_width": 4', '"shared_width": 5'))
    with pytest.raises(CorruptError, match="changed"):
        read_config(run)
    write_record(config, {"kind": "points", "format": 1})
    with pytest.raises(DataError, match="points"):
        read_config(run)
    write_record(config, {"kind": "pair", "format": 1, "sides": {}})
    with pytest.raises(CorruptError):
        read_config(run)
    write_record(config, {"kind": "pair", "format": 2})
    with pytest.raises(ArtifactError, match="format 2"):
        read_config(run)


@pytest.mark.parametrize("projector", ["linear", "glu"])
def test_huge_width_is_refused_before_memory_is_allocated(tmp_path: Path, projector: str) -> None:
    write(tmp_path / "run", config_of(projector=projector))
    config, widest = tmp_path / "run/config.json", 2**31 - 1
    values = {name: value for name, value in read_json(config).items() if name != DIGEST}
    sides = values["sides"]
    for edited in ({"shared_width": widest}, {"sides": {**sides, "image": {**sides["image"], "width": widest}}}):
        write_record(config, {**values, **edited})
        with pytest.raises(CorruptError, match=str(widest)):
            load_pair(tmp_path / "run")


def test_paths_of_selections(tmp_path: Path) -> None:
    assert run_selection_path(tmp_path, None) is None
    assert run_selection_path(tmp_path, "x/y.parquet") == tmp_path / "selection.parquet"
    assert run_selection_path(tmp_path, "x/keys") == tmp_path / "selection.txt"


def test_feature_of_another_encoder_raises() -> None:
    check_feature(config_of(), "image", "c/cls", dict(IMAGE.fingerprint))
    with pytest.raises(FingerprintError, match="weights"):
        check_feature(config_of(), "image", "c/cls", {"family": "a", "weights": "v"})


@pytest.mark.slow
@settings(max_examples=25)
@given(st.integers(0, 9), st.integers(1, 8), st.sampled_from(["vectors", "fixed", "varying"]), st.integers(0, 4))
def test_blocks_do_not_change_what_is_projected(count: int, block: int, kind: str, width: int) -> None:
    """Check any block size against one item after another; tokens make blocks smaller."""
    torch.manual_seed(0)
    tower = build(config_of(projector="token+linear" if kind != "vectors" else "linear")).tower("image").eval()
    rng = np.random.default_rng(count)
    values = rng.standard_normal((count, 6) if kind == "vectors" else (count, 3, 6)).astype(np.float16)
    values.setflags(write=False)  # as chunks are mapped
    lengths = rng.integers(1, 4, count) if kind == "varying" else None
    sizes: list[int] = []
    hook = tower.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved, "_BLOCK", block)
        found = project(tower, Inputs(values, lengths), width=width or None)
    hook.remove()
    rows_per_block = block if kind == "vectors" else max(1, block // 3)
    assert sizes == [min(rows_per_block, count - start) for start in range(0, count, rows_per_block)]
    assert found.shape == (count, width or 4)
    assert found.dtype == np.float32
    for row in range(count):
        item = torch.from_numpy(values[row : row + 1].astype(np.float32))
        length = None if lengths is None else torch.from_numpy(lengths[row : row + 1])
        expected = tower(item, length).detach().numpy()[:, : width or None]
        np.testing.assert_allclose(found[row], normalize(expected)[0], atol=1e-4)


def test_config_is_read_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "run", config_of())
    monkeypatch.setitem(sys.modules, "torch", None)
    config = runpy.run_path(str(saved.__file__))["read_config"](tmp_path / "run")
    assert (config.shared_width, config.modalities) == (4, ("image", "text"))


def test_values_that_are_not_finite_raise() -> None:
    tower = build(config_of()).tower("image").eval()
    with pytest.raises(DataError, match="the projected feature"):
        project(tower, Inputs(np.full((2, 6), np.nan, np.float32)))
