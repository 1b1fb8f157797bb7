"""One network for every task on cached features: Uni-Perceiver as a pipeline. See README.md."""
