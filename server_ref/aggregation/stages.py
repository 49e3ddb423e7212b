"""The named slots of the pipeline, and what a stage in each of them has to offer.

Every stage says what it makes of the facts (``derive``) when the pipeline is built, and raises a named error there
if what it needs is not given. Stages are frozen values; what changes from update to update lives in a ``Fold``, what
changes from round to round in a ``ServerState``.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol, runtime_checkable

from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation.batch import Aggregate, EncodedUpdate, Facts, Float32Array, Float64Array, Update
from server_ref.aggregation.server_state import ServerState


class Slot(StrEnum):
    """The slots, in the one order in which they run."""

    SCHEDULE = "schedule"
    VALIDATE = "validate"
    DECODE = "decode"
    CLIP = "clip"
    REDUCE = "reduce"
    NOISE = "noise"
    APPLY = "apply"


@runtime_checkable
class Stage(Protocol):
    """What all stages have in common."""

    @property
    def slot(self) -> Slot:
        """Where it belongs."""
        ...

    @property
    def title(self) -> str:
        """What it does, in a few words, with its parameters."""
        ...

    def derive(self, facts: Facts) -> Facts:
        """The facts after this stage.

        Raises:
            PipelineError: What it needs is not given; the message says what to change.
        """
        ...


class Schedule(Stage, Protocol):
    """How late an update may be, and what its lateness costs it."""

    def admits(self, staleness: int, round_id: int) -> bool:
        """Whether an update this many versions old is accepted in this round."""
        ...

    def scale(self, staleness: int, round_id: int) -> int:
        """Factor on the weight of an update of this age, from 1 to the ``max_scale`` that ``derive`` declares.

        The aggregate is divided by ``max_scale`` (constant normalisation): weights that were normalised by their own
        sum would cancel where all updates are equally old.
        """
        ...

    def learning_rate_scale(self, staleness: Sequence[int], round_id: int) -> float:
        """Factor on the server's learning rate for a buffer of updates of these ages."""
        ...


class Validate(Stage, Protocol):
    """Refusals that need the facts of an update only: asked before anything looks at its values."""

    def check(self, update: EncodedUpdate, facts: Facts) -> None:
        """Let it pass.

        Raises:
            ProtocolError: A subclass that says why not.
        """
        ...


class Decode(Stage, Protocol):
    """From the wire's encoding to float32[size], finite and within the declared bound."""

    def decode(self, update: EncodedUpdate, facts: Facts) -> Float32Array:
        """The dense vector; may be a view of the payload.

        Raises:
            ProtocolError: Malformed, not finite, out of range, or of another shape.
        """
        ...

    def unbias_factor(self, facts: Facts) -> float:
        """What the released aggregate is multiplied by to be right in expectation (random sparsification)."""
        ...


class Clip(Stage, Protocol):
    """Bounds an update's norm."""

    def clip(self, vector: Float32Array) -> tuple[Float32Array, float | None, bool]:
        """The vector within the bound, the norm it had (None if not computed), and whether it changed."""
        ...


class Fold(Protocol):
    """The updates of one open buffer. Order of ``add`` and ``discard`` does not change what ``finish`` returns."""

    @property
    def count(self) -> int:
        """Updates in it."""
        ...

    def add(self, updates: Sequence[Update]) -> None:
        """Take updates in. All or nothing."""
        ...

    def discard(self, updates: Sequence[Update]) -> None:
        """Take updates out again that were added before; the state is then as if they had never been."""
        ...

    def finish(self) -> Aggregate:
        """The aggregate of what is in it; the fold can go on afterwards.

        Raises:
            EmptyAggregate: Nothing is in it.
        """
        ...


class Reduce(Stage, Protocol):
    """From many updates to one aggregate."""

    def start(self, facts: Facts) -> Fold:
        """An empty fold for updates with these facts (those after ``clip``)."""
        ...


class Noise(Stage, Protocol):
    """What protects the aggregate before anything else sees it."""

    def release(self, aggregate: Aggregate) -> Aggregate:
        """The aggregate that may be used; a ``PrivateAggregate`` unless the stage says that it adds no noise."""
        ...


class Apply(Stage, Protocol):
    """From an aggregate and the server's state to the next state."""

    def initial(self, weights: Float32Array) -> ServerState:
        """State of version 0."""
        ...

    def step(
        self, state: ServerState, aggregate: Float64Array, kind: UpdateKind, *, learning_rate_scale: float = 1.0
    ) -> ServerState:
        """State of the next version.

        Raises:
            InvalidUpdate: The result would not be finite; the old state lives on.
        """
        ...
