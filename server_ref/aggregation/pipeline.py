"""The pipeline: one stage in each named slot, checked when it is built, in an order that no caller can change.

    schedule -> validate -> decode -> clip -> reduce -> noise -> apply

The facts declared at the entry flow through the stages once, at construction (``Stage.derive``); a combination that is
not sound raises a ``PipelineError`` there that says what to change. What is built is a value: buffers are ``Fold``
objects, the model is a ``ServerState``, and both belong to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, cast

from client_sdk.protocol.errors import ConfigurationError, StaleReport
from server_ref.aggregation.admission import DecodeDense, NoClip, ValidateFacts
from server_ref.aggregation.batch import (
    Aggregate,
    EncodedUpdate,
    Facts,
    PrivateAggregate,
    Update,
    Visibility,
)
from server_ref.aggregation.errors import (
    IndividualUpdatesNeeded,
    NoiseMissing,
    NoiseUnexpected,
    SlotFilledTwice,
    SlotMissing,
    UnboundedRange,
    UnboundedWeight,
)
from server_ref.aggregation.release import NoNoise
from server_ref.aggregation.server_state import ServerState
from server_ref.aggregation.stages import Apply, Clip, Decode, Fold, Noise, Reduce, Schedule, Slot, Stage, Validate
from server_ref.aggregation.staleness import SynchronousSchedule

# What a slot holds where a pipeline does not say otherwise; the other slots must be filled.
_DEFAULTS: Final[Mapping[Slot, Stage]] = MappingProxyType(
    {
        Slot.SCHEDULE: SynchronousSchedule(),
        Slot.VALIDATE: ValidateFacts(),
        Slot.DECODE: DecodeDense(),
        Slot.CLIP: NoClip(),
        Slot.NOISE: NoNoise(),
    }
)
# Slots that have nothing to look at where only a sum arrives.
_OF_SINGLE_UPDATES: Final = frozenset({Slot.VALIDATE, Slot.DECODE, Slot.CLIP})


@dataclass(frozen=True)
class Pipeline:
    """What a server does to a buffer of updates. Made by ``build``.

    Attributes:
        stages: One for each slot, in order.
        entry: Facts declared for the updates as they arrive.
        admitted: Facts of an admitted update (after ``clip``): what a fold is started with.
        released: Facts of what reaches ``apply``.
        private: Whether only private aggregates may be applied.
    """

    stages: Mapping[Slot, Stage]
    entry: Facts
    admitted: Facts
    released: Facts
    private: bool

    @classmethod
    def build(cls, *stages: Stage, facts: Facts, private: bool = False) -> Pipeline:
        """Put stages into their slots and check that they fit.

        Args:
            stages: At most one for each slot, in any order. ``reduce`` and ``apply`` must be among them.
            facts: What is declared of the updates as they arrive.
            private: Refuse a pipeline that would release an aggregate without noise.

        Raises:
            SlotFilledTwice: Two stages for one slot.
            SlotMissing: No ``reduce`` or no ``apply``.
            PipelineError: Another subclass: stages that do not fit each other; the message says what to change.
        """
        filled: dict[Slot, Stage] = {}
        for stage in stages:
            if stage.slot in filled:
                raise SlotFilledTwice(
                    f"the {stage.slot} slot is filled twice, by '{filled[stage.slot].title}' and by '{stage.title}'; "
                    "drop one of them"
                )
            filled[stage.slot] = stage
        _check_declared(facts)
        at_hand = facts.visibility is Visibility.INDIVIDUAL
        for slot, stage in _DEFAULTS.items():
            if at_hand or slot not in _OF_SINGLE_UPDATES:
                filled.setdefault(slot, stage)
        missing = [slot for slot in (Slot.REDUCE, Slot.APPLY) if slot not in filled]
        if missing:
            raise SlotMissing(f"the {' and '.join(missing)} slot is empty; every pipeline needs a stage there")
        ordered = {slot: filled[slot] for slot in Slot if slot in filled}
        admitted = known = facts
        for slot, stage in ordered.items():
            known = stage.derive(known)
            if slot is Slot.CLIP or (slot is Slot.SCHEDULE and not at_hand):
                admitted = known
            if slot is Slot.NOISE and private and not known.noised:
                raise NoiseMissing(
                    f"only private aggregates may be released, but '{stage.title}' in the noise slot adds no noise; "
                    "fill the slot, or drop the claim"
                )
        return cls(MappingProxyType(ordered), facts, admitted, known, private)

    # --- the stages, by name -----------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """What staleness costs."""
        return cast("Schedule", self.stages[Slot.SCHEDULE])

    @property
    def reduce(self) -> Reduce:
        """How many updates become one."""
        return cast("Reduce", self.stages[Slot.REDUCE])

    @property
    def optimizer(self) -> Apply:
        """How an aggregate changes the model."""
        return cast("Apply", self.stages[Slot.APPLY])

    # --- a buffer, step by step --------------------------------------------------------------------------

    def admit(self, update: EncodedUpdate, round_id: int = 0) -> Update:
        """One update through ``schedule``, ``validate``, ``decode`` and ``clip``.

        Staleness is refused first, before anything looks at the payload.

        Args:
            update: What arrived.
            round_id: The model version that the buffer will change.

        Raises:
            StaleReport: Too old.
            ProtocolError: Another refusal, by its class.
        """
        if not self.schedule.admits(update.staleness, round_id):
            raise StaleReport(f"update {update.number} is {update.staleness} versions old, beyond what is accepted now")
        return self.age(self.open(update), update.staleness, round_id)

    def open(self, update: EncodedUpdate) -> Update:
        """The part of ``admit`` that does not depend on time: ``validate``, ``decode`` and ``clip``.

        Raises:
            IndividualUpdatesNeeded: This pipeline receives sums.
            ProtocolError: A refusal, by its class.
        """
        if self.entry.visibility is not Visibility.INDIVIDUAL:
            raise IndividualUpdatesNeeded("this pipeline receives sums; there are no single updates to admit")
        cast("Validate", self.stages[Slot.VALIDATE]).check(update, self.entry)
        vector = cast("Decode", self.stages[Slot.DECODE]).decode(update, self.entry)
        vector, norm, clipped = cast("Clip", self.stages[Slot.CLIP]).clip(vector)
        return Update(
            number=update.number,
            vector=vector,
            weight=update.weight,
            normaliser=update.normaliser,
            norm=norm,
            clipped=clipped,
        )

    def age(self, update: Update, staleness: int, round_id: int) -> Update:
        """An opened update as a buffer sees it: its age, and what the schedule leaves of its weight.

        Raises:
            UnboundedWeight: The schedule scales beyond what it declared, on which every sensitivity rests.
        """
        scale = self.schedule.scale(staleness, round_id)
        if not 1 <= scale <= self.admitted.max_scale:
            raise UnboundedWeight(
                f"'{self.schedule.title}' scales an update by {scale}; it declared 1 to {self.admitted.max_scale}"
            )
        return replace(update, staleness=staleness, scale=scale)

    def start(self) -> Fold:
        """An empty buffer."""
        return self.reduce.start(self.admitted)

    def finish(self, fold: Fold) -> Aggregate:
        """Through ``reduce`` and ``noise``.

        Raises:
            EmptyAggregate: Nothing is in the buffer.
            NoiseMissing: The aggregate must be private and is not.
        """
        return self.release(fold.finish())

    def release(self, aggregate: Aggregate) -> Aggregate:
        """Through ``noise``: what may be applied.

        Raises:
            NoiseMissing: The aggregate must be private and is not.
        """
        released = cast("Noise", self.stages[Slot.NOISE]).release(aggregate)
        if self.private and not isinstance(released, PrivateAggregate):
            raise NoiseMissing("an aggregate without noise reached the end of a private pipeline; nothing is released")
        return released

    def apply(
        self, state: ServerState, aggregate: Aggregate, *, staleness: Iterable[int] = (), round_id: int = 0
    ) -> ServerState:
        """Through ``apply``: the next state.

        Args:
            state: The present one.
            aggregate: What ``finish`` or ``release`` returned.
            staleness: Ages of the buffer's updates, for a learning rate that falls with them.
            round_id: The present model version.

        Raises:
            InvalidUpdate: The result would not be finite; the old state lives on.
        """
        scale = self.schedule.learning_rate_scale(list(staleness), round_id)
        values = aggregate.values
        decode = self.stages.get(Slot.DECODE)
        if decode is not None and (factor := cast("Decode", decode).unbias_factor(self.entry)) != 1:
            # Here and not on single updates: noise was calibrated to what was clipped, so this comes after it.
            values = values * factor
        return self.optimizer.step(state, values, aggregate.kind, learning_rate_scale=scale)

    def run(
        self, state: ServerState, updates: Iterable[EncodedUpdate], round_id: int = 0
    ) -> tuple[ServerState, Aggregate]:
        """One buffer from its updates to the next state: all the steps above, for whoever has them at hand.

        Raises:
            ProtocolError: A refused update; nothing is changed.
            EmptyAggregate: No updates.
        """
        fold = self.start()
        ages = []
        for update in updates:
            admitted = self.admit(update, round_id)
            ages.append(admitted.staleness)
            fold.add([admitted])
        aggregate = self.finish(fold)
        return self.apply(state, aggregate, staleness=ages, round_id=round_id), aggregate

    # --- words -------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """A table of the slots, their stages, and what is known after each."""
        rows = [("slot", "stage", "known afterwards"), *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

    def diagram(self) -> str:
        """The same as a Mermaid flow chart, for documents."""
        lines = ["flowchart LR", f'    entry(["updates<br/>{_known(self.entry)}"])']
        before = "entry"
        for slot, stage in self.stages.items():
            lines += [f'    {slot}["<b>{slot}</b><br/>{stage.title}"]', f"    {before} --> {slot}"]
            before = slot
        lines += ['    model(["model"])', f"    {before} --> model"]
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, str, str]]:
        rows = []
        known = self.entry
        for slot, stage in self.stages.items():
            known = stage.derive(known)
            rows.append((str(slot), stage.title, _known(known)))
        return rows


def _check_declared(facts: Facts) -> None:
    """Refuse declarations that mean nothing, or that only a stage can make."""
    if facts.size < 0 or facts.capacity < 1 or (facts.count is not None and not 1 <= facts.count <= facts.capacity):
        raise ConfigurationError(
            f"an aggregate of {facts.count or 'up to'} {facts.capacity} updates of {facts.size} coordinates; declare a "
            "size from 0, a capacity from 1, and a count up to the capacity"
        )
    for name, bound in (("max_abs", facts.max_abs), ("norm_bound", facts.norm_bound)):
        if bound is not None and not 0 < bound < math.inf:
            raise UnboundedRange(f"{name} must be positive and finite, got {bound}; leave it out if there is no bound")
    for name, most in (
        ("max_weight", facts.max_weight),
        ("max_scale", facts.max_scale),
        ("constant_denominator", facts.constant_denominator),
    ):
        if most is not None and most < 1:
            raise UnboundedWeight(f"{name} is an integer from 1, got {most}")
    if facts.norm_bound is not None and facts.visibility is Visibility.INDIVIDUAL:
        raise UnboundedRange(
            f"norm_bound={facts.norm_bound:g} is declared and nothing enforces it: where single updates are visible, "
            "add a clip stage (clip_norm) instead"
        )
    if facts.noised or facts.sensitivity:
        raise NoiseUnexpected("noise and sensitivity are what stages find out; they are not declared of what arrives")


def _known(facts: Facts) -> str:
    parts = [f"{facts.size} coordinates", f"visible: {facts.visibility}"]
    if facts.max_abs is not None:
        parts.append(f"|x| <= {facts.max_abs:g}")
    if facts.norm_bound is not None:
        parts.append(f"norm <= {facts.norm_bound:g}")
    parts.append("weights unbounded" if facts.max_weight is None else f"weight <= {facts.max_weight}")
    if facts.max_scale != 1:
        parts.append(f"staleness scale <= {facts.max_scale}")
    parts += [f"sensitivity {value:.3g} ({adjacency})" for adjacency, value in facts.sensitivity.items()]
    if not facts.arrival_public:
        parts.append("arrival hidden")
    if facts.rescaled:
        parts.append("rescaled")
    if facts.noised:
        parts.append("noised")
    return ", ".join(parts)
