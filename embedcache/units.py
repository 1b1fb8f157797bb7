"""Sizes, fractions and counts as people write them: `4GB`, `0.1%`, `1000`. Invalid text raises `SettingError`."""

from pydantic import ByteSize, TypeAdapter, ValidationError

from embedcache.errors import SettingError

_SIZE = TypeAdapter(ByteSize)


def parse_size(text: str) -> int:
    """Parse a number of bytes, such as `4GB`, `500M` or `4096`; 1 GB is 1000³ bytes, 1 GiB is 1024³."""
    try:
        size = int(_SIZE.validate_python(text))
    except (ValidationError, OverflowError):
        size = 0
    if not 0 < size < 2**63:
        raise SettingError(f"invalid size {text!r}: expected a number of bytes such as 500MB, 4GB or 4096")
    return size


def format_bytes(count: float) -> str:
    """Format a number of bytes in GB, or in MB below 1 GB, such as `1.50 GB`."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def parse_fraction(text: str) -> float:
    """Parse a fraction of a whole, such as `0.1%` or `0.001`."""
    try:
        fraction = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction <= 1:
        raise SettingError(f"invalid fraction {text!r}: expected a number between 0 and 1 or a percentage such as 0.1%")
    return fraction


def _parse_count(text: str) -> int:
    """Parse a whole number of at least 1, such as `1000` or `20,000`."""
    try:
        count = int(text.replace(",", ""))
    except ValueError:
        count = 0
    if count < 1:
        raise SettingError(f"invalid count {text!r}: expected a whole number of at least 1 such as 1000")
    return count


def parse_count_or_fraction(text: str) -> int | float:
    """Parse a number of things, `1000`, or a percentage of them, `10%`, which becomes the fraction 0.1."""
    return parse_fraction(text) if text.endswith("%") else _parse_count(text)


def parse_counts(text: str) -> tuple[int, ...]:
    """Parse whole numbers separated by commas, such as `1000,100`."""
    return tuple(_parse_count(part) for part in text.split(","))
