"""Opening the projections and norms of a challenge, at the coordinator: which updates are as short as they claim."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from client_sdk.protocol.errors import InvalidUpdate
from client_sdk.protocol.field import FieldVector
from client_sdk.protocol.shamir import NUMPY_KERNELS, Scheme, lagrange_weights, reconstruct
from server_ref.secure.errors import AnswerRejected, NotEnoughAggregators, ProjectionsInconsistent
from server_ref.secure.projection_messages import ProjectionShare
from server_ref.secure.projections import ROWS, ProjectionSettings
from server_ref.secure.zero_sharing import Subset, held_by, key_holders


def judge_projections(
    transcript_sha256: str,
    num_reports: int,
    answers: Sequence[ProjectionShare],
    settings: ProjectionSettings,
    signed: Callable[[int, bytes, str], bool],
) -> tuple[bool, ...]:
    """Which reports of a challenge are accepted, in its order.

    A report whose shares do not belong together is not accepted, nor is one that is too long. An aggregator that
    answers wrongly can have any report refused, and with no more than 2t - 1 answers it can have a norm accepted that
    is too large: what it says of norms is not checked by the others then.

    Args:
        transcript_sha256: Of the challenge.
        num_reports: In it.
        answers: Of distinct aggregators, 2t - 1 or more.
        settings: Of the task.
        signed: Whether an aggregator's pinned key made a signature: ``AggregatorConfig.signed``.

    Raises:
        NotEnoughAggregators: Fewer than 2t - 1.
        AnswerRejected: An answer is not authentic, is about another challenge, or comes twice.
        ProjectionsInconsistent: The holders of a zero key used different ones.
    """
    scheme = Scheme(settings.threshold, settings.num_aggregators, settings.field)
    shares: dict[int, FieldVector] = {}
    for answer in answers:
        if answer.header.index in shares:
            raise AnswerRejected(f"aggregator {answer.header.index} answered twice")
        shares[answer.header.index] = _checked(transcript_sha256, num_reports, answer, settings, signed)
    _require_one_key_each(answers, scheme)
    if len(shares) < settings.needed:
        raise NotEnoughAggregators(
            f"norms need {settings.needed} answers, {len(shares)} are here",
            stage="projections",
            needed=settings.needed,
            live=tuple(sorted(shares)),
        )
    linear = {index: share[: num_reports * ROWS] for index, share in shares.items()}
    norms = {index: share[num_reports * ROWS :] for index, share in shares.items()}
    wide = Scheme(settings.needed, settings.num_aggregators, settings.field)
    together = _on_polynomials(linear, scheme).reshape(num_reports, ROWS).all(axis=1) & _on_polynomials(norms, wide)
    opened = settings.field.to_ints(reconstruct(linear, scheme, num_reports * ROWS))
    projections = [settings.field.centred(value) for value in opened]
    squares = settings.field.to_ints(reconstruct(norms, wide, num_reports))
    return tuple(
        bool(sound) and settings.accepts(projections[i * ROWS : (i + 1) * ROWS], squares[i])
        for i, sound in enumerate(together)
    )


def _on_polynomials(shares: Mapping[int, FieldVector], scheme: Scheme) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """For each element, whether the shares lie on one polynomial of the scheme's degree."""
    points = sorted(shares)
    first = points[: scheme.needed]
    sound = np.ones(len(shares[points[0]]), np.bool_)
    for point in points[scheme.needed :]:
        expected = NUMPY_KERNELS.interpolate([shares[i] for i in first], lagrange_weights(first, point), scheme.field)
        sound &= np.equal(expected, shares[point]).reshape(len(sound), -1).all(axis=1)
    return sound


def _checked(
    transcript_sha256: str,
    num_reports: int,
    answer: ProjectionShare,
    settings: ProjectionSettings,
    signed: Callable[[int, bytes, str], bool],
) -> FieldVector:
    header = answer.header
    if header.index > settings.num_aggregators or not signed(header.index, header.signed_bytes(), header.signature):
        raise AnswerRejected(f"the projections of aggregator {header.index} are not signed by its pinned key")
    if header.transcript_sha256 != transcript_sha256:
        raise AnswerRejected(f"aggregator {header.index} answered another challenge")
    if hashlib.sha256(answer.payload).hexdigest() != header.payload_sha256:
        raise AnswerRejected(f"the projections of aggregator {header.index} are not those that it signed")
    try:
        return settings.field.from_bytes(answer.payload, num_reports * (ROWS + 1))
    except InvalidUpdate as e:
        raise AnswerRejected(f"the projections of aggregator {header.index} are no field elements") from e


def _require_one_key_each(answers: Sequence[ProjectionShare], scheme: Scheme) -> None:
    fingerprints: dict[Subset, str] = {}
    subsets = key_holders(scheme)
    for answer in answers:
        held = held_by(answer.header.index, subsets)
        if len(answer.header.key_fingerprints) != len(held):
            raise AnswerRejected(f"aggregator {answer.header.index} names another number of keys than it has")
        for subset, seen in zip(held, answer.header.key_fingerprints, strict=True):
            if fingerprints.setdefault(subset, seen) != seen:
                raise ProjectionsInconsistent(f"aggregators {list(subset)} were dealt different keys by {subset[0]}")
