"""Distances between secret updates, so that Krum selects among them exactly what it would select in the clear.

Each aggregator computes ``sum_l ([x_i]_l - [x_j]_l)^2`` on its own shares, for every pair. That is its share of the
squared distance on a polynomial of degree 2(t - 1); 2t - 1 answers open it. A fresh share of zero of that degree
(``zero_sharing``) is added to each, so that nothing but the distance is opened. Distances are integers and exact, so
the selection is the plaintext one on the same codes, bit for bit.

Two operations, relayed by the coordinator like all others:

1. ``SecretDistances.deal``: keys for shares of zero, sealed to the aggregators that have them in common, signed;
2. ``SecretDistances.answer``: the masked shares of all distances.

Both are pure: the same request gives the same keys and shares, also after a restart. What the aggregator has to keep is
which request a report was compared in: it is compared with one cohort, once (``DistanceRequest.sha256``).

Source: J. So, B. Guler, A. S. Avestimehr, "Byzantine-Resilient Secure Federated Learning" (BREA), IEEE JSAC 2021.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from client_sdk.protocol.errors import ConfigurationError, ShapeMismatch
from client_sdk.protocol.field import Field
from client_sdk.protocol.mersenne import FieldVector
from client_sdk.protocol.shamir import Scheme
from server_ref.aggregation.blocks import run_parts
from server_ref.secure.distance_messages import (
    DistanceHeader,
    DistanceRequest,
    DistanceShare,
    ZeroKeys,
    ZeroKeyShare,
)
from server_ref.secure.distance_rules import DistanceSettings
from server_ref.secure.errors import CohortTooSmall, DistancesRefused
from server_ref.secure.identity import AggregatorConfig, AggregatorKeys
from server_ref.secure.messages import UNSIGNED
from server_ref.secure.parameters import CheckingMode, PinnedParameters
from server_ref.secure.zero_keys import ZeroKeyDealer
from server_ref.secure.zero_sharing import fingerprint, held_by, key_holders, zero_shares

_COLUMNS: Final = 8192
"""Of a two-limb difference at a time."""


def distance_settings(parameters: PinnedParameters) -> DistanceSettings:
    """The settings of a task's distances, or the refusal.

    Raises:
        ConfigurationError, BudgetExceeded: See ``DistanceSettings``; or the clip norm is not fixed.
    """
    if parameters.indicator:
        raise ConfigurationError(
            "adaptive clipping moves the norm bound from release to release, and distances need a fixed one; choose one"
        )
    return DistanceSettings(
        num_aggregators=parameters.num_aggregators,
        threshold=parameters.threshold,
        field=Field.by_name(parameters.field),
        bounds=parameters.bounds,
        packing=parameters.packing,
        range_checked=parameters.checking is CheckingMode.PROJECTIONS,
        private=parameters.privacy is not None,
    )


class SecretDistances:
    """What one aggregator does to compare secret updates.

    Args:
        config: Its configuration, with the others' pinned keys.
        keys: Its private keys. Keys for shares of zero are derived from them.
        task_id: The task that it serves.
        size: Update coordinates that a device shares; what else a share holds is not compared.

    Raises:
        ConfigurationError: Distances cannot be had with these parameters; the message says what to change.
        BudgetExceeded: They could wrap around the field.
    """

    def __init__(self, config: AggregatorConfig, keys: AggregatorKeys, task_id: str, size: int) -> None:
        self._settings = distance_settings(config.parameters)
        self._config = config
        self._keys = keys
        self._task_id = task_id
        self._size = size
        self._scheme = Scheme(config.parameters.threshold, config.parameters.num_aggregators, self._settings.field)
        self._subsets = key_holders(self._scheme)
        self._dealer = ZeroKeyDealer(config, keys, task_id, self._scheme)

    def __repr__(self) -> str:
        return f"SecretDistances(aggregator {self._config.index})"

    def deal(self, request: DistanceRequest) -> ZeroKeys:
        """This aggregator's part of the keys for one comparison; the same keys whenever it is asked.

        Raises:
            DistancesRefused, CohortTooSmall: The reports are not compared here.
        """
        self._require(request)
        return self._dealer.deal(request.sha256())

    def answer(
        self, request: DistanceRequest, dealt: Sequence[ZeroKeyShare], rows: Sequence[FieldVector]
    ) -> DistanceShare:
        """This aggregator's masked shares of all distances.

        Args:
            request: Which reports.
            dealt: The keys for this aggregator, of every dealer that has some for it.
            rows: This aggregator's share of each report, in the request's order; memory maps will do, they are read
                block by block.

        Raises:
            DistancesRefused, CohortTooSmall: The reports are not compared here.
            ZeroKeyRejected: A dealer's keys are missing, forged, or of another comparison.
            ShapeMismatch: Another number of rows, or shorter ones.
        """
        self._require(request)
        if len(rows) != len(request.reports):
            raise ShapeMismatch(f"{len(rows)} shares for {len(request.reports)} reports")
        keys = self._dealer.collect(request.sha256(), dealt)
        me, field = self._config.index, self._scheme.field
        shares = squared_distances(rows, self._size, field)
        masked = field.add(shares, zero_shares(keys, me, self._scheme, request.num_pairs))
        payload = field.to_bytes(masked)
        header = DistanceHeader(
            index=me,
            request_sha256=request.sha256(),
            key_fingerprints=tuple(fingerprint(keys[s]) for s in held_by(me, self._subsets)),
            payload_sha256=hashlib.sha256(payload).hexdigest(),
            signature=UNSIGNED,
        )
        return DistanceShare(self._keys.sign(header), payload)

    def _require(self, request: DistanceRequest) -> None:
        if request.task_id != self._task_id:
            raise DistancesRefused(f"the aggregator serves task {self._task_id}, not {request.task_id}")
        least = self._config.parameters.min_cohort
        if len(request.reports) < least:
            raise CohortTooSmall(f"{len(request.reports)} reports are fewer than the minimum of {least}")


def squared_distances(rows: Sequence[FieldVector], size: int, field: Field) -> FieldVector:
    """Squared L2 distances of all pairs of vectors, modulo p, over their first ``size`` coordinates.

    Args:
        rows: Contiguous vectors of the field, ``size`` elements or more each; at least two.
        size: How many coordinates count.
        field: Theirs. 2^61 - 1 takes 1.4 ns a coordinate and pair; 2^127 - 1, whose differences numpy makes, some
            fifteen times as long.

    Returns:
        One element a pair: (0, 1), (0, 2), ..., (n - 2, n - 1).

    Raises:
        ShapeMismatch: Fewer rows, or one that is shorter, not contiguous, or no vector of this field.
    """
    if len(rows) < 2:
        raise ShapeMismatch(f"the distances of {len(rows)} vectors")
    for row in rows:
        if row.dtype != np.uint64 or row.shape[1:] != (2,) * (field.limbs - 1) or not row.flags.c_contiguous:
            raise ShapeMismatch(f"a share to be compared is a contiguous vector of {field.name}")
        if len(row) < size:
            raise ShapeMismatch(f"a share of {len(row)} elements does not hold an update of {size}")
    if field.limbs > 1:
        return _distances_wide(rows, size, field)
    from server_ref.secure.distance_kernels import TILE, add_tile  # noqa: PLC0415 - compiles or loads the kernel

    n = len(rows)
    addresses = np.array([row.ctypes.data for row in rows], np.uint64)
    square = np.zeros((n, n), np.uint64)
    corners = [(i, j) for i in range(0, n, TILE) for j in range(i, n, TILE)]

    def work(part: int) -> None:
        i, j = corners[part]
        add_tile(addresses, size, i, min(i + TILE, n), j, min(j + TILE, n), square)

    run_parts(work, len(corners), elements=size * n * n // 2)
    return square[np.triu_indices(n, 1)]


def _distances_wide(rows: Sequence[FieldVector], size: int, field: Field) -> FieldVector:
    from server_ref.secure.sums import KERNELS  # noqa: PLC0415 - compiles or loads the kernels

    totals = [0] * (len(rows) * (len(rows) - 1) // 2)
    for start in range(0, size, _COLUMNS):
        part = slice(start, min(start + _COLUMNS, size))
        for pair, (x, y) in enumerate(_pairs(rows)):
            difference = field.subtract(x[part], y[part])
            totals[pair] += KERNELS.inner(difference, difference, field)
    return field.from_ints(totals)


def _pairs(rows: Sequence[FieldVector]) -> Iterator[tuple[FieldVector, FieldVector]]:
    return ((x, rows[j]) for i, x in enumerate(rows) for j in range(i + 1, len(rows)))
