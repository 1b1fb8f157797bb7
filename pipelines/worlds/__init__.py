"""Generated datasets for pipelines and tests, as plug-in sources; not part of the package."""
