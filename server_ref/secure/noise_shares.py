"""Noise that no aggregator knows: each contributor draws some, shares it, and seals a share to every aggregator.

Adding noise to one's own share of the sum would be wrong: reconstruction multiplies it by a Lagrange coefficient. So
noise is shared like an update, and an aggregator adds its shares of all contributors' noise to its share of the sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from client_sdk.protocol import discrete_gaussian, sealing
from client_sdk.protocol.errors import MalformedShare, SealingFailed
from client_sdk.protocol.field import FieldVector
from client_sdk.protocol.secure import SecureLayout, decode_share, encode_shares
from client_sdk.protocol.shamir import share_seeded
from server_ref.secure.errors import NoiseRejected
from server_ref.secure.identity import AggregatorConfig, AggregatorKeys
from server_ref.secure.messages import UNSIGNED, NoiseContribution, NoiseHeader, NoiseShare, RoundStatement
from server_ref.secure.rules import honest_contributors


def draw_noise(
    statement: RoundStatement, layout: SecureLayout, honest: int, random: Callable[[int], bytes]
) -> npt.NDArray[np.int64]:
    """One contributor's noise for one part of the set.

    Args:
        statement: States the parameters.
        layout: Of what is shared.
        honest: h: how many contributors' noise must suffice.
        random: The operating system's randomness.

    Returns:
        int64 ``[num_values]``: ``N_Z(0, (sigma W B)**2 / h)`` for the update, and ``N_Z(0, (sigma_b W)**2 / h)`` for
        the indicator, where there is one.
    """
    parameters = statement.parameters
    noise = discrete_gaussian.sample(layout.size, parameters.noise_variance(honest), random)
    if not layout.indicator:
        return noise
    return np.concatenate([noise, discrete_gaussian.sample(1, parameters.indicator_variance(honest), random)])


def make_contribution(
    statement: RoundStatement,
    config: AggregatorConfig,
    keys: AggregatorKeys,
    layout: SecureLayout,
    random: Callable[[int], bytes],
) -> NoiseContribution:
    """Draw, share, seal and sign: new noise with every call, so the caller keeps what it got before it sends it.

    Each part of the set gets noise of its own, in full.
    """
    honest = honest_contributors(statement, config.parameters)
    plaintexts = [b""] * layout.scheme.num_shares
    for _part in statement.accepted.parts:
        secret = layout.secret(draw_noise(statement, layout, honest, random), random(32))
        encoded = encode_shares(share_seeded(secret, layout.scheme, random), layout)
        plaintexts = [so_far + share for so_far, share in zip(plaintexts, encoded, strict=True)]
    sealed = tuple(
        sealing.seal(plaintext, config.sealing_key(receiver), noise_info(statement, config.index, receiver))
        for receiver, plaintext in enumerate(plaintexts, 1)
    )
    header = NoiseHeader(
        statement_sha256=statement.sha256,
        sender=config.index,
        sealed_sha256=tuple(hashlib.sha256(each).hexdigest() for each in sealed),
        signature=UNSIGNED,
    )
    return NoiseContribution(keys.sign(header), sealed)


def sum_received(
    statement: RoundStatement,
    noise: Sequence[NoiseShare],
    config: AggregatorConfig,
    keys: AggregatorKeys,
    layout: SecureLayout,
) -> list[FieldVector]:
    """This aggregator's share of all contributors' noise.

    Returns:
        For each part of the set a vector of ``share_length`` elements, the last (the mask's) among them.

    Raises:
        NoiseRejected: The shares are not those of exactly the statement's contributors, in order; or one is not signed
            by its contributor's pinned key for this statement, is not the one that was signed, does not open, or is
            not the canonical encoding of shares.
    """
    senders = tuple(share.header.sender for share in noise)
    if senders != statement.contributors:
        raise NoiseRejected(f"noise of {list(senders)} was given, and that of {list(statement.contributors)} is stated")
    field = layout.scheme.field
    sums: list[FieldVector] = []
    for share in noise:
        vectors = _open(statement, share, config, keys, layout)
        sums = [field.add(so_far, vector) for so_far, vector in zip(sums, vectors, strict=True)] if sums else vectors
    return sums


def _open(
    statement: RoundStatement,
    share: NoiseShare,
    config: AggregatorConfig,
    keys: AggregatorKeys,
    layout: SecureLayout,
) -> list[FieldVector]:
    header = share.header
    if header.statement_sha256 != statement.sha256:
        raise NoiseRejected(f"the noise of aggregator {header.sender} was made for another statement")
    if not config.signed(header.sender, header.signed_bytes(), header.signature):
        raise NoiseRejected(f"the noise of aggregator {header.sender} is not signed by its pinned key")
    if (
        len(header.sealed_sha256) != layout.scheme.num_shares
        or hashlib.sha256(share.sealed).hexdigest() != header.sealed_sha256[config.index - 1]
    ):
        raise NoiseRejected(f"the noise of aggregator {header.sender} is not what it sealed for this aggregator")
    try:
        plaintext = sealing.open(share.sealed, keys.sealing, noise_info(statement, header.sender, config.index))
        length = layout.plaintext_bytes(config.index)
        parts = len(statement.accepted.parts)
        if len(plaintext) != parts * length:
            raise NoiseRejected(f"aggregator {header.sender} sealed noise of another length")
        return [
            decode_share(plaintext[at : at + length], layout, config.index) for at in range(0, parts * length, length)
        ]
    except (SealingFailed, MalformedShare) as e:
        raise NoiseRejected(f"the noise of aggregator {header.sender} cannot be read") from e


def noise_info(statement: RoundStatement, sender: int, receiver: int) -> bytes:
    """What a sealed share of noise is bound to."""
    return sealing.noise_info(
        task_id=statement.task_id,
        round_id=statement.round_id,
        run=statement.run,
        contributors=statement.contributors,
        set_sha256=statement.accepted.sha256(),
        sender=sender,
        receiver=receiver,
    )
