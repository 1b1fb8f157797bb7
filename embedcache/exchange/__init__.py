"""In and out of other tools' formats and code."""
