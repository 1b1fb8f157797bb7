# Processes that tests start read the bytecode of the package; each would compile it again, for 0.25 seconds.
export PYTHONDONTWRITEBYTECODE := ""

# List the recipes.
default:
    @just --list

# Install the package and everything that the tests need.
setup:
    python -m pip install -e ".[cpu,demo,dev]"

# Run all checks of CI; they must pass before a commit.
check: lint types test

# Check style and format without changing files.
lint:
    ruff check .
    ruff format --check .

# Check static types.
types:
    mypy

# Run the tests in two processes of one thread; more arguments go to pytest: just test -m "not slow"
test *args:
    python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not pipeline" {{ args }}

# Run the smallest size of every pipeline, from its data to its page.
pipelines *args:
    python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m pipeline {{ args }}

# Run the tests with the oldest version of each package that pyproject.toml allows, in an environment of its own. Old
# packages warn about each other, so warnings are no errors here.
lowest *args:
    python -m uv venv --quiet --clear --seed --python 3.11 build/lowest
    python -m uv pip install --quiet --python build/lowest/bin/python --resolution lowest-direct -e ".[cpu,demo,dev]"
    PATH="$PWD/build/lowest/bin:$PATH" python -m pytest -n 2 --dist loadfile -o filterwarnings=default {{ args }}

# Run the tests that need an NVIDIA GPU; all others do not see it.
gpu *args:
    python -m pytest -m gpu {{ args }}

# Write the types of options by name, after a setting has changed.
options:
    python -m tests.options

# Fix style and format.
fix:
    ruff check --fix .
    ruff format .

# Run the examples in the documentation.
docs:
    python -m pytest -q tests/test_docs.py

# Build the documentation in build/site; a broken link or name is an error.
site *args:
    NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet {{ args }}

# Run the whole system on packaged data.
smoke workdir="embedcache-quickstart":
    embedcache quickstart {{ workdir }}

# Time the hot paths against a lower bound or another tool. Names: micro extract train search coverage dedup serve;
# scale runs only if it is named
bench *names:
    python -m benchmarks {{ names }}

# Write golden artifacts of the present format into a new folder, as for the next format (docs/reference/on_disk.md)
golden folder:
    python -m tests.golden.make_artifacts {{ folder }}
