"""The argument structs of kernels: declared with names, as in the sources, and packed by name.

Every kernel takes one struct by value: pointers, which change with each call, then what follows from sizes,
types and flags. tests/test_structs.py compares names, order and types with the sources, and sizes with PTX.
"""

from __future__ import annotations

import re
import struct
from typing import Any

TENSOR_MAP_WORDS = 16
FORMATS = {"u32": "I", "i64": "q", "float": "f", "Divisor": "3I"}
DECLARED: list[ArgumentStruct] = []


class ArgumentStruct:
    """A struct of kernels_cu: "file:name", the names of its pointers, and its other fields as C has them.
    A TensorMap counts as 16 pointers, and comes first, as it has to lie at a multiple of 64 bytes.

    >>> args = ArgumentStruct("tiny.cu:TinyArgs", "data", "u32 count; Divisor width; i64 stride")
    >>> args.num_pointers, args.pack(count=1, width=(3, 2863311531, 1), stride=-1).hex()
    (1, '0100000003000000abaaaaaa01000000ffffffffffffffff')
    """

    def __init__(self, place: str, pointers: str, fields: str, tensor_map: str = "") -> None:
        self.file, _, self.name = place.partition(":")
        self.tensor_map = tensor_map
        self.pointers = pointers.split()
        self.fields: dict[str, str] = {}  # name -> type
        for declaration in fields.split(";"):
            kind, *names = re.split(r"[\s,]+", declaration.strip())
            self.fields |= dict.fromkeys(names, kind)
        self._layout = struct.Struct("@" + "".join(FORMATS[kind] for kind in self.fields.values()))
        DECLARED.append(self)

    @property
    def num_pointers(self) -> int:
        return len(self.pointers) + (TENSOR_MAP_WORDS if self.tensor_map else 0)

    @property
    def size(self) -> int:
        return struct.calcsize(f"@{self.num_pointers}P{self._layout.format[1:]}")

    def pack(self, **values: Any) -> bytes:
        """All fields but the pointers; TypeError unless each is given, by its name."""
        if values.keys() != self.fields.keys():
            wrong = ", ".join(sorted(values.keys() ^ self.fields.keys()))
            raise TypeError(f"{self.name}: missing or unknown: {wrong}")
        flat: list[Any] = []
        for name, kind in self.fields.items():
            flat.extend(values[name] if kind == "Divisor" else (values[name],))
        return self._layout.pack(*flat)
