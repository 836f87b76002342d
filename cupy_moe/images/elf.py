"""What a cubin says of itself: it is an ELF file."""

from __future__ import annotations

import struct
from collections.abc import Iterator


def end(data: bytes) -> int:
    """Where the last table of the file ends: the least size of a whole image."""
    phoff, shoff = struct.unpack_from("<QQ", data, 32)
    phsize, phnum, shsize, shnum = struct.unpack_from("<4H", data, 54)
    return int(max(phoff + phsize * phnum, shoff + shsize * shnum))


def number(data: bytes) -> int | str:
    """The number of the target that its header states, which does not tell sm_90a from sm_90; or why there is
    none."""
    if len(data) < 64 or data[:5] != b"\x7fELF\x02":
        return "no ELF file"
    machine, flags, abi = *struct.unpack_from("<H", data, 18), *struct.unpack_from("<I", data, 48), data[7]
    if machine != 190 or abi not in (0x33, 0x41) or end(data) > len(data):
        return "no whole CUDA ELF file"
    return int(flags & 0xFF if abi == 0x33 else flags >> 8 & 0xFF)


def entry_points(data: bytes) -> Iterator[str]:
    """Its kernels, from its symbols. Raises struct.error, ValueError, IndexError or OverflowError where these
    are damaged."""
    (offset,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<2H", data, 58)
    sections = [struct.unpack_from("<IIQQQQI", data, offset + size * index) for index in range(count)]
    symbols = next((section for section in sections if section[1] == 2), None)  # SHT_SYMTAB
    if symbols is None:
        return
    *_, start, length, link = symbols
    for position in range(start, min(start + length, len(data)), 24):
        name, info, other = struct.unpack_from("<IBB", data, position)
        if info & 15 == 2 and other & 0x10:  # STT_FUNC, STO_CUDA_ENTRY
            begin = sections[link][4] + name
            yield data[begin : data.index(b"\0", begin)].decode()
