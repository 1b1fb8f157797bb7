# List the recipes.
default:
    @just --list

# Install the package with everything the tests need.
setup:
    python -m pip install -e ".[cpu,demo,dev]"

# Everything that must hold before a commit: exactly what CI runs.
check: lint types test

# Style and format, without changing anything.
lint:
    ruff check .
    ruff format --check .

# Static types.
types:
    mypy

# The tests, on two cores, a thread each; extra words go to pytest, such as: just test -m "not slow"
test *args:
    OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile {{ args }}

# Repair style and format.
fix:
    ruff check --fix .
    ruff format .

# Run the examples in the documentation.
docs:
    python -m pytest -q tests/test_docs.py

# Build the documentation into build/site, strictly: a broken link or name stops it.
site *args:
    NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet {{ args }}

# The whole system on packaged data.
smoke workdir="embedcache-quickstart":
    embedcache quickstart {{ workdir }}

# Time the hot paths against a floor or a peer; name one or more of: help gather extract index decode train evaluate search
# coverage dedup serve
bench *names:
    python -m benchmarks {{ names }}

# Write the golden cache of a new format. Those of old formats are never made again.
golden:
    python -m tests.golden.make
