"""All aggregators of a task at once: the same question to several, and who of them gave an authentic answer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from client_sdk.protocol.errors import PocketfedError
from server_ref.secure.errors import AggregatorRefusal, AnswerRejected, TaskMismatch
from server_ref.secure.identity import PeerKeys, signed_by
from server_ref.secure.messages import AggregatorInfo, TaskBinding
from server_ref.secure.parameters import PinnedParameters
from server_ref.secure.port import FullPort

_log = logging.getLogger("pocketfed.secure")

T = TypeVar("T")


@dataclass(frozen=True)
class Replies(Generic[T]):
    """What was answered, and why the others' answers are missing, by index."""

    good: dict[int, T] = field(default_factory=dict)
    failed: dict[int, PocketfedError] = field(default_factory=dict)

    @property
    def indices(self) -> tuple[int, ...]:
        """Who answered, in order."""
        return tuple(sorted(self.good))

    def why(self) -> str:
        """What went wrong, for people."""
        return "; ".join(f"aggregator {i}: {e}" for i, e in sorted(self.failed.items()))

    def refusals(self) -> dict[int, AggregatorRefusal]:
        """Those of the failures that an aggregator meant: asking again will not change them."""
        return {i: e for i, e in self.failed.items() if isinstance(e, AggregatorRefusal)}


def most_common(refusals: Iterable[AggregatorRefusal]) -> AggregatorRefusal:
    """A refusal of the kind that most aggregators gave; of at least one."""
    given = list(refusals)
    kind = Counter(map(type, given)).most_common(1)[0][0]
    return next(e for e in given if type(e) is kind)


class Panel:
    """The aggregators of one task.

    Args:
        ports: By index, from 1.
        peers: Their pinned keys, in order.
        parameters: What all of them are expected to pin.
        task: The task that they serve.

    Attributes:
        last_present: Indices of those that were there when ``present`` was called last.
    """

    def __init__(
        self,
        ports: Mapping[int, FullPort],
        peers: tuple[PeerKeys, ...],
        parameters: PinnedParameters,
        task: TaskBinding,
    ) -> None:
        self.peers = peers
        self._ports = dict(ports)
        self._parameters = parameters
        self._task = task
        self.last_present: tuple[int, ...] = ()
        self._pool = ThreadPoolExecutor(len(ports), thread_name_prefix="pocketfed-secure")

    @property
    def indices(self) -> tuple[int, ...]:
        """All aggregators, in order."""
        return tuple(sorted(self._ports))

    def close(self) -> None:
        """Let go of the threads; the ports stay open."""
        self._pool.shutdown()

    def ask(self, indices: Iterable[int], question: Callable[[FullPort, int], T], doing: str = "answer") -> Replies[T]:
        """Ask several aggregators at once, and wait for all.

        Args:
            indices: Whom.
            question: Given a port and its index; raises a ``PocketfedError`` where the answer is none.
            doing: What they are asked to do, for the log.
        """
        pending = {i: self._pool.submit(question, self._ports[i], i) for i in sorted(indices)}
        replies: Replies[T] = Replies()
        for i, future in pending.items():
            try:
                replies.good[i] = future.result()
            except PocketfedError as e:
                replies.failed[i] = e
                _log.warning("aggregator %d did not %s: %s: %s", i, doing, type(e).__name__, e)
        return replies

    def present(self) -> Replies[AggregatorInfo]:
        """Who is there, is who it should be, serves the task, and pins the expected parameters."""
        replies = self.ask(self.indices, self._bind, "serve the task")
        self.last_present = replies.indices
        return replies

    def signed(self, index: int, message: bytes, signature: str) -> bool:
        """Whether the pinned key of an aggregator made the signature (hex)."""
        return signed_by(self.peers, index, message, signature)

    def _bind(self, port: FullPort, index: int) -> AggregatorInfo:
        info = port.bind(self._task)
        peer = self.peers[index - 1]
        if (info.index, info.signing_key, info.sealing_key) != (index, peer.signing_key, peer.sealing_key):
            raise AnswerRejected(f"who answers for aggregator {index} has other keys than those that are pinned for it")
        if not self.signed(index, info.signed_bytes(), info.signature):
            raise AnswerRejected(f"what aggregator {index} says of itself is not signed by its pinned key")
        if info.task != self._task:
            raise TaskMismatch(f"aggregator {index} serves another task")
        if info.parameters != self._parameters:
            own, expected = info.parameters.model_dump(), self._parameters.model_dump()
            different = ", ".join(name for name, value in expected.items() if own[name] != value)
            raise TaskMismatch(f"aggregator {index} pins other parameters than this task has: {different}")
        return info
