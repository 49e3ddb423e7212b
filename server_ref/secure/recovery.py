"""From aggregators' answers to a sum: check who answered what, leave out what is wrong, reconstruct."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import InvalidUpdate
from client_sdk.protocol.field import FieldVector
from client_sdk.protocol.secure import SecureLayout
from client_sdk.protocol.shamir import NUMPY_KERNELS, SharingKernels, reconstruct
from client_sdk.protocol.share_checks import check_parity, locate
from server_ref.secure.errors import AnswerRejected, AnswersInconsistent
from server_ref.secure.identity import PeerKeys, signed_by
from server_ref.secure.messages import AggregateShare, RoundStatement
from server_ref.secure.round_messages import Integrity


@dataclass(frozen=True)
class Opened:
    """Opened sums.

    Attributes:
        values: For each part, int64 ``[num_values]``.
        integrity: What is known of the answers.
        tampered: Indices of the aggregators whose answers were wrong and were left out.
    """

    values: tuple[npt.NDArray[np.int64], ...]
    integrity: Integrity
    tampered: tuple[int, ...]


def read_answer(
    answer: AggregateShare, index: int, statement: RoundStatement, layout: SecureLayout, peers: Sequence[PeerKeys]
) -> list[FieldVector]:
    """An aggregator's share of each part's sum, known to be its own answer for this statement.

    Raises:
        AnswerRejected: Not signed by the pinned key, about another round or statement, or no canonical share.
    """
    header = answer.header
    if (header.index, header.round_id, header.statement_sha256) != (index, statement.round_id, statement.sha256):
        raise AnswerRejected(f"aggregator {index} answered for another round or statement")
    if not signed_by(peers, index, header.signed_bytes(), header.signature):
        raise AnswerRejected(f"the answer of aggregator {index} is not signed by its pinned key")
    if hashlib.sha256(answer.payload).hexdigest() != header.payload_sha256:
        raise AnswerRejected(f"the answer of aggregator {index} is not the one that it signed")
    field, length = layout.scheme.field, layout.share_length - 1  # without the mask's element
    parts = len(statement.accepted.parts)
    try:
        flat = field.from_bytes(answer.payload, parts * length)
    except InvalidUpdate as e:
        raise AnswerRejected(f"the answer of aggregator {index} is no share of this sum") from e
    return [flat[part * length : (part + 1) * length] for part in range(parts)]


def open_sums(
    answers: Mapping[int, Sequence[FieldVector]], layout: SecureLayout, kernels: SharingKernels = NUMPY_KERNELS
) -> Opened:
    """The sums of all parts.

    Args:
        answers: What ``read_answer`` gave, by index; at least ``needed``, all of as many parts.
        layout: Of the task's shares.
        kernels: What computes.

    Raises:
        AnswersInconsistent: Answers contradict each other, and which are wrong cannot be known.
    """
    scheme = layout.scheme
    parts = len(next(iter(answers.values())))
    tampered: set[int] = set()
    checkable = len(answers) > scheme.needed
    if checkable:
        for part in range(parts):
            tampered |= _wrong({i: vectors[part] for i, vectors in answers.items()}, layout, kernels)
    good = {i: vectors for i, vectors in answers.items() if i not in tampered}
    if len(good) < scheme.needed:
        raise AnswersInconsistent(
            "wrong answers in different parts leave too few right ones", answered=tuple(sorted(answers))
        )
    values = []
    for part in range(parts):
        shares = {i: vectors[part] for i, vectors in good.items()}
        secret = reconstruct(shares, scheme, (layout.share_length - 1) * scheme.packing, kernels)
        values.append(scheme.field.to_signed(layout.values(secret)))
    integrity = Integrity.CORRECTED if tampered else Integrity.CHECKED if checkable else Integrity.UNCHECKED
    return Opened(tuple(values), integrity, tuple(sorted(tampered)))


def _wrong(shares: Mapping[int, FieldVector], layout: SecureLayout, kernels: SharingKernels) -> set[int]:
    """Which of more shares than needed are wrong."""
    if check_parity(shares, layout.scheme, kernels=kernels):
        return set()
    located = locate(shares, layout.scheme, kernels=kernels)
    if located.ambiguous:
        raise AnswersInconsistent(
            f"{len(shares)} answers contradict each other, and at most {located.correctable} wrong ones can be located",
            answered=tuple(sorted(shares)),
        )
    return set(located.bad)
