"""Dealing the keys that shares of zero are made of: signed, sealed, and the same whenever they are asked for.

Each set of n - t + 1 aggregators has a key in common for each request (``zero_sharing``). The aggregator with the
lowest index in a set derives its key from a secret of its own and seals it to the others.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from client_sdk.protocol import sealing
from client_sdk.protocol.errors import SealingFailed
from client_sdk.protocol.shamir import Scheme
from server_ref.secure.canonical import encode
from server_ref.secure.distance_messages import ZeroKeyHeader, ZeroKeys, ZeroKeyShare
from server_ref.secure.errors import ZeroKeyRejected
from server_ref.secure.identity import AggregatorConfig, AggregatorKeys
from server_ref.secure.messages import UNSIGNED
from server_ref.secure.zero_sharing import KEY_BYTES, Subset, dealt_by, derive_key, held_by, key_holders


class ZeroKeyDealer:
    """One aggregator's part in dealing keys, and what it makes of the others'.

    Args:
        config: Its configuration, with the others' pinned keys.
        keys: Its private keys. Keys for shares of zero are derived from them.
        task_id: The task that it serves.
        scheme: How updates are shared, without packing.

    Raises:
        ConfigurationError: n and t would make too many keys necessary.
    """

    def __init__(self, config: AggregatorConfig, keys: AggregatorKeys, task_id: str, scheme: Scheme) -> None:
        self._config = config
        self._keys = keys
        self._task_id = task_id
        self._scheme = scheme
        self._subsets = key_holders(scheme)
        self._secret = hmac.digest(keys.signing.private_bytes(), b"pocketfed zero keys v1", "sha256")

    def deal(self, request_sha256: str) -> ZeroKeys:
        """This aggregator's part of the keys for one request (hex of its hash); the same keys whenever it is asked."""
        me = self._config.index
        sealed = []
        for receiver in self._scheme.indices:
            keys = b"".join(self._own_key(request_sha256, s) for s in dealt_by(me, receiver, self._subsets))
            nothing = receiver == me or not keys
            info = self._info(request_sha256, me, receiver)
            sealed.append(b"" if nothing else sealing.seal(keys, self._config.sealing_key(receiver), info))
        header = ZeroKeyHeader(
            request_sha256=request_sha256,
            sender=me,
            sealed_sha256=tuple(hashlib.sha256(each).hexdigest() for each in sealed),
            signature=UNSIGNED,
        )
        return ZeroKeys(self._keys.sign(header), tuple(sealed))

    def collect(self, request_sha256: str, dealt: Sequence[ZeroKeyShare]) -> dict[Subset, bytes]:
        """The keys of all sets that this aggregator is in.

        Args:
            request_sha256: What they are for.
            dealt: The keys for this aggregator, of every dealer that has some for it.

        Raises:
            ZeroKeyRejected: A dealer's keys are missing, forged, or of another request.
        """
        me = self._config.index
        held = held_by(me, self._subsets)
        keys = {s: self._own_key(request_sha256, s) for s in held if s[0] == me}
        by_dealer = {share.header.sender: share for share in dealt}
        for dealer in sorted({s[0] for s in held} - {me}):
            if dealer not in by_dealer:
                raise ZeroKeyRejected(f"the keys of aggregator {dealer} are missing")
            keys |= self._opened(request_sha256, by_dealer[dealer])
        return keys

    def _own_key(self, request_sha256: str, subset: Subset) -> bytes:
        return derive_key(self._secret, bytes.fromhex(request_sha256), subset)

    def _info(self, request_sha256: str, sender: int, receiver: int) -> bytes:
        return encode("zero-key-info", [self._task_id, request_sha256, sender, receiver])

    def _opened(self, request_sha256: str, share: ZeroKeyShare) -> dict[Subset, bytes]:
        header, me = share.header, self._config.index
        if header.request_sha256 != request_sha256:
            raise ZeroKeyRejected(f"the keys of aggregator {header.sender} were made for another request")
        if not self._config.signed(header.sender, header.signed_bytes(), header.signature):
            raise ZeroKeyRejected(f"the keys of aggregator {header.sender} are not signed by its pinned key")
        if (
            len(header.sealed_sha256) != self._scheme.num_shares
            or hashlib.sha256(share.sealed).hexdigest() != header.sealed_sha256[me - 1]
        ):
            raise ZeroKeyRejected(f"the keys of aggregator {header.sender} are not what it sealed for this aggregator")
        subsets = dealt_by(header.sender, me, self._subsets)
        try:
            plaintext = sealing.open(share.sealed, self._keys.sealing, self._info(request_sha256, header.sender, me))
        except SealingFailed as e:
            raise ZeroKeyRejected(f"the keys of aggregator {header.sender} cannot be opened") from e
        if len(plaintext) != KEY_BYTES * len(subsets):
            raise ZeroKeyRejected(f"aggregator {header.sender} sealed keys of another number")
        return {s: plaintext[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i, s in enumerate(subsets)}
