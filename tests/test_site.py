"""The documentation site: built without warnings, complete, and without requests to other servers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import embedcache

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the built site; a warning is an error."""
    path = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_api_page_has_every_name(site: Path) -> None:
    page = (site / "reference" / "api.html").read_text()
    for name in embedcache.__all__:
        assert f'id="embedcache.{name}"' in page
    assert "encode_image" in page
    assert "rows of length 1" in page


def test_pages_load_nothing_from_other_servers(site: Path) -> None:
    external = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=["']?(https?:)?//""")
    pages = sorted(site.rglob("*.html"))
    assert pages
    for page in pages:
        assert not external.search(page.read_text()), page
