"""Steps, results and pages of source-free adaptation, for `pipelines/summit.py`."""
