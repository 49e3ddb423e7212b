"""The library of the sharing kernels: its signatures, addresses of arrays, and statuses turned into typed errors.

``ctypes.CDLL`` releases the GIL for the whole of every call.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt

from client_sdk.protocol.errors import MalformedShare, RuntimeUnavailable, UpdateOutOfRange

ABI_VERSION: Final = 1

OK: Final = 0
_NOT_CANONICAL: Final = 2
_OUT_OF_RANGE: Final = 4


def load_library(path: Path) -> ctypes.CDLL:
    """The library in a file, its signatures declared.

    Raises:
        RuntimeUnavailable: It cannot be loaded, or is another library.
    """
    if sys.byteorder == "big":
        raise RuntimeUnavailable("the native sharing kernels are made for little-endian processors")
    try:
        lib = ctypes.CDLL(str(path))
        found = int(lib.pfs_abi_version())
    except (OSError, AttributeError) as e:
        raise RuntimeUnavailable(
            f"the native sharing kernels {path} cannot be loaded ({e}); delete the file and build it again with "
            "`python -m client_sdk.native.build`"
        ) from e
    if found != ABI_VERSION:
        raise RuntimeUnavailable(f"{path} speaks ABI {found}, this SDK needs {ABI_VERSION}; delete the file")
    field, count, real, pointer = ctypes.c_int32, ctypes.c_uint64, ctypes.c_double, ctypes.c_void_p
    shares: list[type] = [count, pointer, count, pointer, count]
    signatures: dict[str, list[type]] = {
        "pfs_use_variant": [ctypes.c_char_p],
        "pfs_encode": [pointer, count, real, real, pointer, pointer],
        "pfs_lift": [field, pointer, count, pointer],
        "pfs_lower": [field, pointer, count, pointer],
        "pfs_mask": [field, pointer, count, pointer],
        "pfs_split": [field, count, pointer, *shares],
        "pfs_encode_split": [field, count, pointer, real, real, *shares, pointer],
        "pfs_interpolate": [field, count, pointer, pointer, count, pointer],
        "pfs_accumulate": [field, pointer, count, pointer, pointer],
    }
    for function, arguments in signatures.items():
        entry = getattr(lib, function)
        entry.argtypes, entry.restype = arguments, ctypes.c_int32
    lib.pfs_variant.restype = ctypes.c_char_p
    return lib


def address_of(array: npt.NDArray[Any], row: int = 0) -> int:
    """Where a contiguous array, or one of its rows, begins."""
    return int(array.__array_interface__["data"][0]) + row * array.strides[0]


def addresses_of(arrays: Sequence[npt.NDArray[Any]], row: int = 0) -> ctypes.Array[ctypes.c_void_p]:
    """As ``address_of``, as C has an array of pointers."""
    return (ctypes.c_void_p * len(arrays))(*(address_of(array, row) for array in arrays))


def check(status: int) -> None:
    """Raise the typed error that a status stands for, where the arguments were right."""
    if status == _NOT_CANONICAL:
        raise MalformedShare("an element is not below the modulus")
    if status == _OUT_OF_RANGE:
        raise UpdateOutOfRange("an integer lies beyond what the field takes")
    if status != OK:
        raise RuntimeError(f"the native sharing kernels answered with status {status}")
