"""Speed, measured on demand: each file prints a table of medians beside a floor or a peer of the same run."""
