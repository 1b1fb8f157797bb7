"""Pipelines from data to figures; their caches and runs name sources, encoders and rules of this package."""

from embedcache.registry import trust_code

trust_code(__name__)
