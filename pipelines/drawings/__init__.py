"""Parts of `pipelines.icons`: data, curation and splits, runs and tests, and the page."""
