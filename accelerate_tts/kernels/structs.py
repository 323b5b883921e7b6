"""Structs that the kernels are called with. One description makes both the C++ header and the ctypes classes.

`csrc/abi.h` is generated from here by `python -m accelerate_tts.kernels.build` and is never edited. A library contains
the offset and size of every field. `library.py` compares them with these classes before the first call, and refuses a
library with other structs.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

__all__ = ["ABI_VERSION", "FORMATS", "STRUCTS", "expected", "header", "library_name"]

ABI_VERSION = 3
"""Version of the exported functions and of their meaning. The structs are compared separately."""

FORMATS = ("fp32", "bf16", "int8", "transposed")
"""Weight formats of the kernels for few rows: (outputs, inputs), or (inputs, outputs) in fp32 if transposed."""

Field = tuple[str, str, str]
"""A name, a C type, and a description."""


def _all(names: str, kind: str, what: str = "") -> list[Field]:
    """Make several fields of one type; the first has the description."""
    return [(name, kind, "" if number else what) for number, name in enumerate(names.split())]


_FIELDS: dict[str, list[Field]] = {
    "Linear": [
        ("w", "const void*", "[outputs, inputs], or [inputs, outputs] if transposed"),
        ("scale", "const float*", "[outputs] for int8, or null"),
        ("bias", "const float*", "[outputs] or null"),
        *_all("outputs inputs", "int64_t"),
    ],
    "DecoderBlock": [
        *_all("hidden heads kv_heads head_dim inner", "int64_t"),
        ("format", "int64_t", "of the weights, see Format"),
        ("layer_norm", "int64_t", "1 LayerNorm, 0 RMSNorm"),
        ("gated", "int64_t", "1: act(gate) * up, 0: act(up)"),
        ("activation", "int64_t", "0 SiLU, 1 GELU by tanh"),
        *_all("eps1 eps2 scaling", "double"),
        *_all("norm1 norm1_bias norm2 norm2_bias", "const float*", "[hidden]; biases may be null"),
        *_all("q k v o gate up down", "Linear", "k.w and v.w are null where q makes all three"),
    ],
    "Row": [
        *_all("keys values", "void*", "[kv_heads, room, head_dim]"),
        *_all("key_head value_head", "int64_t", "strides, in elements; those of positions are the token's"),
        ("length", "int64_t", "positions in the cache before this token"),
        ("mask", "const void*", "[length + 1] as the token's, or null"),
        ("attention", "float*", "[heads, length + 1], or null"),
    ],
    "Token": [
        ("x", "const float*", "[rows, hidden]"),
        ("y", "float*", "the same"),
        ("rows", "int64_t", ""),
        *_all("cos sin", "const float*", "[rows or 1, head_dim], or null"),
        ("rotation_stride", "int64_t", "0 where all rows have one"),
        ("mask", "const void*", "[rows or 1, positions] or null: bytes, 0 where nothing is seen, or added fp32"),
        ("mask_stride", "int64_t", ""),
        ("mask_is_bytes", "int64_t", ""),
        ("keys", "void*", "[rows, kv_heads, room, head_dim]"),
        ("values", "void*", ""),
        *_all("key_row key_head key_position", "int64_t", "strides, in elements"),
        *_all("value_row value_head value_position", "int64_t"),
        ("is_bf16", "int64_t", "the model: its cache, and what one block hands to the next"),
        ("length", "int64_t", "positions in the cache before this token; of the longest, where rows have their own"),
        ("attention", "float*", "[rows, heads, length + 1], the attention weights; null if not requested"),
        ("own", "const Row*", "[rows], each row's own cache; or null: one cache and one mask, as above, for all"),
    ],
    "Dense": [
        ("w", "const uint16_t*", "bf16, in panels of 64 outputs, each [inputs / 2][64][2]"),
        ("bias", "const float*", "[outputs] or null"),
        *_all("outputs inputs", "int64_t"),
    ],
    "TransformerBlock": [
        *_all("hidden heads inner", "int64_t", "multiples of 64; heads are 64 wide"),
        *_all("eps1 eps2 scaling", "double"),
        *_all("norm1 norm1_bias norm2 norm2_bias", "const float*", "[hidden]"),
        *_all("qkv o up down", "Dense"),
    ],
    "TransformerCall": [
        ("x", "const float*", "[batch][length][hidden]"),
        ("y", "float*", "the same"),
        ("mask", "const float*", "[batch][length], what is added for a key; or null"),
        *_all("batch length", "int64_t"),
    ],
    "ResidualBlock": [
        *_all("channels outputs", "int64_t", "multiples of 64"),
        *_all("eps1 eps2", "double"),
        *_all("norm1 norm1_bias norm2 norm2_bias", "const float*", "[outputs]"),
        *_all("first second", "Dense", "inputs: [3][channels], [3][outputs]"),
        ("beside", "Dense", ""),
    ],
    "ResidualCall": [
        ("x", "const float*", "[batch][channels][length]"),
        ("y", "float*", "[batch][outputs][length]"),
        ("mask", "const float*", "[batch][length], what frames are multiplied by"),
        ("time", "const float*", "[batch][outputs], what is added between the convolutions"),
        *_all("batch length", "int64_t"),
    ],
    "ShortConvolution": [
        ("w", "const float*", "turned, in panels of 32 outputs, each [points][chunks][inputs][32]"),
        ("bias", "const float*", "[outputs] or null"),
        ("before", "const float*", "[points][points], turns a tile of the input"),
        ("after", "const float*", "[frames][points], turns sums back"),
        ("outputs", "int64_t", "a multiple of 32; those that there are not are zeros"),
        ("inputs", "int64_t", ""),
        ("points", "int64_t", "products of a tile, 3 to 8"),
        ("frames", "int64_t", "results of a tile; with several chunks, as many as a chunk has taps"),
        ("chunks", "int64_t", "parts of the taps"),
        *_all("dilation padding", "int64_t", "in frames"),
    ],
    "ConvolutionCall": [
        ("x", "const float*", "[batch][inputs][length]"),
        ("y", "float*", "[batch][outputs][results]"),
        ("plus", "const float*", "what is added, in the order of y; or null"),
        ("slope", "double", "of a leaky ReLU at the end, which 1 leaves out"),
        *_all("x_batch x_channel x_frame y_batch y_channel y_frame", "int64_t", "strides, in elements"),
        *_all("batch length outputs results", "int64_t"),
    ],
}

_NUMBERS: dict[str, Any] = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}


def _classes() -> dict[str, type[ctypes.Structure]]:
    made: dict[str, type[ctypes.Structure]] = {}
    for struct, fields in _FIELDS.items():
        kinds = [(name, ctypes.c_void_p if kind[-1] == "*" else made.get(kind) or _NUMBERS[kind])
                 for name, kind, _ in fields]  # fmt: skip
        made[struct] = type(struct, (ctypes.Structure,), {"_fields_": kinds})
    return made


STRUCTS: dict[str, type[ctypes.Structure]] = _classes()
"""The ctypes class of each struct, by name."""


def library_name() -> str:
    """Return the name of the library's file: `_kernels.so`, `.dylib` or `.dll`."""
    return "_kernels" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


def expected() -> list[tuple[str, int, int]]:
    """Return name, offset and size in bytes of every field, as a library must have them."""
    return [
        (f"{struct}.{name}", place.offset, place.size)
        for struct, fields in _FIELDS.items()
        for name, _, _ in fields
        for place in (getattr(STRUCTS[struct], name),)
    ]


def header() -> str:
    """Return the text of `csrc/abi.h`."""
    lines = [
        "// The structs that kernels are called with. Written from structs.py; never edited.",
        "#pragma once",
        "#include <cstddef>",
        "#include <cstdint>",
        "",
        f"constexpr int ABI_VERSION = {ABI_VERSION};",
        "",
        f"enum Format : int64_t {{ {', '.join(name.upper() for name in FORMATS)} }};",
    ]
    for struct, fields in _FIELDS.items():
        lines += ["", f"struct {struct} {{"]
        lines += [f"  {kind} {name};" + (f"  // {what}" if what else "") for name, kind, what in fields]
        lines += ["};"]
    lines += ["", "struct Field {", "  const char* name;", "  int64_t offset, size;", "};", ""]
    lines += ['#define KERNELS_FIELD(S, F) {#S "." #F, offsetof(S, F), sizeof(S::F)}']
    lines += ["constexpr Field FIELDS[] = {"]
    lines += [f"    KERNELS_FIELD({struct}, {name})," for struct, fields in _FIELDS.items() for name, _, _ in fields]
    return "\n".join([*lines, "};", "#undef KERNELS_FIELD", ""])
