"""One aggregator's share of a sum of updates: linear in the shares, so it is computed on them."""

from __future__ import annotations

from collections.abc import Iterable

from client_sdk.protocol.field import FieldVector
from client_sdk.protocol.secure import SecureLayout, decode_share
from client_sdk.protocol.sharing_kernels import SharingKernels


def weighted_sum(
    shares: Iterable[tuple[int, bytes]],
    layout: SecureLayout,
    index: int,
    noise: FieldVector | None,
    kernels: SharingKernels,
) -> FieldVector:
    """The sum of weighted shares and noise, without the mask.

    The masks must stay out: with the parity values, which are public, their sum would reveal a combination of the exact
    sum, noise or not.

    Args:
        shares: Weight and plaintext of each share. Taken one at a time: memory does not grow with their number.
        layout: Of what is shared.
        index: The aggregator's, from 1.
        noise: Share of the noise, ``share_length`` elements, which are overwritten; None for none.
        kernels: What computes.

    Returns:
        ``share_length - 1`` elements.
    """
    field = layout.scheme.field
    total = field.zeros(layout.share_length) if noise is None else noise
    for weight, plaintext in shares:
        kernels.weighted_accumulate(total, decode_share(plaintext, layout, index), weight, field)
    return total[:-1]
