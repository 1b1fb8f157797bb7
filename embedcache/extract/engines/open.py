"""What runs a job: this machine, or a Ray cluster."""

from typing import Protocol

from embedcache.extract.job import Done, Job
from embedcache.progress import Progress
from embedcache.registry import Registry
from embedcache.sources.contract import Source

ENGINES = Registry(
    "engine",
    {"local": "embedcache.extract.engines.local:run", "ray": "embedcache.extract.engines.ray:run"},
)


class Engine(Protocol):
    """Runs a job to its end."""

    def __call__(self, job: Job, source: Source, progress: Progress) -> list[Done]:
        """Encode all that is missing; give what was done, an entry a target.

        Args:
            job: what to extract.
            source: the job's source, open in this process.
            progress: told about items.
        """
        ...
