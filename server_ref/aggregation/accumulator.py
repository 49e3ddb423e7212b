"""What all accumulators have in common: the protocol, the budget of counts and weights, the bytes' header."""

from __future__ import annotations

import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import BudgetExceeded, MalformedFrame, ShapeMismatch, TruncatedFrame

Update_contra = TypeVar("Update_contra", bound=np.generic, contravariant=True)


class Accumulator(Protocol[Update_contra]):
    """A weighted mean that is exact, mergeable and independent of order.

    Updates are C-contiguous vectors of one dtype and ``size`` elements; weights are integers from 1 to a bound. What is
    refused changes nothing: the accumulator's bytes are those from before the call. An instance is used by one thread
    at a time, and the updates it is given must not change during the call.
    """

    @property
    def size(self) -> int:
        """Number of coordinates."""
        ...

    @property
    def count(self) -> int:
        """Number of updates folded so far."""
        ...

    @property
    def total_weight(self) -> int:
        """Sum of their weights."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory that hold the sum; does not depend on ``count``."""
        ...

    def add(self, update: npt.NDArray[Update_contra], weight: int) -> None:
        """Fold one update.

        Raises:
            ShapeMismatch: Wrong dtype or length.
            NonFiniteUpdate: NaN or infinities.
            UpdateOutOfRange: A value beyond the declared bound.
            BudgetExceeded: One addend too many, or a weight out of bounds.
        """
        ...

    def add_many(
        self, updates: Sequence[npt.NDArray[Update_contra]] | npt.NDArray[Update_contra], weights: Sequence[int]
    ) -> None:
        """Fold several updates at once: the same bits as one ``add`` after the other, several times faster.

        Args:
            updates: Separate vectors, or the rows of a matrix; nothing is copied.
            weights: One for each.

        Raises:
            ShapeMismatch: Wrong dtype or length, or not one weight for each update.
            NonFiniteUpdate: NaN or infinities; the message names the position.
            UpdateOutOfRange: A value beyond the declared bound.
            BudgetExceeded: Too many addends, or a weight out of bounds.
        """
        ...

    def merge(self, other: Self) -> None:
        """Fold everything that ``other`` holds; ``other`` stays as it is.

        Raises:
            ConfigurationError: Other bounds.
            ShapeMismatch: Another size.
            BudgetExceeded: Too many addends in all.
        """
        ...

    def subtract(self, other: Self) -> None:
        """Take out everything that ``other`` holds, all of which was folded into this one before.

        The bytes are then those of an accumulator that never had it. ``other`` stays as it is.

        Raises:
            ConfigurationError: Other bounds.
            ShapeMismatch: Another size.
            BudgetExceeded: ``other`` holds more than this one.
        """
        ...

    def result(self, divisor: int | None = None) -> npt.NDArray[np.float64]:
        """The weighted mean: the correctly rounded sum, divided by ``total_weight``.

        Args:
            divisor: A public constant from 1 to 2**53 to divide by instead (a fixed denominator).

        Returns:
            float64[size], a new array.

        Raises:
            EmptyAggregate: Nothing was folded.
        """
        ...

    def result_into(self, out: npt.NDArray[np.float32]) -> None:
        """Write ``result()``, rounded to float32, without an array of that size in between.

        Raises:
            EmptyAggregate: Nothing was folded.
            ShapeMismatch: ``out`` is not float32[size].
        """
        ...

    def to_bytes(self) -> bytes:
        """Canonical encoding: equal bytes if and only if equal bounds, counts and bins."""
        ...

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """The inverse of ``to_bytes``, for bytes from anywhere.

        Raises:
            TruncatedFrame: Fewer bytes than declared.
            MalformedFrame: Anything else that ``to_bytes`` cannot have written.
        """
        ...


@dataclass(frozen=True)
class Tally:
    """How much is in an accumulator, against its budget."""

    count: int = 0
    total_weight: int = 0

    def admit(self, weights: Sequence[int], *, max_weight: int, max_count: int) -> Tally:
        """The tally after these addends.

        Raises:
            BudgetExceeded: One addend too many, or a weight out of bounds.
        """
        for weight in weights:
            if not 1 <= operator.index(weight) <= max_weight:
                raise BudgetExceeded(f"a weight of {weight}; this sum declares weights from 1 to {max_weight}")
        return self.plus(Tally(len(weights), sum(map(operator.index, weights))), max_count=max_count)

    def plus(self, other: Tally, *, max_count: int) -> Tally:
        """The tally of both.

        Raises:
            BudgetExceeded: Too many addends in all.
        """
        count = self.count + other.count
        if count > max_count:
            raise BudgetExceeded(f"{count} addends; this sum declares at most {max_count} (raise max_count)")
        return Tally(count, self.total_weight + other.total_weight)

    def minus(self, other: Tally) -> Tally:
        """The tally without the other's addends.

        Raises:
            BudgetExceeded: The other has more than this one.
        """
        left = Tally(self.count - other.count, self.total_weight - other.total_weight)
        # Every addend left weighs at least 1.
        if left.count < 0 or left.total_weight < left.count or (left.count == 0 and left.total_weight):
            raise BudgetExceeded(
                f"{other.count} addends of weight {other.total_weight} are not among {self.count} of weight "
                f"{self.total_weight}"
            )
        return left


def vectors_of(
    updates: Sequence[npt.NDArray[Update_contra]] | npt.NDArray[Update_contra],
    weights: Sequence[int],
    size: int,
    dtype: type[Update_contra],
) -> list[npt.NDArray[Update_contra]]:
    """The updates as aligned, C-contiguous vectors; copies only what is neither.

    Raises:
        ShapeMismatch: Wrong dtype or length, or not one weight for each update.
    """
    if len(updates) != len(weights):
        raise ShapeMismatch(f"{len(updates)} updates with {len(weights)} weights")
    for i, update in enumerate(updates):
        if update.dtype != dtype or update.shape != (size,):
            raise ShapeMismatch(
                f"update {i} is {update.dtype}{list(update.shape)}; this sum takes {np.dtype(dtype)}[{size}]"
            )
    return [
        update if update.flags.c_contiguous and update.flags.aligned else np.require(update, requirements=("C", "A"))
        for update in updates
    ]


def addresses_of(vectors: Sequence[npt.NDArray[np.generic]], *, multiple_of: int = 1) -> npt.NDArray[np.uint64]:
    """Where each vector's data begins, the last one repeated up to a multiple; valid while they are referenced."""
    addresses = [v.__array_interface__["data"][0] for v in vectors]
    return np.array(addresses + addresses[-1:] * (-len(vectors) % multiple_of), np.uint64)


@dataclass(frozen=True)
class Header:
    """The fixed part of an accumulator's bytes: what it is, its bounds, its counts. All little-endian."""

    MAGIC: ClassVar[bytes] = b"PFAC"
    VERSION: ClassVar[int] = 1
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<4sHBB5Q2d3h2x")

    kind: int
    parameter: int
    """Bins of a float accumulator, fraction bits of a fixed-point one."""
    size: int
    count: int
    total_weight: int
    max_weight: int
    max_count: int
    max_abs: float
    resolution: float
    grid_exponents: tuple[int, ...] = ()

    def pack(self) -> bytes:
        """``LAYOUT.size`` bytes."""
        return self.LAYOUT.pack(
            self.MAGIC,
            self.VERSION,
            self.kind,
            self.parameter,
            self.size,
            self.count,
            self.total_weight,
            self.max_weight,
            self.max_count,
            self.max_abs,
            self.resolution,
            *self.grid_exponents,
            *(0,) * (3 - len(self.grid_exponents)),
        )

    @classmethod
    def read(cls, data: bytes | bytearray | memoryview, *, kind: int) -> Header:
        """The header in front of ``data``. Its fields are not checked against anything yet.

        Raises:
            TruncatedFrame: Too short for a header.
            MalformedFrame: Another format, version or kind.
        """
        view = memoryview(data).cast("B")
        if len(view) < cls.LAYOUT.size:
            raise TruncatedFrame(f"{len(view)} bytes cannot hold an accumulator's header")
        magic, version, found, parameter, *fields = cls.LAYOUT.unpack(view[: cls.LAYOUT.size])
        if (magic, version, found) != (cls.MAGIC, cls.VERSION, kind):
            raise MalformedFrame(f"not an accumulator of kind {kind} in format version {cls.VERSION}")
        size, count, total_weight, max_weight, max_count, max_abs, resolution, *grid_exponents = fields
        return cls(
            kind=found,
            parameter=parameter,
            size=size,
            count=count,
            total_weight=total_weight,
            max_weight=max_weight,
            max_count=max_count,
            max_abs=max_abs,
            resolution=resolution,
            grid_exponents=tuple(grid_exponents),
        )

    @property
    def tally(self) -> Tally:
        """The counts."""
        return Tally(self.count, self.total_weight)

    def payload_of(self, data: bytes | bytearray | memoryview, num_bytes: int) -> memoryview:
        """What follows this header in ``data``, checked before anything of that size is allocated.

        Args:
            data: Bytes that must begin with exactly this header.
            num_bytes: How many must follow.

        Raises:
            TruncatedFrame: Fewer bytes follow.
            MalformedFrame: More bytes follow, the header differs, or its counts do not fit its bounds.
        """
        view = memoryview(data).cast("B")
        if view[: self.LAYOUT.size] != self.pack():
            raise MalformedFrame("the accumulator's header is not in canonical form")
        if not (self.count <= self.max_count and self.count <= self.total_weight <= self.count * self.max_weight):
            raise MalformedFrame(
                f"{self.count} addends with a total weight of {self.total_weight} do not fit the declared bounds"
            )
        payload = view[self.LAYOUT.size :]
        if len(payload) < num_bytes:
            raise TruncatedFrame(f"the accumulator declares {num_bytes} bytes of sums, {len(payload)} are there")
        if len(payload) > num_bytes:
            raise MalformedFrame(f"{len(payload) - num_bytes} bytes follow the accumulator's sums")
        return payload
