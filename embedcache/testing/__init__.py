"""Contract tests for plug-ins: subclass one in your own test suite and run pytest."""
