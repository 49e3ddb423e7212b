"""What aggregators' masked parity values say: which reports' shares do not fit together, and which aggregator lies.

For each report the values of all aggregators lie on one polynomial exactly if its shares do (up to a probability of
1/p). A report whose values do not is left out. But an aggregator could spoil every report this way, so one that alone
explains the contradictions of most reports is left out instead of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import InvalidUpdate
from client_sdk.protocol.field import FieldVector
from client_sdk.protocol.shamir import NUMPY_KERNELS, Scheme, lagrange_weights
from server_ref.secure.errors import AnswerRejected
from server_ref.secure.identity import PeerKeys, signed_by
from server_ref.secure.messages import CheckAnswer
from server_ref.secure.round_messages import Challenge


@dataclass(frozen=True)
class ParityVerdict:
    """What a challenge showed.

    Attributes:
        bad_reports: Positions (in the challenge) of the reports to leave out.
        liars: Indices of aggregators to leave out instead.
    """

    bad_reports: tuple[int, ...]
    liars: tuple[int, ...]


def read_check(
    answer: CheckAnswer, index: int, challenge: Challenge, scheme: Scheme, peers: Sequence[PeerKeys]
) -> FieldVector:
    """An aggregator's values, one element a report.

    Raises:
        AnswerRejected: Not signed by the pinned key, about another challenge, or no field elements.
    """
    count = len(challenge.request.reports)
    transcript = None if challenge.reveal is None else challenge.reveal.transcript()
    if (answer.index, answer.transcript_sha256, len(answer.values)) != (index, transcript, count):
        raise AnswerRejected(f"aggregator {index} answered another challenge")
    if not signed_by(peers, index, answer.signed_bytes(), answer.signature):
        raise AnswerRejected(f"the parity values of aggregator {index} are not signed by its pinned key")
    try:
        return scheme.field.from_bytes(bytes.fromhex("".join(answer.values)), count)
    except InvalidUpdate as e:
        raise AnswerRejected(f"the parity values of aggregator {index} are no field elements") from e


def judge(values: Mapping[int, FieldVector], scheme: Scheme, *, spare: bool) -> ParityVerdict:
    """Who is to be left out.

    Args:
        values: By aggregator, one element a report; of more aggregators than ``scheme.needed``.
        scheme: Of the shares.
        spare: Whether an aggregator can be left out at all.
    """
    wrong = contradictory(values, scheme)
    liars = []
    if spare and wrong.any() and len(values) > scheme.needed + 1:
        for suspect in sorted(values):
            others = {i: vector for i, vector in values.items() if i != suspect}
            explained = wrong & ~contradictory(others, scheme)
            if 2 * explained.sum() > len(wrong):
                liars.append(suspect)
                wrong &= ~explained
                break  # no two can each alone explain more than half
    return ParityVerdict(tuple(np.flatnonzero(wrong).tolist()), tuple(liars))


def contradictory(values: Mapping[int, FieldVector], scheme: Scheme) -> npt.NDArray[np.bool_]:
    """For each report, whether its values lie on no polynomial of the scheme's degree."""
    points = sorted(values)
    base, rest = points[: scheme.needed], points[scheme.needed :]
    known = [values[point] for point in base]
    out = np.zeros(len(known[0]), np.bool_)
    for point in rest:
        expected = NUMPY_KERNELS.interpolate(known, lagrange_weights(base, point), scheme.field)
        differs = expected != values[point]
        out |= differs.any(axis=1) if differs.ndim == 2 else differs
    return out
