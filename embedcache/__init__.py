"""Encode once, align for ever: cache frozen encoders, train projectors on the cached features, search and curate."""
