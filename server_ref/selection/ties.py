"""The order of devices between which nothing else decides: keyed, so that nobody can choose a place in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError

MIN_KEY_BYTES: Final = 16
MAX_KEY_BYTES: Final = 64

UInt64Array = npt.NDArray[np.uint64]


class KeyedTies:
    """A fresh order of all devices for each round of a task.

    A device's id follows from its key, and keys cost nothing: whoever could compute the order would draw keys until one
    stands first. So each place is a keyed hash of (task, round, device), and the key is the server's secret. All
    replicas with one key have one order, whatever order devices are given in.

    Args:
        key: Secret, 16 to 64 bytes. From a seed only where devices are simulated.
        task: Sets the orders of different tasks apart.

    Raises:
        ConfigurationError: A key that is too short or too long.
    """

    def __init__(self, key: bytes, task: str = "") -> None:
        if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
            raise ConfigurationError(
                f"a selection's key is a secret of {MIN_KEY_BYTES} to {MAX_KEY_BYTES} bytes, this one has {len(key)}"
            )
        self._prefix = hashlib.blake2b(_framed(task), key=key, digest_size=8, person=b"pocketfed-select")

    def __repr__(self) -> str:
        return "KeyedTies(<key>)"

    def places(self, round_id: int, devices: Iterable[str]) -> UInt64Array:
        """Each device's place in the round's order: uint64[n], the lower the sooner, in the order of ``devices``."""
        start = self._prefix.copy()
        start.update(round_id.to_bytes(8, "big"))
        digests = []
        for device in devices:
            hasher = start.copy()
            # Ids come from outside; lone surrogates are as good a name as any.
            hasher.update(device.encode("utf-8", "surrogatepass"))
            digests.append(hasher.digest())
        return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)

    def place(self, round_id: int, device: str) -> int:
        """One device's place."""
        return int(self.places(round_id, [device])[0])

    def fraction(self, round_id: int) -> float:
        """A number in [0, 1) that belongs to the round; no device has it as its place."""
        hasher = self._prefix.copy()
        hasher.update(round_id.to_bytes(8, "big"))
        # Not valid UTF-8, so that it is nobody's name.
        hasher.update(b"\xff")
        return int.from_bytes(hasher.digest()[:6], "big") / 2**48


def _framed(text: str) -> bytes:
    """With its length in front, so that a task's end and a round's begin cannot be confused."""
    data = text.encode("utf-8", "surrogatepass")
    return len(data).to_bytes(8, "big") + data
