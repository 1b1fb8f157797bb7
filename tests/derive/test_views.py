"""Outputs of a run on views of its features: a network of frames on noisy recordings, and an aligned pair on flips."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from embedcache.arrays import Floats
from embedcache.dataset.inputs import open_input
from embedcache.derive.derive import derive_from_run
from embedcache.derive.rules import Block
from embedcache.encoders.base import ItemShape
from embedcache.errors import FingerprintError, SettingError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.extract.repair import verify_cache
from embedcache.extract.settings import ExtractSettings, VerifySettings
from embedcache.provenance import DIGEST, add_digest, read_json, write_json
from embedcache.runs import Run, RunInfo
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.layout import Axis
from embedcache.store.verify import verify
from embedcache.train.data import describe_input
from pipelines.avsr.noise import VIEW
from tests.extract.cases import tree
from tests.media_files import encode_video, moving_square, tone, wav
from tests.media_toy import MEDIA
from tests.sources.files import write, write_tar

AUDIO, VIDEO = "open_media/frames", "open_media/frames"
STACKS = {"audio": 2, "video": 1}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a cache of three utterances, the first with two videos, and two runs. Not to be changed."""
    work = tmp_path_factory.mktemp("views")
    members: list[tuple[str, bytes | str]] = [("0.mkv", encode_video(moving_square(25)[:, ::-1], kind="mkv"))]
    for number in range(3):
        members.append((f"{number}.mp4", encode_video(moving_square(25 + number))))
        members.append((f"{number}.wav", wav(tone(1 + number / 10, 400 + 100 * number))))
    source = open_source(write_tar(work / "clips.tar", members))
    noise = (0.2 * np.random.default_rng(0).standard_normal(20_000)).astype(np.float32)
    write(work, {"babble.wav": wav(noise)})
    views = (*(f"{VIEW}:{level},tape={work}/babble.wav" for level in (5, -5)), "tests.extract.test_own_views:backwards")
    settings = ExtractSettings(features=("frames", "mean"), views=views, chunk_size=2)
    extract(source, work / "cache", encoder={"audio": [MEDIA], "video": [MEDIA]}, settings=settings)
    write_run(work / "cache", work / "both", {"audio": AUDIO, "video": VIDEO})
    write_run(work / "cache", work / "noisy", {"audio": "open_media@babble5dB/frames"})
    return work


@pytest.fixture
def cache(work: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(work / "cache", tmp_path / "c"))


def write_run(cache: Path, run: Path, features: Mapping[str, str], module: nn.Module | None = None) -> None:
    """Write a run of an untrained network on features of a cache."""
    torch.manual_seed(0)
    inputs = {modality: describe_input(open_input(Cache(cache), modality, name)) for modality, name in features.items()}
    arguments = {"widths": {name: item.width for name, item in inputs.items()}} if module is None else {}
    module = module or States(**arguments)
    kind = f"tests.derive.test_views:{type(module).__name__}"
    Run.create(run, RunInfo(kind=kind, arguments=arguments, inputs=inputs)).finish(module, {})


class States(nn.Module):
    """A network with an output of each side: every frame of a video, or every two frames of sound, as four numbers."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(STACKS[name] * width, 4) for name, width in widths.items()})

    def output_shapes(self, shapes: Sequence[ItemShape]) -> Mapping[str, ItemShape]:
        return {f"{name}-states": (-1, 4) for name in self.layers}

    def output_sides(self, name: str) -> Sequence[str]:
        return [name.removesuffix("-states")]

    def output_axis(self, name: str, axes: Sequence[Axis]) -> Axis:
        stack, rate_hz = STACKS[name.removesuffix("-states")], axes[0].rate_hz or 0.0
        return Axis(kind="time", rate_hz=rate_hz / stack, start_s=(axes[0].start_s or 0) + (stack - 1) / 2 / rate_hz)

    def compute_outputs(self, inputs: Sequence[Block], names: Sequence[str]) -> Mapping[str, Any]:
        (name,) = names
        stream = name.removesuffix("-states")
        stack = STACKS[stream]
        stacked = [item[: len(item) // stack * stack].reshape(len(item) // stack, -1) for item in inputs[0].items()]
        return {name: [self.layers[stream](torch.from_numpy(item.astype(np.float32))).numpy() for item in stacked]}


def states(work: Path, run: str, cache: Path, feature: str, row: int) -> Floats:
    """Encode the stored sound of one item with the module itself."""
    module = Run.open(work / run).module
    (item,) = Cache(cache).feature("audio", feature).gather_tokens(np.array([row]))
    with torch.inference_mode():
        encoded: Floats = module.compute_outputs([Block(item, np.array([len(item)]))], ["audio-states"])[
            "audio-states"
        ][0]  # type: ignore[operator]
    return encoded


@pytest.mark.slow
def test_each_view_has_a_folder(work: Path, cache: Path) -> None:
    views = ("plain", "babble5dB", "babble-5dB")
    reports = derive_from_run(cache, work / "both", "audio-states", name="ao", view=views, dtype="float32")
    assert [report.line() for report in reports] == [
        f"{name} (audio-states): derived 3 recordings, reused 0, failed 0"
        for name in ("ao", "ao@babble5dB", "ao@babble-5dB")
    ]
    opened = Cache(cache)
    for suffix in ("", "@babble5dB", "@babble-5dB"):
        feature = opened.feature("audio", f"ao{suffix}/audio-states")
        assert feature.axis == Axis(kind="time", rate_hz=25.0, start_s=0.01)
        for row, found in enumerate(feature.gather_tokens(np.arange(3))):
            expected = states(work, "both", cache, f"open_media{suffix}/frames", row)
            np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not verify(opened)
    again = derive_from_run(cache, work / "both", "audio-states", name="ao", view=views, dtype="float32")
    assert [report.computed for report in again] == [0, 0, 0]


def test_output_of_one_side_has_every_item_of_it(work: Path, cache: Path) -> None:
    shutil.rmtree(cache / "audio")  # the sound is not read
    (report,) = derive_from_run(cache, work / "both", "video-states")
    assert Cache(cache).info.num_items["video"] == 4
    assert (report.modality, report.computed) == ("video", 4)
    feature = Cache(cache).feature("video", "both-video-states/video-states")
    assert feature.axis == Axis(kind="time", rate_hz=25.0, start_s=0.0)
    assert [len(tokens) for tokens in feature.gather_tokens(np.arange(4))] == [25, 25, 26, 27]


class Length(nn.Module):
    """A module whose only output reads both sides."""

    def output_shapes(self, shapes: Sequence[ItemShape]) -> Mapping[str, ItemShape]:
        return {"length": (len(shapes),), "of-video": (1,)}

    def output_sides(self, name: str) -> Sequence[str]:
        return {"length": ["video", "audio"], "of-video": ["video"]}.get(name, [])

    def compute_outputs(self, inputs: Sequence[Block], names: Sequence[str]) -> Mapping[str, Any]:
        lengths = [[len(item) for item in block.items()] for block in inputs]
        return {name: np.array(lengths, np.float32).T for name in names}


def test_first_side_that_is_read_decides_the_items(work: Path, cache: Path, tmp_path: Path) -> None:
    write_run(cache, tmp_path / "run", {"audio": AUDIO, "video": VIDEO}, Length())
    derive_from_run(cache, tmp_path / "run", "length")
    found = Cache(cache).feature("video", "run-length/length").load()
    np.testing.assert_array_equal(found, [[25, 50], [25, 50], [26, 55], [27, 60]])
    with pytest.raises(UnknownNameError, match="unknown output 'prob' of the run .*; known: length, of-video"):
        derive_from_run(cache, tmp_path / "run", "prob")
    with pytest.raises(SettingError, match="modality: expected none for a run of .*Length, got audio"):
        derive_from_run(cache, tmp_path / "run", "length", modality="audio")


def test_view_is_read_in_place_of_the_sides_of_its_modality(work: Path, cache: Path, tmp_path: Path) -> None:
    view = "tests.extract.test_own_views-backwards"
    write_run(cache, tmp_path / "run", {"audio": AUDIO, "video": VIDEO}, Length())
    derive_from_run(cache, tmp_path / "run", "length", view=(view,))
    group = Cache(cache).feature("video", f"run-length@{view}/length").group
    assert group.inputs == [("video", f"open_media@{view}/frames"), ("audio", "open_media/frames")]
    with pytest.raises(UnknownNameError, match=r"open_media@babble5dB/frames.*known: .*backwards/frames"):
        derive_from_run(cache, tmp_path / "run", "length", view=("babble5dB",))  # a view of sound


@pytest.mark.slow
def test_second_run_on_derived_views(work: Path, cache: Path, tmp_path: Path) -> None:
    derive_from_run(cache, work / "both", "audio-states", name="ao", view=("plain", "babble-5dB"))
    write_run(cache, tmp_path / "second", {"audio": "ao/audio-states"})
    (report,) = derive_from_run(cache, tmp_path / "second", "audio-states", name="two", view=("babble-5dB",))
    assert report.line() == "two@babble-5dB (audio-states): derived 3 recordings, reused 0, failed 0"
    whole = tree(cache)
    for name in ("open_media@babble-5dB/frames", "ao@babble-5dB/audio-states", "two@babble-5dB/audio-states"):
        (path,) = (cache / "audio" / name / "values").glob("*1/c/0/0")
        path.write_bytes(b"x" * path.stat().st_size)
    verified = verify_cache(cache, VerifySettings(repair=True, reencode=1))
    assert verified.is_sound, verified.lines()
    assert tree(cache) == whole


def test_view_of_another_encoder_is_refused(work: Path, cache: Path) -> None:
    path = cache / "audio/open_media@babble5dB/zarr.json"
    metadata = read_json(path)
    attributes = metadata["attributes"]["embedcache"]
    attributes["fingerprint"]["weights"] = "other"
    metadata["attributes"]["embedcache"] = add_digest({**attributes, DIGEST: None})
    write_json(path, metadata)
    with pytest.raises(FingerprintError, match="weights: stored .* the cache's open_media@babble5dB/frames comes from"):
        derive_from_run(cache, work / "both", "audio-states", view=("plain", "babble5dB"))
    assert not (cache / "audio/both-audio-states").exists()  # all views are opened before the first is computed
