"""Headers of safetensors files, laid out so that a file's data begins where memory copies are fast.

The format allows spaces after the header. PyTorch allocates tensors at multiples of 64 bytes; where
their bytes lie so in the file as well, the kernel copies between the two a third faster (measured:
10.7 GB/s against 7.8 on an AMD EPYC).
"""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distavg.checkpoint.manifest import SavedTensor
from distavg.errors import UnsupportedError

__all__ = ["check_dtypes", "encode_header", "read_header"]

_ALIGNMENT = 64
_METADATA = "__metadata__"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
}


def encode_header(
    tensors: Mapping[str, SavedTensor], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header of a file that holds these arrays, with its length prefix, and where each begins.

    Those whose size is no multiple of 64 bytes go last, so that the others begin at one, and the
    widest dtypes first among them, so that each is aligned as its dtype needs. The positions are in
    the file, in ascending order.

    Raises:
        UnsupportedError: There are too many tensors, or one has the name of the metadata.
    """
    if _METADATA in tensors:
        raise UnsupportedError(f"safetensors files cannot hold a tensor called {_METADATA}")
    entries: dict[str, Any] = {_METADATA: metadata}
    begins = {}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: _rank(item[1])):
        begins[name], end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (begins[name], end),
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > _MAX_HEADER_BYTES:
        raise UnsupportedError(
            f"safetensors files have headers of at most {_MAX_HEADER_BYTES:,} bytes; that of "
            f"{len(tensors):,} tensors would have {len(text):,}"
        )
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + begin for name, begin in begins.items()}


def _rank(tensor: SavedTensor) -> tuple[bool, int]:
    return tensor.nbytes % _ALIGNMENT != 0, -tensor.item_bytes


def check_dtypes(tensors: Iterable[SavedTensor]) -> None:
    """Find what no safetensors file can hold.

    Raises:
        UnsupportedError: A dtype that the format does not have.
    """
    for tensor in tensors:
        if tensor.dtype not in _TYPES:
            raise UnsupportedError(f"{tensor.fqn}: safetensors files cannot hold {tensor.dtype}")


def read_header(path: Path) -> bytes:
    """The header of a file with its length prefix, not yet checked.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too short, or its header too long.
    """
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError("no header")
        (length,) = struct.unpack("<Q", prefix)
        if length > _MAX_HEADER_BYTES:
            raise ValueError("absurd header length")
        return prefix + file.read(length)
