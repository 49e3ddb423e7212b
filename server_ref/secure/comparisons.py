"""Comparing secret updates at an aggregator: which reports, once, and what it has said.

``SecretDistances`` has the arithmetic; here is what an aggregator has to keep of it. A report is compared within one
cohort, ever: in two, whoever sees the distances would learn how it lies to the devices of both. What was answered is
kept before it is sent.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from sqlalchemy.engine import Connection

from client_sdk.protocol.field import FieldVector
from client_sdk.protocol.secure import SecureLayout, decode_share
from server_ref.secure import queries
from server_ref.secure.distance_messages import DistanceHeader, DistanceRequest, DistanceShare, ZeroKeys, ZeroKeyShare
from server_ref.secure.distances import SecretDistances
from server_ref.secure.errors import DistancesRefused, UnknownReport
from server_ref.secure.store import AggregatorStore
from server_ref.secure.wire import pack, unpack


class Comparisons:
    """The comparisons of one aggregator.

    Args:
        index: The aggregator's, from 1.
        store: Where reports are kept, and answers before they are sent.
    """

    def __init__(self, index: int, store: AggregatorStore) -> None:
        self._index = index
        self._store = store

    def deal(self, request: DistanceRequest, distances: SecretDistances) -> ZeroKeys:
        """This aggregator's part of the keys for one comparison."""
        with self._store.transaction() as connection:
            self._require_free(connection, request)
        return distances.deal(request)

    def answer(
        self,
        request: DistanceRequest,
        dealt: Sequence[ZeroKeyShare],
        distances: SecretDistances,
        layout: SecureLayout,
    ) -> DistanceShare:
        """This aggregator's masked shares of all distances. Binds the reports to this comparison."""
        name = request.sha256()
        with self._store.transaction() as connection:
            kept = queries.load_comparison(connection, name)
            if kept is None:
                self._require_free(connection, request)
        if kept is None:
            with self._rows(request, layout) as rows:
                made = distances.answer(request, dealt, rows)
            new = self._store.put(pack(made.header, [made.payload]))
            with self._store.transaction() as connection:
                kept = queries.load_comparison(connection, name)
                if kept is None:
                    self._require_free(connection, request)
                    queries.mark_reports(connection, [ref.report_id for ref in request.reports], compared=name)
                    queries.save_comparison(connection, name, new)
                    kept = new
        header, (payload,) = unpack(DistanceHeader, self._store.get(kept))
        return DistanceShare(header, bytes(payload))

    @staticmethod
    def _require_free(connection: Connection, request: DistanceRequest) -> None:
        known = queries.load_reports(connection, [ref.report_id for ref in request.reports])
        for ref in request.reports:
            report = known.get(ref.report_id)
            if report is None or report.digest != ref.digest or not report.kept:
                raise UnknownReport(f"this aggregator keeps no such share of report {ref.report_id}")
            if report.compared not in {None, request.sha256()}:
                raise DistancesRefused(f"report {ref.report_id} was compared before, within another cohort")

    @contextmanager
    def _rows(self, request: DistanceRequest, layout: SecureLayout) -> Iterator[list[FieldVector]]:
        """The shares in the request's order, in a file that is mapped: they need not fit into memory together."""
        count = len(request.reports)
        shape = (count, *layout.scheme.field.empty(layout.share_length).shape)
        with tempfile.TemporaryFile() as file:
            rows = np.memmap(file, np.uint64, "w+", shape=shape)
            for row, ref in zip(rows, request.reports, strict=True):
                with self._store.transaction() as connection:
                    (report,) = queries.load_reports(connection, [ref.report_id], shares=True).values()
                row[...] = decode_share(bytes(self._store.get_share(report)), layout, self._index)
            yield list(rows)
