"""The compiled inner loop of all pairwise distances: squared differences of four rows with four others.

**Differences, not a Gram matrix.** ``||x||^2 + ||y||^2 - 2xy`` cancels: one row of huge values (or a common offset)
takes all digits of the honest rows' distances, whatever the rows are centred at, and that is a choice of the
attacker's. ``sum (x - y)^2`` has no negative term, so each distance is right to some digits of itself whatever the
other rows are. Half the pairs are enough, so it costs what a full matrix product does.

**Tiles.** Rows are interleaved, one vector of columns of ``TILE`` rows after the other; the 16 sums of a tile stay in
registers. Operations, their order and so the bits do not depend on where in the matrix a pair is, nor on the processor:
the vectors are written out here instead of being left to the optimiser.

**Two precisions.** ``add_narrow_tiles`` subtracts, squares and adds in float32 within a block of at most 256 columns
(32 additions a lane) and adds the blocks in float64: within ``2**-18`` of each distance, and in practice within 1e-7.
It is for float32 rows and for distances that float32 can hold; ``add_wide_tiles`` does everything in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from server_ref.aggregation.robust.kernels import load

TILE = 4
"""Rows on each side of a tile."""

NARROW_LANES = 8
WIDE_LANES = 4
"""Columns in a vector of float32 and of float64: 32 bytes."""

_ALIGNMENT = 64
_I32, _I64, _DOUBLE = ir.IntType(32), ir.IntType(64), ir.DoubleType()
_SIGNATURE = "void(uint64[::1], boolean, int64, int64, int64, int64, int32[:, ::1], float64[:, ::1])"


def _sum_of_lanes(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """The sum of a vector's lanes in float64: its upper half onto its lower one, and again."""
    width = vector.type.count
    if vector.type.element != _DOUBLE:
        vector = builder.fpext(vector, ir.VectorType(_DOUBLE, width))
    while width > 1:
        width //= 2
        nothing = ir.Constant(vector.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(
                vector, nothing, ir.Constant(ir.VectorType(_I32, width), list(range(start, start + width)))
            )
            for start in (0, width)
        )
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, ir.Constant(_I32, 0))


def _vector_copy(vector: ir.VectorType) -> Any:  # noqa: ANN401 - numba's intrinsics have no type
    """A compiled function that copies one vector from an address to another."""

    def copy(_context: Any, _source: Any, _target: Any) -> Any:  # noqa: ANN401 - as above
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:  # noqa: ANN401 - as above
            source, target = (builder.inttoptr(address, vector.as_pointer()) for address in args)
            builder.store(builder.load(source, align=8), target, align=8)
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64), codegen

    return intrinsic(copy)


def _squared_differences(vector: ir.VectorType, suffix: str) -> Any:  # noqa: ANN401 - as above
    """A compiled function: ``sums[i, j] += sum over columns of (a[i] - b[j])^2``, all given as addresses."""

    def add(_context: Any, _a: Any, _b: Any, _steps: Any, _sums: Any) -> Any:  # noqa: ANN401 - as above
        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:  # noqa: ANN401 - as above
            a, b, steps, sums = args
            name = f"llvm.fma.v{vector.count}{suffix}"
            fma = builder.module.globals.get(name) or ir.Function(
                builder.module, ir.FunctionType(vector, [vector] * 3), name
            )
            a, b = (builder.inttoptr(address, vector.as_pointer()) for address in (a, b))
            sums = builder.inttoptr(sums, _DOUBLE.as_pointer())

            before = builder.block
            loop = builder.function.append_basic_block("columns")
            after = builder.function.append_basic_block("columns.done")
            builder.branch(loop)
            builder.position_at_end(loop)
            step = builder.phi(_I64)
            step.add_incoming(ir.Constant(_I64, 0), before)
            partial = [builder.phi(vector) for _ in range(TILE * TILE)]
            for phi in partial:
                phi.add_incoming(ir.Constant(vector, None), before)

            at = builder.mul(step, ir.Constant(_I64, TILE))

            def row(base: ir.Value, i: int) -> ir.Value:
                return builder.load(builder.gep(base, [builder.add(at, ir.Constant(_I64, i))]), align=8)

            rows_a, rows_b = [row(a, i) for i in range(TILE)], [row(b, j) for j in range(TILE)]
            extended = []
            for i in range(TILE):
                for j in range(TILE):
                    difference = builder.fsub(rows_a[i], rows_b[j])
                    extended.append(builder.call(fma, [difference, difference, partial[i * TILE + j]]))
            following = builder.add(step, ir.Constant(_I64, 1))
            step.add_incoming(following, loop)
            for phi, value in zip(partial, extended, strict=True):
                phi.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)

            builder.position_at_end(after)
            for i, value in enumerate(extended):
                target = builder.gep(sums, [ir.Constant(_I64, i)])
                builder.store(builder.fadd(builder.load(target), _sum_of_lanes(builder, value)), target)
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64, types.int64, types.uint64), codegen

    return intrinsic(add)


def _adder(dtype: type[np.floating[Any]], lanes: int, element: ir.Type, suffix: str) -> Any:  # noqa: ANN401 - as above
    vector = ir.VectorType(element, lanes)
    copy, add = _vector_copy(vector), _squared_differences(vector, suffix)
    item = np.dtype(dtype).itemsize
    vector_bytes = np.uint64(lanes * item)
    room_beside = _ALIGNMENT // item

    @njit(nogil=True)
    def add_tiles(  # noqa: PLR0917 - compiled functions are called by position
        addresses: npt.NDArray[np.uint64],
        wide: bool,
        size: int,
        first: int,
        last: int,
        columns: int,
        tiles: npt.NDArray[np.int32],
        sums: npt.NDArray[np.float64],
    ) -> None:
        n = addresses.size
        groups = (n + TILE - 1) // TILE
        # Aligned by hand to what a vector load likes best; rows beyond the last stay 0.
        packed = np.zeros(groups * TILE * columns + room_beside, dtype)
        unit = np.uint64(_ALIGNMENT)
        base = (np.uint64(packed.ctypes.data) + unit - np.uint64(1)) // unit * unit
        row = np.empty(columns, dtype)
        source = np.uint64(row.ctypes.data)
        group_bytes = np.uint64(TILE * columns * item)
        for start in range(first, last, columns):
            width = min(columns, last - start)
            steps = (width + lanes - 1) // lanes
            row[width:] = 0
            for i in range(n):
                load(addresses[i], wide, size, start, row[:width])
                target = base + np.uint64(i // TILE) * group_bytes + np.uint64(i % TILE) * vector_bytes
                for step in range(np.uint64(steps)):
                    copy(source + step * vector_bytes, target + step * vector_bytes * np.uint64(TILE))
            for t in range(tiles.shape[0]):
                add(
                    base + np.uint64(tiles[t, 0]) * group_bytes,
                    base + np.uint64(tiles[t, 1]) * group_bytes,
                    steps,
                    np.uint64(sums[t].ctypes.data),
                )
            # The addresses above do not keep their arrays alive; reading here does.
            row[0] = packed[0]

    return add_tiles


_add_narrow = _adder(np.float32, NARROW_LANES, ir.FloatType(), "f32")
_add_wide = _adder(np.float64, WIDE_LANES, _DOUBLE, "f64")


@njit(_SIGNATURE, cache=True, nogil=True)
def add_wide_tiles(  # noqa: PLR0917 - compiled functions are called by position
    addresses: npt.NDArray[np.uint64],
    wide: bool,
    size: int,
    first: int,
    last: int,
    columns: int,
    tiles: npt.NDArray[np.int32],
    sums: npt.NDArray[np.float64],
) -> None:
    """Add the squared differences in the columns ``first <= c < last`` to the sums of the given tiles.

    Args:
        addresses: Where each row begins.
        wide: Whether the rows are float64; float32 otherwise.
        size: Columns in all.
        first: First column.
        last: One past the last column.
        columns: Columns at a time, a multiple of the lanes.
        tiles: Pairs of groups of ``TILE`` rows: (g, h) stands for the rows from ``TILE * g`` and from ``TILE * h``.
        sums: float64[tiles, TILE * TILE]; entries of rows beyond the last are of no meaning.
    """
    _add_wide(addresses, wide, size, first, last, columns, tiles, sums)


@njit(_SIGNATURE, cache=True, nogil=True)
def add_narrow_tiles(  # noqa: PLR0917 - compiled functions are called by position
    addresses: npt.NDArray[np.uint64],
    wide: bool,
    size: int,
    first: int,
    last: int,
    columns: int,
    tiles: npt.NDArray[np.int32],
    sums: npt.NDArray[np.float64],
) -> None:
    """As ``add_wide_tiles``, in float32 within each block of columns."""
    _add_narrow(addresses, wide, size, first, last, columns, tiles, sums)
