"""The documentation site is built without warnings, and its reference has every public name."""

import subprocess
import sys
from pathlib import Path

import pytest

import embedcache

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_site_has_every_public_name(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "reference" / "api.html").read_text()
    assert [name for name in embedcache.__all__ if f'id="embedcache.{name}"' not in page] == []
