"""One aggregator's share of a sum of updates: linear in the shares, so it is computed on them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from client_sdk.protocol.field import FieldVector
from client_sdk.protocol.secure import SecureLayout
from server_ref.secure.compiled import CompiledKernels

KERNELS: Final = CompiledKernels()


def weighted_sum(
    shares: Iterable[tuple[int, bytes | memoryview]], layout: SecureLayout, index: int, noise: FieldVector | None
) -> FieldVector:
    """The sum of weighted shares and noise, without the mask.

    The masks must stay out: with the parity values, which are public, their sum would reveal a combination of the exact
    sum, noise or not.

    Args:
        shares: Weight and plaintext of each share, which ``decode_share`` has accepted before it was kept. Taken one at
            a time and added where they lie: memory does not grow with their number.
        layout: Of what is shared.
        index: The aggregator's, from 1.
        noise: Share of the noise, ``share_length`` elements, which are overwritten; None for none.

    Returns:
        ``share_length - 1`` elements.

    Raises:
        MalformedShare: What is kept is no longer what was accepted.
        ShapeMismatch: The same.
    """
    field = layout.scheme.field
    total = field.zeros(layout.share_length) if noise is None else noise
    seeded = index <= layout.num_seeds
    for weight, plaintext in shares:
        # After the byte that says what follows (``secure.encode_shares``).
        body = memoryview(plaintext)[1:]
        if seeded:
            KERNELS.accumulate_seed(total, bytes(body), weight, field)
        else:
            KERNELS.accumulate_bytes(total, body, weight, field)
    return total[:-1]
