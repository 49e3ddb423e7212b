"""Opening the distances between secret updates, at the coordinator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from client_sdk.protocol.mersenne import FieldVector
from client_sdk.protocol.shamir import NUMPY_KERNELS, Scheme, lagrange_weights, reconstruct
from server_ref.secure.distance_messages import DistanceRequest, DistanceShare
from server_ref.secure.distance_rules import DistanceSettings
from server_ref.secure.errors import AnswerRejected, DistancesInconsistent, NotEnoughAggregators
from server_ref.secure.zero_sharing import Subset, held_by, key_holders


def open_distances(
    request: DistanceRequest,
    answers: Sequence[DistanceShare],
    settings: DistanceSettings,
    signed: Callable[[int, bytes, str], bool],
) -> list[int]:
    """The squared distances of all pairs, exact.

    Args:
        request: What was asked.
        answers: Of distinct aggregators, 2t - 1 or more. What more there is must agree.
        settings: Of the task.
        signed: Whether an aggregator's pinned key made a signature: ``AggregatorConfig.signed``.

    Returns:
        One integer a pair, in the request's order, in units of ``4**-f``.

    Raises:
        NotEnoughAggregators: Fewer than 2t - 1.
        AnswerRejected: An answer is not authentic, is about another comparison, or comes twice.
        DistancesInconsistent: The holders of a key used different ones, more answers than needed disagree, or a
            distance is larger than updates within their bound can have.
    """
    scheme = Scheme(settings.threshold, settings.num_aggregators, settings.field)
    shares: dict[int, FieldVector] = {}
    fingerprints: dict[Subset, str] = {}
    subsets = key_holders(scheme)
    for answer in answers:
        index = answer.header.index
        if index in shares:
            raise AnswerRejected(f"aggregator {index} answered twice")
        shares[index] = _checked(request, answer, settings, signed)
        held = held_by(index, subsets)
        if len(answer.header.key_fingerprints) != len(held):
            raise AnswerRejected(f"aggregator {index} names another number of keys than it has")
        for subset, seen in zip(held, answer.header.key_fingerprints, strict=True):
            if fingerprints.setdefault(subset, seen) != seen:
                raise DistancesInconsistent(f"aggregators {list(subset)} were dealt different keys by {subset[0]}")
    if len(shares) < settings.needed:
        raise NotEnoughAggregators(
            f"distances need {settings.needed} answers, {len(shares)} are here",
            stage="distances",
            needed=settings.needed,
            live=tuple(sorted(shares)),
        )
    # Of double degree: as shares of a scheme with that threshold.
    wide = Scheme(settings.needed, settings.num_aggregators, settings.field)
    first = sorted(shares)[: settings.needed]
    for index in sorted(shares)[settings.needed :]:
        expected = NUMPY_KERNELS.interpolate([shares[i] for i in first], lagrange_weights(first, index), wide.field)
        if not np.array_equal(expected, shares[index]):
            raise DistancesInconsistent("the answers lie on no polynomial: an aggregator answered wrongly")
    opened = settings.field.to_ints(reconstruct(shares, wide, request.num_pairs))
    too_far = sum(distance > settings.largest for distance in opened)
    if too_far:
        raise DistancesInconsistent(
            f"{too_far} of {len(opened)} distances are larger than two updates within their bound can have: an "
            "aggregator answered wrongly, or a report was not checked"
        )
    return opened


def _checked(
    request: DistanceRequest,
    answer: DistanceShare,
    settings: DistanceSettings,
    signed: Callable[[int, bytes, str], bool],
) -> FieldVector:
    header = answer.header
    if header.index > settings.num_aggregators or not signed(header.index, header.signed_bytes(), header.signature):
        raise AnswerRejected(f"the distances of aggregator {header.index} are not signed by its pinned key")
    if header.request_sha256 != request.sha256():
        raise AnswerRejected(f"aggregator {header.index} answered another comparison")
    if hashlib.sha256(answer.payload).hexdigest() != header.payload_sha256:
        raise AnswerRejected(f"the distances of aggregator {header.index} are not those that it signed")
    return settings.field.from_bytes(answer.payload, request.num_pairs)
