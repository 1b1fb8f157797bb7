import io
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image

from embedcache.errors import ItemError, SourceError, UnknownNameError
from embedcache.sources import FileItem, Source, open_source
from embedcache.testing.sources import SourceContract
from pipelines.worlds.ray_casting import NOTHING, RAISED, ROAD, Camera, Ground, Solid, cast_rays
from pipelines.worlds.street import KIND, StreetSource, splits_of
from pipelines.worlds.street_image import render
from pipelines.worlds.street_scene import CLASSES, DOMAINS, Lidar, build_scene, hit_points, open_camera, scan

LOCATION = "world=3,frames=1,test=1,domains=day+night"
CAMERA = Camera((0.0, 0.0, 1.6), 0.1, -0.05, 70.0, 64, 32)
FLAT = Ground(half_width=1e6, crossing=0.0, crossing_half_width=1.0)


@pytest.mark.slow
class TestStreet(SourceContract):
    has_texts = False

    @pytest.fixture
    def source(self) -> Source:
        return open_source("world=3,frames=1,test=0,domains=fog", kind=KIND)


def points_of(source: Source, key: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(source.read(FileItem(path=f"{key}.npz")))) as arrays:
        return dict(arrays)


@pytest.mark.slow
def test_same_bytes_in_another_process() -> None:
    code = (
        "from hashlib import sha256; from embedcache.sources import open_source, FileItem\n"
        f"source = open_source({LOCATION!r}, kind={KIND!r})\n"
        "print(*(sha256(source.read(FileItem(path=f'night/test/000.{end}'))).hexdigest() for end in ('png', 'npz')))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    source = open_source(LOCATION, kind=KIND)
    own = [sha256(source.read(FileItem(path=f"night/test/000.{end}"))).hexdigest() for end in ("png", "npz")]
    assert own == other


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
def test_points_have_all_arrays_and_classes() -> None:
    source = open_source("world=3,frames=6,domains=day", kind=KIND)
    frames = [points_of(source, f"day/image/{number:03d}") for number in range(6)]
    for frame in frames:
        assert 1000 < len(frame["xyz"]) < 5000
        assert {len(values) for values in frame.values()} == {len(frame["xyz"])}
        assert frame["label"].dtype == np.int16
        assert frame["xyz"].dtype == frame["uv"].dtype == np.float32
        assert (frame["uv"] >= 0).all()
        assert (frame["uv"] < 1).all()
    counts = np.bincount(np.concatenate([frame["label"] for frame in frames]), minlength=len(CLASSES))
    assert (counts > 50).all()


@pytest.mark.parametrize(("location", "error", "message"), [
    ("word=3", SourceError, "expected world=…, frames=…, test=…, calibration=…, domains=…, got 'word=3'"),
    ("world=x", SourceError, "expected a whole number for world, got 'x'"),
    ("domains=day+moon", UnknownNameError, "moon"),
])  # fmt: skip
def test_wrong_locations_are_refused(location: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_source(location, kind=KIND)
    with pytest.raises(ItemError, match="expected DOMAIN/SPLIT/NUMBER"):
        open_source("world=0", kind=KIND).read(FileItem(path="moon/test/000.png"))


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


@pytest.mark.parametrize("shape", ["box", "ellipsoid"])
def test_hits_lie_on_the_solid(shape: str) -> None:
    solid = Solid(shape, (9.0, 1.0, 1.2), (1.5, 0.8, 0.7), 0.4 if shape == "box" else 0.0)  # type: ignore[arg-type]
    hits = cast_rays(CAMERA.position, CAMERA.rays(), [solid], FLAT)
    is_hit = hits.surface == 0
    assert is_hit.sum() > 20
    offset = hit_points(CAMERA.position, CAMERA.rays(), hits)[is_hit] - np.array(solid.center)
    cos, sin = np.cos(solid.yaw), np.sin(solid.yaw)
    own = np.stack([cos * offset[:, 0] + sin * offset[:, 1], cos * offset[:, 1] - sin * offset[:, 0], offset[:, 2]], 1)
    scaled = own / np.array(solid.half)
    extent = np.abs(scaled).max(axis=1) if shape == "box" else np.linalg.norm(scaled, axis=1)
    assert extent == pytest.approx(1, abs=1e-4)
    assert (np.einsum("nc,nc->n", hits.normal[is_hit], CAMERA.rays()[is_hit]) < 1e-6).all()
    assert np.linalg.norm(hits.normal[is_hit], axis=1) == pytest.approx(1, abs=1e-5)
    assert (np.einsum("nc,nc->n", hits.normal[is_hit], offset) > 0).all()


def test_ground_has_a_road_a_curb_and_a_horizon() -> None:
    ground = Ground(half_width=3.0, crossing=20.0, crossing_half_width=4.0)
    hits = cast_rays(CAMERA.position, CAMERA.rays(), [], ground)
    xyz = hit_points(CAMERA.position, CAMERA.rays(), hits)
    assert xyz[..., 2][hits.surface == ROAD] == pytest.approx(0, abs=1e-3)
    heights = xyz[..., 2][hits.surface == RAISED]
    assert ((heights > -1e-3) & (heights < 0.15 + 1e-3)).all()
    is_beside = (np.abs(xyz[..., 1]) > 3.2) & (np.abs(xyz[..., 0] - 20) > 4.5) & np.isfinite(hits.distance)
    assert (hits.surface[is_beside] == RAISED).all()
    assert (hits.surface[0] == NOTHING).all()


def test_projection_inverts_the_rays() -> None:
    rays = CAMERA.rays()
    points = np.array(CAMERA.position, np.float32) + 7 * rays.reshape(-1, 3)
    uv, depth = CAMERA.project(points)
    columns, rows = np.meshgrid((np.arange(64) + 0.5) / 64, (np.arange(32) + 0.5) / 32)
    assert uv == pytest.approx(np.stack([columns.ravel(), rows.ravel()], axis=1), abs=1e-4)
    assert (depth > 0).all()


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


@pytest.mark.slow
def test_domains_look_different() -> None:
    """Check that night is dark, fog is flat, and that left-hand traffic puts the car on the other side."""
    means, contrasts = {}, {}
    source = open_source("world=0", kind=KIND)
    assert isinstance(source, StreetSource)
    for name in ("day", "dusk", "night", "fog", "headlight"):
        image = np.asarray(Image.fromarray(source.render(f"{name}/test/000", DOMAINS[name])).convert("L"), float)
        means[name], contrasts[name] = image.mean(), image.std()
    assert means["headlight"] < means["night"] < means["dusk"] < means["day"]
    assert contrasts["fog"] < contrasts["day"]
    lanes = [build_scene(DOMAINS[name].style, np.random.default_rng(0)).lane for name in ("day", "sg")]
    assert lanes[0] < 0 < lanes[1]
