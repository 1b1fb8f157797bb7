"""The source of Iconify's icons, on a package of four families written here, and the statistics of their study."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from embedcache.sources import Source, open_source
from embedcache.sources.images import decode_image
from embedcache.testing.sources import SourceContract
from pipelines.icons.correlations import rank_correlation
from pipelines.icons.curve_page import find_crossing, format_crossing
from pipelines.icons.drawing import draw_png
from pipelines.icons.source import KIND

pytest.importorskip("resvg_py")

SQUARE = '<path fill="currentColor" d="M0 0h{0}v{0}h-{0}z"/>'
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (
        {"name": "Plain", "license": {"spdx": "MIT"}, "palette": False, "category": "UI 24px"},
        {
            "icons": {
                "arrow-left": {"body": SQUARE.format(24)},
                "old": {"body": "<g/>", "hidden": True},
                "caf\u00e9-cup": {"body": "<text>\u00e9</text>" + SQUARE.format(12), "width": 12, "height": 12},
            },
            "aliases": {
                "arrow-west": {"parent": "arrow-left"},
                "arrow-back": {"parent": "arrow-west"},
                "arrow-right": {"parent": "arrow-left", "hFlip": True},
                "right": {"parent": "arrow-right"},
            },
            "width": 24,
            "height": 24,
        },
    ),
    "bright": (
        {"name": "Bright", "license": {"spdx": "CC-BY-4.0"}, "palette": True},
        {"icons": {"sun": {"body": '<circle cx="8" cy="8" r="4" fill="#f00"/>'}}},
    ),
    "faces": (
        {"name": "Faces", "license": {"spdx": "MIT"}, "palette": True, "category": "Emoji"},
        {"icons": {"grin": {"body": SQUARE.format(16)}}},
    ),
    "paid": ({"name": "Paid", "license": {"spdx": "CC-BY-NC-4.0"}}, {"icons": {"coin": {"body": SQUARE.format(16)}}}),
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "node_modules" / "@iconify" / "json"
    (folder / "json").mkdir(parents=True)
    (folder / "package.json").write_text('{"version": "2.0.0"}')
    (folder / "collections.json").write_text(json.dumps({name: about for name, (about, _) in FAMILIES.items()}))
    for name, (_, content) in FAMILIES.items():
        text = json.dumps({"prefix": name, **content}, ensure_ascii=False, indent="\t")
        (folder / "json" / f"{name}.json").write_text(text)
    return folder


class TestIconify(SourceContract):
    @pytest.fixture
    def source(self, package: Path) -> Source:
        return open_source(str(package), kind=KIND)


def pixels(source: Source, key: str) -> Any:
    (sample,) = [sample for sample in source.samples() if sample.key == key]
    return np.asarray(decode_image(source.read(sample.images[0])))


def test_names_and_columns(package: Path) -> None:
    samples = {sample.key: sample for sample in open_source(str(package.parents[2]), kind=KIND).samples()}
    assert set(samples) == {"plain:arrow-left", "plain:caf\u00e9-cup", "bright:sun"}
    texts = {key: [text.text for text in sample.texts] for key, sample in samples.items()}
    assert texts["plain:arrow-left"] == ["arrow left", "arrow west", "arrow back"]
    assert texts["plain:caf\u00e9-cup"] == ["caf\u00e9 cup"]
    assert samples["bright:sun"].columns == {
        "family": "bright",
        "palette": "color",
        "licence": "CC-BY-4.0",
        "category": None,
    }


def test_icons_are_drawn_on_white_within_a_margin(package: Path) -> None:
    source = open_source(str(package), kind=KIND)
    for key, color in (("plain:arrow-left", 0x1F), ("plain:caf\u00e9-cup", 0x1F)):
        image = pixels(source, key)
        assert image.shape == (256, 256, 3)
        assert (image[:15] == 255).all()
        assert (image[17:239, 17:239, 0] == color).all()
    sun = pixels(source, "bright:sun")
    assert sun[128, 128].tolist() == [255, 0, 0]
    assert sun[20, 128].tolist() == [255, 255, 255]


def test_long_icons_are_read_whole(package: Path) -> None:
    body = SQUARE.format(16).replace("h16", "h16" + " " * 40_000)
    (package / "json" / "bright.json").write_text(json.dumps({"icons": {"sun": {"body": body}}}))
    assert (pixels(open_source(str(package), kind=KIND), "bright:sun")[17:239, 17:239, 0] == 0x1F).all()


def test_damaged_drawings_are_errors() -> None:
    for damaged in ("<svg", "\ud800"):
        with pytest.raises(ValueError, match=r"."):
            draw_png(svg_string=damaged)


def test_crossing_is_where_the_gain_stays_above_zero() -> None:
    sizes = [1000, 10_000, 100_000]
    assert find_crossing(sizes, np.array([-1.0, 1, 1])) == pytest.approx(10**3.5)
    assert find_crossing(sizes, np.array([1.0, -1, 3])) == pytest.approx(10**4.25)
    assert find_crossing(sizes, np.array([1.0, 2, 3])) == 0
    assert find_crossing(sizes, np.array([1.0, 2, 0])) == np.inf
    shown = format_crossing({"value": 3162.3, "interval": [0.0, None]}, sizes)
    assert shown == "3,162 [≤ 1,000, > 100,000]"


def test_rank_correlation_is_spearmans_also_with_ties() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(30)
    y = x + rng.standard_normal(30)
    for one, other in ((x, y), (np.round(x), np.round(y))):
        found = rank_correlation(one, other, num_draws=50)
        assert found.value == pytest.approx(spearmanr(one, other).statistic)
        assert found.low < found.value < found.high


def test_draws_of_equal_values_are_left_out() -> None:
    found = rank_correlation(np.array([1.0, 2, 3]), np.array([1.0, 2, 3]), num_draws=200)
    assert found.low == pytest.approx(1)
