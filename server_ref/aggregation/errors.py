"""Why a pipeline is not built. Each refusal is a class of its own, and its message says what to change."""

from __future__ import annotations

from client_sdk.protocol.errors import ConfigurationError, PocketfedError


class PipelineError(ConfigurationError):
    """Stages that do not make a sound pipeline."""


class SlotFilledTwice(PipelineError):
    """Two stages claim one slot; their order would decide what happens."""


class SlotMissing(PipelineError):
    """A slot that every pipeline needs is empty."""


class UnboundedRange(PipelineError):
    """An exact sum is asked for, and nothing bounds the values."""


class UnboundedWeight(PipelineError):
    """Sample or staleness weights without a declared maximum."""


class IndividualUpdatesNeeded(PipelineError):
    """A stage that must see single updates is given their sum only."""


class UndeclaredRescaling(PipelineError):
    """Single updates are rescaled after clipping by something that is not a declared public weight."""


class UnderstatedSensitivity(PipelineError):
    """A sensitivity is declared that is smaller than the proved one."""


class DataDependentSupport(PipelineError):
    """Noise is asked for, and which coordinates of an update are sent depends on its data."""


class CohortDependentAcceptance(PipelineError):
    """Noise is asked for, and whether an update counts depends on the others'."""


class UnknownSensitivity(PipelineError):
    """Noise is asked for, and no sensitivity is proved for the aggregate under this adjacency."""


class NoiseUseless(PipelineError):
    """Noise is asked for on a rule whose outcome one client can change entirely: it would have to hide all of it."""


class NoiseMissing(PipelineError):
    """The pipeline must only release private aggregates, and no stage adds noise."""


class NoiseUnexpected(PipelineError):
    """The noise stage does not fit what reaches it."""


class MixedKinds(ConfigurationError):
    """Workers of one round send deltas and gradients, and nobody declared which of them count."""


class BufferNotFull(PocketfedError):
    """A private aggregate is of a declared number of updates, and fewer were accepted: they wait for more."""


class PrivacyError(PocketfedError):
    """Something about the account of what releases have cost. Nothing was released, and nothing was charged."""


class PrivacyBudgetExhausted(PrivacyError):
    """A release would cost more than what is left of the budget."""


class UnsupportedPrivacyEvent(PrivacyError):
    """A release of a kind that this ledger cannot account for."""


class AdjacencyMismatch(PrivacyError):
    """A release whose noise was calibrated for another adjacency than the ledger's: their epsilons do not add up."""


class RoundAlreadyCharged(PrivacyError):
    """A second release of one round: noise drawn twice for the same sum can be averaged away."""
