"""A trained pair in formats that others load without embedcache."""
