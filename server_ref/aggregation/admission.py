"""The stages that look at one update at a time: validate, decode, clip."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from client_sdk.protocol.clipping import (
    LARGEST_CLIP_NORM,
    SMALLEST_CLIP_NORM,
    clip_global,
    clip_layers,
    joint_clip_norm,
)
from client_sdk.protocol.compression import Codec, CompressionSpec
from client_sdk.protocol.errors import (
    ConfigurationError,
    NonFiniteUpdate,
    ReportMismatch,
    ShapeMismatch,
    UpdateOutOfRange,
)
from server_ref.aggregation.batch import EncodedUpdate, Facts, Float32Array, Visibility
from server_ref.aggregation.errors import IndividualUpdatesNeeded
from server_ref.aggregation.stages import Slot

if TYPE_CHECKING:
    from server_ref.aggregation.stages import Clip, Decode, Validate


def check_values(update: Float32Array, max_abs: float | None) -> None:
    """Refuse NaN, infinities and values beyond the bound, in two passes without a copy.

    Args:
        update: float32, any shape.
        max_abs: Largest magnitude; None for any finite one.

    Raises:
        NonFiniteUpdate: NaN or infinities.
        UpdateOutOfRange: Values beyond ``max_abs``.
    """
    # NaN propagates through both, so one comparison catches it.
    largest = max(float(np.max(update, initial=0)), -float(np.min(update, initial=0)))
    if not math.isfinite(largest):
        raise NonFiniteUpdate(f"{int(np.count_nonzero(~np.isfinite(update)))} values are NaN or infinite")
    if max_abs is not None and largest > max_abs:
        raise UpdateOutOfRange(f"values lie beyond the declared bound of {max_abs:.3g}")


@dataclass(frozen=True)
class ValidateFacts:
    """Checks what is known of an update apart from its values.

    Attributes:
        max_normaliser: Largest FedNova normaliser, from the public plan: local steps are a device's own claim.
    """

    max_normaliser: float = 1.0

    @property
    def slot(self) -> Slot:
        """``validate``."""
        return Slot.VALIDATE

    @property
    def title(self) -> str:
        """What is checked."""
        return "weight and local steps within their bounds"

    def derive(self, facts: Facts) -> Facts:
        """Changes nothing: what it checks was declared."""
        return facts

    def check(self, update: EncodedUpdate, facts: Facts) -> None:
        """Let it pass.

        Raises:
            ReportMismatch: A weight or a normaliser beyond what was declared.
        """
        if update.weight < 1 or (facts.max_weight is not None and update.weight > facts.max_weight):
            raise ReportMismatch(
                f"update {update.number} weighs {update.weight}; weights from 1 to {facts.max_weight} are declared"
            )
        if not 0 < update.normaliser <= self.max_normaliser:
            raise ReportMismatch(
                f"update {update.number} claims a local progress of {update.normaliser:g}; the plan allows up to "
                f"{self.max_normaliser:g}"
            )


@dataclass(frozen=True)
class DecodeDense:
    """The payload is float32[size] already."""

    @property
    def slot(self) -> Slot:
        """``decode``."""
        return Slot.DECODE

    @property
    def title(self) -> str:
        """The encoding."""
        return "float32, finite, within the declared range"

    def derive(self, facts: Facts) -> Facts:
        """Needs to see the update.

        Raises:
            IndividualUpdatesNeeded: Only a sum is visible.
        """
        return _seen(self, facts)

    def unbias_factor(self, facts: Facts) -> float:  # noqa: ARG002 - the slot's signature
        """1: nothing was left out."""
        return 1.0

    def decode(self, update: EncodedUpdate, facts: Facts) -> Float32Array:
        """The payload itself; see ``stages.Decode``."""
        vector = update.payload
        if not isinstance(vector, np.ndarray) or vector.dtype != np.float32 or vector.shape != (facts.size,):
            raise ShapeMismatch(f"update {update.number} must be float32[{facts.size}]")
        check_values(vector, facts.max_abs)
        return vector


@dataclass(frozen=True)
class DecodeCompressed:
    """The payload is a codec's bytes.

    Attributes:
        spec: The codec. Its randomness comes from each update's public seed.
    """

    spec: CompressionSpec

    @property
    def slot(self) -> Slot:
        """``decode``."""
        return Slot.DECODE

    @property
    def title(self) -> str:
        """The encoding."""
        return f"{self.spec}, finite, within the declared range"

    def derive(self, facts: Facts) -> Facts:
        """Needs to see the update.

        Raises:
            IndividualUpdatesNeeded: Only a sum is visible.
        """
        return _seen(self, facts)

    def unbias_factor(self, facts: Facts) -> float:
        """The codec's; 1 with error feedback, which sends later what it leaves out now."""
        return 1.0 if self.spec.error_feedback else Codec(self.spec, facts.size).unbias_factor

    def decode(self, update: EncodedUpdate, facts: Facts) -> Float32Array:
        """The dense vector; see ``stages.Decode``."""
        if isinstance(update.payload, np.ndarray):
            raise ShapeMismatch(f"update {update.number} must be the bytes of {self.spec}")
        vector = Codec(self.spec, facts.size).decode(update.payload, update.seed)
        check_values(vector, facts.max_abs)
        return vector


@dataclass(frozen=True)
class NoClip:
    """Updates pass as they are; nothing bounds their norm."""

    @property
    def slot(self) -> Slot:
        """``clip``."""
        return Slot.CLIP

    @property
    def title(self) -> str:
        """Says that there is no bound."""
        return "none"

    def derive(self, facts: Facts) -> Facts:
        """Changes nothing."""
        return facts

    def clip(self, vector: Float32Array) -> tuple[Float32Array, float | None, bool]:
        """The vector itself."""
        return vector, None, False


@dataclass(frozen=True)
class ClipGlobal:
    """Scales an update down to an L2 norm of at most ``clip_norm`` over all its coordinates."""

    clip_norm: float

    def __post_init__(self) -> None:
        _check_clip_norm(self.clip_norm)

    @property
    def slot(self) -> Slot:
        """``clip``."""
        return Slot.CLIP

    @property
    def title(self) -> str:
        """The bound."""
        return f"L2 norm of the whole update <= {self.clip_norm:g}"

    def derive(self, facts: Facts) -> Facts:
        """Enforces a norm bound, and with it a bound on every value."""
        return _bounded(_seen(self, facts), self.clip_norm)

    def clip(self, vector: Float32Array) -> tuple[Float32Array, float | None, bool]:
        """The vector within the bound; see ``stages.Clip``."""
        result = clip_global(vector, self.clip_norm)
        return result.vector, result.norm, result.clipped


@dataclass(frozen=True)
class ClipLayers:
    """Scales each layer down to a norm of its own: ``clip_norm * sqrt(layer size / size)``.

    Attributes:
        clip_norm: Bound of the whole, to which the layers' bounds add up in squares.
        layers: First and last (exclusive) coordinate of each layer, in order, without gaps.
    """

    clip_norm: float
    layers: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        _check_clip_norm(self.clip_norm)
        at = 0
        for start, end in self.layers:
            if start != at or end <= start:
                raise ConfigurationError(f"layers must follow each other without gaps, got {start}..{end} after {at}")
            at = end

    @property
    def slot(self) -> Slot:
        """``clip``."""
        return Slot.CLIP

    @property
    def title(self) -> str:
        """The bound."""
        return f"L2 norm of each of {len(self.layers)} layers, in all <= {self.clip_norm:g}"

    def derive(self, facts: Facts) -> Facts:
        """Enforces a norm bound, and with it a bound on every value."""
        if not self.layers or self.layers[-1][1] != facts.size:
            raise ConfigurationError(f"the layers to clip do not cover the {facts.size} coordinates of an update")
        return _bounded(_seen(self, facts), joint_clip_norm(self._norms))

    @property
    def _norms(self) -> list[float]:
        size = self.layers[-1][1]
        return [self.clip_norm * math.sqrt((end - start) / size) for start, end in self.layers]

    def clip(self, vector: Float32Array) -> tuple[Float32Array, float | None, bool]:
        """The vector within the bound; see ``stages.Clip``."""
        result = clip_layers(vector, [slice(start, end) for start, end in self.layers], self._norms)
        return result.vector, math.hypot(*(layer.norm for layer in result.layers)), result.clipped


def _check_clip_norm(clip_norm: float) -> None:
    if not SMALLEST_CLIP_NORM <= clip_norm <= LARGEST_CLIP_NORM:
        raise ConfigurationError(
            f"clip_norm must lie within {SMALLEST_CLIP_NORM:.2g} and {LARGEST_CLIP_NORM:.2g}, got {clip_norm:g}"
        )


def _seen(stage: DecodeDense | DecodeCompressed | ClipGlobal | ClipLayers, facts: Facts) -> Facts:
    if facts.visibility is not Visibility.INDIVIDUAL:
        raise IndividualUpdatesNeeded(
            f"'{stage.title}' ({stage.slot}) looks at single updates, but only their sum is visible here; "
            "leave it to the devices and declare their norm_bound"
        )
    return facts


def _bounded(facts: Facts, clip_norm: float) -> Facts:
    bound = clip_norm if facts.norm_bound is None else min(clip_norm, facts.norm_bound)
    return replace(facts, norm_bound=bound, max_abs=bound if facts.max_abs is None else min(bound, facts.max_abs))


if TYPE_CHECKING:
    _validates: type[Validate] = ValidateFacts
    _decodes: tuple[type[Decode], ...] = (DecodeDense, DecodeCompressed)
    _clips: tuple[type[Clip], ...] = (NoClip, ClipGlobal, ClipLayers)
