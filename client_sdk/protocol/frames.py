"""The one binary frame: a canonical subset of the safetensors format.

Layout: 8 bytes little-endian header length, the JSON header padded with spaces to a multiple of 8, the tensors' bytes
back to back. Any safetensors reader opens it. What is stricter here: *one* encoding per content. Tensors lie in
header order without gaps, the header is the compact JSON that ``encode_frame`` writes, nothing follows the data.
``decode_frame`` re-encodes the parsed header and compares bytes, so duplicate keys, odd spacing, floats for ints and
reordered keys are all refused by one rule, and a content hash identifies a content.

Decoding copies nothing: tensors are read-only views into the input.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import MalformedFrame, OversizedBody, TruncatedFrame

_LENGTH_BYTES = 8
_ALIGNMENT = 8
_METADATA = "__metadata__"
_DTYPES: Mapping[str, np.dtype[np.generic]] = MappingProxyType(
    {
        "F32": np.dtype("<f4"),
        "F64": np.dtype("<f8"),
        "I64": np.dtype("<i8"),
        "U8": np.dtype("u1"),
    }
)
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class FrameLimits:
    """Bounds checked before anything is allocated or parsed."""

    max_bytes: int = 2**31
    max_header_bytes: int = 2**20
    max_tensors: int = 10_000
    max_name_chars: int = 256
    max_dims: int = 8


DEFAULT_LIMITS = FrameLimits()


@dataclass(frozen=True)
class Frame:
    """A decoded frame.

    Attributes:
        tensors: Name -> read-only array, in the order of the bytes.
        metadata: Free-form strings.
        payload: The data section, all tensors back to back.
    """

    tensors: dict[str, npt.NDArray[np.generic]]
    metadata: dict[str, str]
    payload: memoryview


def _header(entries: list[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Canonical header of (name, dtype name, shape) entries, padded to the alignment."""
    for text in (*(name for name, _, _ in entries), *metadata, *metadata.values()):
        _check_text(text)
    header: dict[str, object] = {}
    if metadata:
        header[_METADATA] = {k: metadata[k] for k in sorted(metadata)}
    offset = 0
    for name, dtype, shape in entries:
        end = offset + math.prod(shape) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    return raw + b" " * (-len(raw) % _ALIGNMENT)


def _check_text(text: str) -> None:
    """Refuse half a surrogate pair: JSON can escape it, but no UTF-8 string can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise MalformedFrame("a name or metadata text is not Unicode") from e


def encode_frame(tensors: Mapping[str, npt.NDArray[np.generic]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Encode named tensors in the given order.

    Args:
        tensors: Name -> array of dtype float32, float64, int64 or uint8, any shape; made C-contiguous.
        metadata: Free-form strings, written in key order.

    Returns:
        The canonical bytes.

    Raises:
        MalformedFrame: A dtype that frames do not carry, a reserved name, or text that is not Unicode.
    """
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    chunks: list[memoryview] = []
    for name, tensor in tensors.items():
        dtype = _NAMES.get(tensor.dtype.newbyteorder("<"))
        if dtype is None or name == _METADATA:
            raise MalformedFrame(f"tensor {name!r} of dtype {tensor.dtype} cannot be framed")
        entries.append((name, dtype, tensor.shape))
        # Views, so that the join makes the only copy.
        chunks.append(np.ascontiguousarray(tensor, dtype=_DTYPES[dtype]).reshape(-1).view(np.uint8).data)
    header = _header(entries, metadata or {})
    return b"".join([len(header).to_bytes(_LENGTH_BYTES, "little"), header, *chunks])


def decode_frame(data: bytes | bytearray | memoryview, limits: FrameLimits = DEFAULT_LIMITS) -> Frame:
    """Decode a frame strictly; the inverse of ``encode_frame``.

    Raises:
        TruncatedFrame: Shorter than it declares.
        OversizedBody: Beyond ``limits``.
        MalformedFrame: Not the canonical encoding of anything.
    """
    view = memoryview(data).cast("B").toreadonly()
    if len(view) > limits.max_bytes:
        raise OversizedBody(f"the frame has {len(view)} bytes; at most {limits.max_bytes} are accepted")
    if len(view) < _LENGTH_BYTES:
        raise TruncatedFrame(f"{len(view)} bytes cannot hold a frame's header length")
    header_len = int.from_bytes(view[:_LENGTH_BYTES], "little")
    if header_len > limits.max_header_bytes:
        raise OversizedBody(f"the frame's header declares {header_len} bytes; at most {limits.max_header_bytes}")
    start = _LENGTH_BYTES + header_len
    if len(view) < start:
        raise TruncatedFrame(f"the header declares {header_len} bytes, {len(view) - _LENGTH_BYTES} are there")
    raw = bytes(view[_LENGTH_BYTES:start])
    entries, metadata = _parse_header(raw, limits)
    payload = view[start:]
    needed = sum(math.prod(shape) * _DTYPES[dtype].itemsize for _, dtype, shape in entries)
    if needed > limits.max_bytes:
        raise OversizedBody(f"the frame declares {needed} bytes of tensors; at most {limits.max_bytes}")
    if len(payload) < needed:
        raise TruncatedFrame(f"the frame declares {needed} bytes of tensors, {len(payload)} are there")
    if len(payload) > needed:
        raise MalformedFrame(f"{len(payload) - needed} bytes follow the last tensor")
    # One rule for every way to write the same header differently.
    if _header(entries, metadata) != raw:
        raise MalformedFrame("the header is not in canonical form")
    tensors: dict[str, npt.NDArray[np.generic]] = {}
    offset = 0
    for name, dtype, shape in entries:
        count = math.prod(shape)
        tensors[name] = np.frombuffer(payload, _DTYPES[dtype], count, offset).reshape(shape)
        offset += count * _DTYPES[dtype].itemsize
    return Frame(tensors, metadata, payload)


def _parse_header(raw: bytes, limits: FrameLimits) -> tuple[list[tuple[str, str, tuple[int, ...]]], dict[str, str]]:
    try:
        header = json.loads(raw.decode("ascii"))
    except (ValueError, RecursionError) as e:
        raise MalformedFrame("the header is not ASCII JSON") from e
    if not isinstance(header, dict):
        raise MalformedFrame("the header is not a JSON object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MalformedFrame("the header's metadata is not a map of strings")
    if len(header) > limits.max_tensors:
        raise OversizedBody(f"the frame declares {len(header)} tensors; at most {limits.max_tensors}")
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    for name, entry in header.items():
        if len(name) > limits.max_name_chars:
            raise OversizedBody(f"a tensor's name has {len(name)} characters; at most {limits.max_name_chars}")
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise MalformedFrame(f"tensor {name!r} is not described by dtype, shape and data_offsets")
        dtype, shape = entry["dtype"], entry["shape"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise MalformedFrame(f"tensor {name!r} has a dtype that frames do not carry")
        if (
            not isinstance(shape, list)
            or len(shape) > limits.max_dims
            or not all(type(s) is int and 0 <= s <= limits.max_bytes for s in shape)
        ):
            raise MalformedFrame(f"tensor {name!r} has an impossible shape")
        entries.append((name, dtype, tuple(shape)))
    return entries, metadata
