"""The encoder of the page "Your own encoder of recordings, videos or points": it passes the contract it shows."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedcache.testing.encoders import AudioEncoderContract
from tests.blocks import ROOT, blocks_of

PAGE = ROOT / "docs" / "howto" / "own_modality.md"


@pytest.fixture(scope="module", autouse=True)
def _loudness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Save the first block of the page as `loudness.py` on the path."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "loudness.py").write_text(next(block.code for block in blocks_of(PAGE) if block.language == "python"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield
    sys.modules.pop("loudness", None)


class TestLoudness(AudioEncoderContract):
    has_weights = False

    @pytest.fixture
    def spec(self) -> str:
        return "loudness:open_loudness"


def test_plugin_is_as_short_as_the_page_says() -> None:
    code = next(block.code for block in blocks_of(PAGE) if block.language == "python")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 50


def test_page_defines_the_contract_of_this_file() -> None:
    assert "class TestLoudness(AudioEncoderContract):\n    has_weights = False\n" in Path(PAGE).read_text()
