"""The README for the package index, where relative links and images lead nowhere. All else is in pyproject.toml."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
SOURCE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]


def absolute(readme: str) -> str:
    """Return the README with links to files of the repository as URLs of its main branch."""
    raw = SOURCE.replace("//github.com/", "//raw.githubusercontent.com/")
    relative = r"(?![a-z]+:|#|/)([^)\s]+)\)"
    readme = re.sub(rf"(!\[[^\]]*\]\(){relative}", rf"\1{raw}/main/\2)", readme)
    return re.sub(rf"((?<!!)\[[^\]]*\]\(){relative}", rf"\1{SOURCE}/blob/main/\2)", readme)


setup(
    long_description=absolute((ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
