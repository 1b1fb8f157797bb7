"""The few tables of an OpenType font that say which characters join to which glyph.

Names as in the OpenType specification: `sfnt` is the container, `cmap` maps characters to glyphs, `GSUB` replaces
glyphs by others, `maxp` counts them. All numbers are big-endian. Glyphs are numbered from 0, which is "no such glyph".
"""

import struct
from collections.abc import Iterator, Sequence

FIRST_PRIVATE = 0xF0000
"""The character that stands for glyph 0 in a font with `numbered` glyphs; glyph 1 is the next, and so on."""

_LIGATURES, _EXTENSION = 4, 7  # kinds of GSUB lookup
_FULL_UNICODE = (3, 10)  # platform and encoding of a cmap for all of Unicode
_GROUPS = 12  # format of a cmap as ranges


def characters(font: bytes) -> dict[int, int]:
    """Get which glyph a character has: code point -> glyph."""
    table = _table(font, b"cmap")
    found: dict[int, int] = {}
    for place in range(4, 4 + 8 * _u16(table, 2), 8):
        subtable = table[_u32(table, place + 4) :]
        if _u16(subtable, 0) == _GROUPS:
            for first, last, glyph in struct.iter_unpack(">III", subtable[16 : _u32(subtable, 4)]):
                found |= {code: glyph + code - first for code in range(first, last + 1)}
    return found


def ligatures(font: bytes) -> dict[tuple[int, ...], int]:
    """Get which glyphs join to one: glyphs -> glyph."""
    gsub = _table(font, b"GSUB")
    lookups = gsub[_u16(gsub, 8) :]
    return {
        parts: joined
        for offset in _offsets(lookups, 0)
        for subtable in _ligature_subtables(lookups[offset:])
        for parts, joined in _joined(subtable)
    }


def numbered(font: bytes) -> bytes:
    """Get a copy of the font in which glyph n is the character `FIRST_PRIVATE` + n, and no other is there.

    Each glyph can then be drawn by itself, without a layout engine.
    """
    num_glyphs = _u16(_table(font, b"maxp"), 4)
    cmap = struct.pack(">HHHHI", 0, 1, *_FULL_UNICODE, 12)
    cmap += struct.pack(">HHIII", _GROUPS, 0, 16 + 12, 0, 1)
    cmap += struct.pack(">III", FIRST_PRIVATE, FIRST_PRIVATE + num_glyphs - 1, 0)
    padding = bytes(-len(font) % 4)
    record = _record(font, b"cmap") + 8  # behind tag and checksum, which FreeType does not check
    place = struct.pack(">II", len(font) + len(padding), len(cmap))
    return font[:record] + place + font[record + 8 :] + padding + cmap


def _record(font: bytes, tag: bytes) -> int:
    for place in range(12, 12 + 16 * _u16(font, 4), 16):
        if font[place : place + 4] == tag:
            return place
    raise ValueError(f"the font has no table {tag.decode()}")


def _table(font: bytes, tag: bytes) -> bytes:
    place = _record(font, tag)
    offset, length = _u32(font, place + 8), _u32(font, place + 12)
    return font[offset : offset + length]


def _ligature_subtables(lookup: bytes) -> Iterator[bytes]:
    kind = _u16(lookup, 0)
    for offset in _offsets(lookup, 4):
        subtable = lookup[offset:]
        if kind == _LIGATURES:
            yield subtable
        elif kind == _EXTENSION and _u16(subtable, 2) == _LIGATURES:
            yield subtable[_u32(subtable, 4) :]


def _joined(subtable: bytes) -> Iterator[tuple[tuple[int, ...], int]]:
    firsts = _covered(subtable[_u16(subtable, 2) :])
    for first, set_offset in zip(firsts, _offsets(subtable, 4), strict=True):
        ligature_set = subtable[set_offset:]
        for offset in _offsets(ligature_set, 0):
            joined, num_parts = struct.unpack_from(">HH", ligature_set, offset)
            rest = struct.unpack_from(f">{num_parts - 1}H", ligature_set, offset + 4)
            yield (first, *rest), joined


def _covered(coverage: bytes) -> Sequence[int]:
    """Get the glyphs of a coverage table, in order: a list (format 1) or ranges (format 2)."""
    if _u16(coverage, 0) == 1:
        return _offsets(coverage, 2)
    ranges = (struct.unpack_from(">HH", coverage, 4 + 6 * n) for n in range(_u16(coverage, 2)))
    return [glyph for first, last in ranges for glyph in range(first, last + 1)]


def _offsets(table: bytes, place: int) -> tuple[int, ...]:
    """Read a count and as many 16-bit numbers."""
    return struct.unpack_from(f">{_u16(table, place)}H", table, place + 2)


def _u16(table: bytes, place: int) -> int:
    return int.from_bytes(table[place : place + 2], "big")


def _u32(table: bytes, place: int) -> int:
    return int.from_bytes(table[place : place + 4], "big")
