"""The bytes of an uncompressed zip64, as pure functions of names, sizes and CRCs.

Every member is stored, uses zip64 fields, bears no time, and begins at a multiple of 64 bytes (as
in torch's own files, so that a memory map of them is aligned). APPNOTE.TXT 6.3.10, sections 4.3 and
4.5.3.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

LOCAL_SIGNATURE = b"PK\x03\x04"
_ALIGN = 64
_VERSION = 45
_MAX32 = 0xFFFFFFFF
_MIDNIGHT_1980 = (0, 33)
# An extra field that readers skip: the same id that torch pads with.
_PADDING_ID = 0x4246


@dataclass(frozen=True)
class Member:
    """One member: its name, where its local header begins, the size and CRC-32 of its content."""

    name: str
    offset: int
    size: int
    crc: int

    @property
    def data_offset(self) -> int:
        """Where the content begins; a multiple of 64."""
        bare = self.offset + 30 + len(self.name) + 20 + 4
        return -(-bare // _ALIGN) * _ALIGN

    @property
    def end(self) -> int:
        """Where the next member begins."""
        return self.data_offset + self.size

    def local_header(self) -> bytes:
        """Header before the content, padded by an extra field."""
        name = self.name.encode("ascii")
        pad = self.data_offset - (self.offset + 30 + len(name) + 20 + 4)
        extra = struct.pack("<HHQQ", 1, 16, self.size, self.size)
        extra += struct.pack("<HH", _PADDING_ID, pad) + bytes(pad)
        fixed = (_VERSION, 0, 0, *_MIDNIGHT_1980, self.crc, _MAX32, _MAX32, len(name), len(extra))
        return LOCAL_SIGNATURE + struct.pack("<HHHHHIIIHH", *fixed) + name + extra

    def central_header(self) -> bytes:
        """Entry of the directory."""
        name = self.name.encode("ascii")
        extra = struct.pack("<HHQQQ", 1, 24, self.size, self.size, self.offset)
        fixed = (_VERSION, _VERSION, 0, 0, *_MIDNIGHT_1980, self.crc, _MAX32, _MAX32)
        rest = (len(name), len(extra), 0, 0, 0, 0, _MAX32)
        return (
            b"PK\x01\x02"
            + struct.pack("<HHHHHHIII", *fixed)
            + struct.pack("<HHHHHII", *rest)
            + name
            + extra
        )


def directory(members: Sequence[Member]) -> bytes:
    """Everything after the last member: directory, zip64 end record, locator, end record."""
    entries = b"".join(member.central_header() for member in members)
    start = members[-1].end if members else 0
    count = len(members)
    end64 = struct.pack(
        "<4sQHHIIQQQQ",
        b"PK\x06\x06",
        44,
        _VERSION,
        _VERSION,
        0,
        0,
        count,
        count,
        len(entries),
        start,
    )
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, start + len(entries), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, _MAX32, _MAX32, 0)
    return entries + end64 + locator + end
