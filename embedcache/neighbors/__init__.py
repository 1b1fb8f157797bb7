"""Which vectors are close: a pass over stored vectors, nearest neighbors, and pairs above a cosine with recall."""
