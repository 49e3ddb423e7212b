"""The compiled inner loop of all pairwise distances: squared differences of four rows with four others.

**Differences, not a Gram matrix.** ``||x||^2 + ||y||^2 - 2xy`` cancels: one row of huge values (or a common offset)
takes all digits of the honest rows' distances, whatever the rows are centred at, and that is a choice of the
attacker's. ``sum (x - y)^2`` has no negative term, so a distance is right to 1e-13 of itself whatever the other rows
are. Half the pairs are enough, so it costs what a full matrix product does.

**Tiles.** Rows are widened to float64 and interleaved, ``LANES`` columns of ``TILE`` rows at a time; 16 sums of
``LANES`` lanes stay in registers. Operations, their order and so the bits do not depend on where in the matrix a pair
is, nor on the processor: the vectors are written out here instead of being left to the optimiser.
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

LANES = 4
"""Columns in a vector."""

_I32, _I64, _DOUBLE = ir.IntType(32), ir.IntType(64), ir.DoubleType()
_VECTOR = ir.VectorType(_DOUBLE, LANES)


def _sum_of_lanes(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """``(v0 + v2) + (v1 + v3)``."""
    width = LANES
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


@intrinsic
def _add_squared_differences(_context: Any, _a: Any, _b: Any, _steps: Any, _sums: Any) -> Any:  # noqa: ANN401 - numba's intrinsics have no type
    """``sums[i, j] += sum over columns of (a[i] - b[j])^2``, all given as addresses of interleaved vectors."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:  # noqa: ANN401 - as above
        a, b, steps, sums = args
        name = f"llvm.fma.v{LANES}f64"
        fma = builder.module.globals.get(name) or ir.Function(
            builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), name
        )
        a, b = (builder.inttoptr(address, _VECTOR.as_pointer()) for address in (a, b))
        sums = builder.inttoptr(sums, _DOUBLE.as_pointer())

        before = builder.block
        loop = builder.function.append_basic_block("columns")
        after = builder.function.append_basic_block("columns.done")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(_I64)
        step.add_incoming(ir.Constant(_I64, 0), before)
        partial = [builder.phi(_VECTOR) for _ in range(TILE * TILE)]
        for phi in partial:
            phi.add_incoming(ir.Constant(_VECTOR, None), before)

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


@njit(nogil=True)
def _interleave(row: npt.NDArray[np.float64], steps: int, packed: npt.NDArray[np.float64]) -> None:
    """Copy the row's vectors to every ``TILE``-th vector of ``packed``."""
    # Unsigned indices need no check for negative ones, and loading all lanes before storing any leaves no doubt that
    # they do not overlap: only so does this become a load and a store of a vector.
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
    for step in range(np.uint64(steps)):
        source = step * np.uint64(LANES)
        a, b, c, d = row[source], row[source + one], row[source + two], row[source + three]
        to = step * np.uint64(TILE * LANES)
        packed[to] = a
        packed[to + one] = b
        packed[to + two] = c
        packed[to + three] = d


@njit("void(uint64[::1], boolean, int64, int64, int64, int64, int32[:, ::1], float64[:, ::1])", cache=True, nogil=True)
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
    """Add the squared differences in the columns ``first <= c < last`` to the sums of the given tiles.

    Args:
        addresses: Where each row begins.
        wide: Whether the rows are float64; float32 otherwise.
        size: Columns in all.
        first: First column.
        last: One past the last column.
        columns: Columns at a time, a multiple of ``LANES``.
        tiles: Pairs of groups of ``TILE`` rows: (g, h) stands for the rows from ``TILE * g`` and from ``TILE * h``.
        sums: float64[tiles, TILE * TILE]; entries of rows beyond the last are of no meaning.
    """
    n = addresses.size
    groups = (n + TILE - 1) // TILE
    # Aligned by hand to what a vector load likes best; rows beyond the last stay 0.
    room = np.zeros(groups * TILE * columns + 8)
    base = (np.uint64(room.ctypes.data) + np.uint64(63)) // np.uint64(64) * np.uint64(64)
    packed = room[np.int64((base - np.uint64(room.ctypes.data)) // np.uint64(8)) :]
    row = np.empty(columns)
    group_bytes = np.uint64(TILE * columns * 8)
    for start in range(first, last, columns):
        width = min(columns, last - start)
        row[width:] = 0.0
        steps = (width + LANES - 1) // LANES
        for i in range(n):
            load(addresses[i], wide, size, start, row[:width])
            _interleave(row, steps, packed[(i // TILE) * TILE * columns + (i % TILE) * LANES :])
        for t in range(tiles.shape[0]):
            _add_squared_differences(  # type: ignore[call-arg]  # numba gives an intrinsic's first argument itself
                base + np.uint64(tiles[t, 0]) * group_bytes,
                base + np.uint64(tiles[t, 1]) * group_bytes,
                steps,
                np.uint64(sums[t].ctypes.data),
            )
