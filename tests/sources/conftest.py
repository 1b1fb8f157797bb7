"""Servers for tests of remote sources."""

from tests.sources.s3 import bucket, class_bucket, class_web, s3_server, web

__all__ = ["bucket", "class_bucket", "class_web", "s3_server", "web"]
