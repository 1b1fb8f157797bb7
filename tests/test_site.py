"""The documentation is built strictly, from the code, and asks nobody for anything."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import embedcache
from docs.hooks import leaves
from embedcache.cli.main import app

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning would have stopped it."""
    path = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@pytest.mark.slow
def test_the_reference_has_every_command_and_option(site: Path) -> None:
    page = html.unescape((site / "reference" / "cli.html").read_text())
    for words, command in leaves(typer.main.get_command(app)):
        assert f"$ {words} [OPTIONS]" in page
        for parameter in command.params:
            assert parameter.opts[0] in page, f"{words} {parameter.opts[0]}"


@pytest.mark.slow
def test_the_api_page_has_every_name(site: Path) -> None:
    page = (site / "reference" / "api.html").read_text()
    for name in embedcache.__all__:
        assert f'id="embedcache.{name}"' in page
    assert "encode_image" in page
    assert "rows of length 1" in page


@pytest.mark.slow
def test_a_reader_asks_no_other_machine(site: Path) -> None:
    asked = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=["']?(https?:)?//""")
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        assert not asked.search(page.read_text()), page
