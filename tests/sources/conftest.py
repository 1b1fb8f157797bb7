"""Servers for tests of remote sources."""

from tests.sources.s3 import bucket, s3_server, web

__all__ = ["bucket", "s3_server", "web"]
