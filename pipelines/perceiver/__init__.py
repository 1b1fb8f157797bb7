"""Steps of the pipeline of one likelihood for every task."""
