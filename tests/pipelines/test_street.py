import io
import os
from hashlib import sha256

import numpy as np
import pytest

from embedcache.sources import FileItem, Source, open_source
from embedcache.testing.sources import SourceContract
from pipelines.worlds.ray_casting import cast_rays
from pipelines.worlds.shapes import KIND as SHAPES
from pipelines.worlds.street import KIND, splits_of
from pipelines.worlds.street_image import render
from pipelines.worlds.street_scene import DOMAINS, Lidar, build_scene, open_camera, scan
from tests.crash import call_elsewhere

LOCATION = "world=3,frames=1,test=1,domains=day+night"


@pytest.mark.slow
class TestStreet(SourceContract):
    has_texts = False

    @pytest.fixture
    def source(self) -> Source:
        return open_source("world=3,frames=1,test=0,domains=fog", kind=KIND)


def points_of(source: Source, key: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(source.read(FileItem(path=f"{key}.npz")))) as arrays:
        return dict(arrays)


def digests(seed: int) -> list[str]:
    """Return the digests of files of this world and of that of shapes."""
    street, shapes = open_source(LOCATION, kind=KIND), open_source(f"seed={seed}", kind=SHAPES)
    files = [street.read(FileItem(path=f"night/test/000.{end}")) for end in ("png", "npz")]
    files += [shapes.read(FileItem(path=f"{key}.png")) for key in ("train/00004", "unseen/00007")]
    return [sha256(data).hexdigest() for data in files]


@pytest.mark.slow
def test_same_bytes_in_another_process() -> None:
    own = digests(3)
    assert call_elsewhere(digests, 3, environment=os.environ) == own
    assert digests(4)[2] != own[2]


def test_splits_share_no_frame_and_points_have_no_image() -> None:
    samples = list(open_source("world=3,frames=2,test=1,domains=day+night+fog", kind=KIND).samples())
    by_split = {(sample.columns["domain"], sample.columns["split"]) for sample in samples}
    assert by_split == {(domain, split) for domain in ("day", "night", "fog") for split in splits_of(domain)}
    assert all(bool(sample.images) != (sample.columns["split"] == "points") for sample in samples)
    assert splits_of("fog") == ["target", "test"]
    source = open_source(LOCATION, kind=KIND)
    frames = [points_of(source, f"night/{split}/000")["xyz"] for split in splits_of("night")]
    assert len({frame.tobytes() for frame in frames}) == 4
    assert points_of(open_source("world=4", kind=KIND), "night/test/000")["xyz"].tobytes() != frames[-1].tobytes()


@pytest.mark.slow
def test_windows_of_solids_change_nothing() -> None:
    """Check that testing each solid only where it can be seen finds the same surfaces as testing it everywhere."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        scene = build_scene(DOMAINS["roof"].style, rng)
        camera = open_camera(DOMAINS["roof"].mount, scene, rng)._replace(width=112, height=56)
        rays = camera.rays()
        fast = cast_rays(camera.position, rays, scene.solids, scene.ground, camera=camera)
        slow = cast_rays(camera.position, rays, scene.solids, scene.ground)
        assert np.array_equal(fast.surface, slow.surface)
        # Not to the bit: NumPy may round the last elements of an array in another way, and grazing rays amplify that.
        np.testing.assert_allclose(fast.distance, slow.distance, rtol=1e-4)


def agreement(domain: str, lidar: Lidar, *, same_place: bool) -> float:
    """Return the fraction of points with the class of the pixel they are projected to."""
    agreeing, total = 0, 0
    for seed in range(2):
        rng = np.random.default_rng(seed)
        scene = build_scene(DOMAINS[domain].style, rng)
        camera = open_camera(DOMAINS[domain].mount, scene, rng)
        if same_place:
            camera = camera._replace(position=(-0.2, scene.lane, lidar.height))
        _, labels = render(DOMAINS[domain].light, scene, camera, rng)
        points = scan(lidar, scene, camera, rng)
        column, row = (points["uv"] * (camera.width, camera.height)).astype(int).T
        agreeing, total = agreeing + int((labels[row, column] == points["label"]).sum()), total + len(row)
    return agreeing / total


@pytest.mark.slow
def test_points_have_the_class_of_their_pixel() -> None:
    exact = Lidar(noise_m=0.0, dropout=0.0)
    assert agreement("day", exact, same_place=True) > 0.99  # the rest lies within half a pixel of an edge
    for domain in ("day", "a2", "sk", "roof"):
        assert agreement(domain, DOMAINS[domain].lidar, same_place=False) > 0.93


def test_calibration_error_moves_only_uv() -> None:
    locations = ("world=0", "calibration=0", "calibration=0.5", "calibration=2")
    plain, zero, small, large = (points_of(open_source(text, kind=KIND), "day/image/000") for text in locations)
    assert all(np.array_equal(plain[name], zero[name]) for name in plain)
    for moved in (small, large):
        assert all(np.array_equal(plain[name], moved[name]) == (name != "uv") for name in plain)
    distance = [np.abs(points["uv"] - plain["uv"]).mean() for points in (small, large)]
    assert 0 < distance[0] < distance[1] < 0.1
