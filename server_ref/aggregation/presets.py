"""The specification's classes: thin presets over the pipeline.

None inherits from another. Each fills the slot it is about and takes the others' choices as keywords; ``Intake`` does
the work. (``CompressedGradientAggregator`` is in ``compressed``.) What they share:

- Any iterable of ``WorkerGradient`` will do, read once. The mean keeps O(d), whatever the number of workers; a robust
  rule has to keep them all.
- An update that is malformed, not finite, too large or of another model is refused by itself: ``rejections`` says who
  and why, and the others count. Of two updates with one worker id, the first that is accepted counts.
- The aggregate has the model's names, shapes, dtypes, devices and kind (torch or numpy), whatever the workers sent.
- Instances are used by one thread at a time.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Unpack

import numpy as np

from client_sdk.protocol.errors import ConfigurationError, ProtocolError
from client_sdk.protocol.updates import WorkerGradient
from server_ref.aggregation.batch import Float64Array
from server_ref.aggregation.intake import Intake, RefusedUpdate
from server_ref.aggregation.reduce import BaselineMean, ExactMean
from server_ref.aggregation.robust import RuleOptions
from server_ref.aggregation.robust_reduce import RobustRule
from server_ref.aggregation.settings import AggregationMethod, IntakeOptions, IntakeSettings, MethodOptions
from server_ref.aggregation.stages import Reduce
from server_ref.aggregation.summation import Summation
from server_ref.aggregation.tensors import AggregatedUpdate

OnRejected = Callable[[RefusedUpdate], None]


class GradientAggregator:
    """The weighted mean of workers' updates: exact, and so independent of their order, to the last bit.

    Args:
        aggregation_method: ``fedavg``; ``fedprox`` (the same on a server); ``scaffold``: workers send deltas, and the
            delta of their control variate in ``metadata["control_delta"]``, the aggregator keeps ``server_control``;
            ``fednova``: workers send deltas and ``metadata["local_steps"]``.
        clip_norm: Largest L2 norm of an update before it is weighted (for scaffold: of both vectors together).
        compensation_enabled: False sums in float32 without any care, as a baseline of what that costs. True sums
            exactly, which compensation (Kahan's summation) only approximates; ``summation="kahan"`` has it by name.
        summation: ``exact`` (float64 bins), ``fixed`` (the int64 grid of the secret-shared path; needs ``max_abs`` and
            ``max_workers`` that leave it enough bits), or a baseline: a name of ``Summation``.
        resolution: Smallest magnitude that ``exact`` adds without rounding.
        on_rejected: Called with each refusal.
        **options: See ``IntakeSettings``: ``clip_scope``, ``max_weight``, ``max_abs``, ``max_workers``, ``kind``, ...

    Raises:
        ConfigurationError: Settings that do not go together; the message says what to change.
        BudgetExceeded: Bounds within which no exact sum is possible.

    Example:
        >>> aggregator = GradientAggregator(clip_norm=1.0)
        >>> ones = {"w": np.ones(2, np.float32)}
        >>> workers = [WorkerGradient(f"w{i}", ones, num_samples=10, timestamp=0.0) for i in range(3)]
        >>> aggregator.aggregate(workers, {"w": np.zeros(2, np.float32)})["w"].round(4)
        array([0.7071, 0.7071], dtype=float32)
    """

    def __init__(
        self,
        aggregation_method: str = "fedavg",
        clip_norm: float | None = None,
        compensation_enabled: bool = True,
        *,
        summation: str | None = None,
        resolution: float = 1e-8,
        on_rejected: OnRejected | None = None,
        **options: Unpack[IntakeOptions],
    ) -> None:
        settings = IntakeSettings.parse({"aggregation_method": aggregation_method, "clip_norm": clip_norm, **options})
        if not compensation_enabled and summation not in {None, Summation.NAIVE_FLOAT32}:
            raise ConfigurationError(
                f"compensation_enabled=False asks for the float32 sum, summation={summation!r} for another; drop one"
            )
        chosen = summation or ("exact" if compensation_enabled else Summation.NAIVE_FLOAT32)
        renormalise = settings.aggregation_method is AggregationMethod.FEDNOVA
        self._intake = Intake(_mean(chosen, resolution, renormalise=renormalise), settings, on_rejected=on_rejected)
        self._server_control: Float64Array | None = None

    @property
    def rejections(self) -> tuple[RefusedUpdate, ...]:
        """Who was refused in the last ``aggregate``, and why."""
        return self._intake.rejections

    @property
    def server_control(self) -> Float64Array | None:
        """SCAFFOLD's server control variate, float64[d] in the model's order; None before the first round."""
        return None if self._server_control is None else self._server_control.copy()

    def aggregate(
        self, worker_gradients: Iterable[WorkerGradient], server_model_state: Mapping[str, Any]
    ) -> AggregatedUpdate:
        """The weighted mean of the accepted updates.

        Guarantees: for ``exact`` and ``fixed`` every bit is the same for any order of the workers; for ``exact`` it is
        the correctly rounded sum divided by the total weight, and then rounded to the model's dtype.

        Args:
            worker_gradients: Any iterable, read once.
            server_model_state: The model: names, shapes and dtypes; its values play no part.

        Raises:
            EmptyAggregate: No update is left.
            MixedKinds: Deltas and gradients in one round, and ``kind`` was not declared.
            BudgetExceeded: More workers than ``max_workers``.
            UpdateOutOfRange: The mean does not fit the model's dtype.
        """
        gathered = self._intake.gather(worker_gradients, server_model_state)
        values, size = gathered.aggregate.values, gathered.layout.size
        update = gathered.named(values[:size])
        if self._intake.settings.aggregation_method is AggregationMethod.SCAFFOLD:
            population = self._intake.settings.population or update.count
            before = np.zeros(size) if self._server_control is None else self._server_control
            self._server_control = before + (update.count / population) * values[size:]
        return update

    def check_gradient(self, gradient: WorkerGradient, server_model_state: Mapping[str, Any] | None = None) -> None:
        """Refuse an update that ``aggregate`` would refuse for what it is.

        Args:
            gradient: The update.
            server_model_state: The model it should fit; by default that of the last ``aggregate``. Without either, only
                its values can be checked.

        Raises:
            ProtocolError: The refusal, by its class.
        """
        self._intake.check(gradient, server_model_state)

    def validate_gradient(self, gradient: WorkerGradient, server_model_state: Mapping[str, Any] | None = None) -> bool:
        """Whether ``check_gradient`` lets it pass."""
        return passes(self._intake, gradient, server_model_state)

    def describe(self) -> str:
        """The pipeline's slots as a table."""
        return self._intake.describe()


class ByzantineRobustAggregator:
    """One update of many by a rule that stands some dishonest ones; see ``server_ref.aggregation.robust``.

    What a rule promises is a bounded deviation, not the mean of the honest. Sample counts play no part: a worker
    chooses its own. Whoever was left out is in the result's ``measurements["excluded"]``, by position.

    Args:
        aggregation_rule: A name of ``RULES``: krum, multi-krum, trimmed-mean, median, geometric-median,
            centered-clipping, bulyan.
        num_byzantine: Dishonest workers to stand; 0 means none. None: estimated from each round, which sees only what
            is far away, and so is a lower bound.
        byzantine_fraction: The same as a share of the round's workers.
        rule_options: What the rule can be told besides: ``m``, distance mode, mixing, ``degraded``. With a ``seed``,
            what is drawn repeats from run to run; without, it is the operating system's.
        on_rejected: Called with each refusal.
        **options: See ``IntakeSettings``. ``scaffold`` is not among the methods: no rule here is made for two vectors.

    Raises:
        ConfigurationError: Settings that do not go together, or keywords of differential privacy: noise on a robust
            rule's outcome needs a sensitivity that is proved.
    """

    def __init__(
        self,
        aggregation_rule: str = "krum",
        num_byzantine: int | None = None,
        *,
        byzantine_fraction: float | None = None,
        rule_options: RuleOptions | None = None,
        on_rejected: OnRejected | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        settings = one_vector(IntakeSettings.parse(options))
        self._rule = RobustRule(
            aggregation_rule,
            num_byzantine=num_byzantine,
            byzantine_fraction=byzantine_fraction,
            options=rule_options or RuleOptions(),
            renormalise=settings.aggregation_method is AggregationMethod.FEDNOVA,
        )
        self._intake = Intake(self._rule, settings, on_rejected=on_rejected)
        self._rounds = 0

    @property
    def rejections(self) -> tuple[RefusedUpdate, ...]:
        """Who was refused in the last ``aggregate_byzantine_robust``, and why; the rule never saw them."""
        return self._intake.rejections

    def aggregate_byzantine_robust(
        self, worker_gradients: Iterable[WorkerGradient], server_model_state: Mapping[str, Any]
    ) -> AggregatedUpdate:
        """The rule's outcome for the accepted updates.

        Guarantees: every bit is the same for any order of the workers, but for ties (the first one wins) and for rule
        options that draw.

        Args:
            worker_gradients: Any iterable, read once; all accepted updates are held.
            server_model_state: As for ``GradientAggregator.aggregate``.

        Raises:
            TooManyByzantine: More dishonest workers assumed than the rule stands, and not in degraded mode.
            EmptyAggregate: No update is left.
            MixedKinds: Deltas and gradients in one round, and ``kind`` was not declared.
            UpdateOutOfRange: The outcome does not fit the model's dtype.
        """
        seed = self._rule.options.seed
        # Buckets, peers and sketches are drawn anew in every round; nobody shall know them before the updates are in.
        seed = secrets.randbits(48) if seed is None else seed + self._rounds
        self._intake.reduce = replace(self._rule, seed=seed)
        self._rounds += 1
        gathered = self._intake.gather(worker_gradients, server_model_state)
        return gathered.named(gathered.aggregate.values)

    def validate_gradient(self, gradient: WorkerGradient, server_model_state: Mapping[str, Any] | None = None) -> bool:
        """As ``GradientAggregator.validate_gradient``: about the update alone, not whether it is honest."""
        return passes(self._intake, gradient, server_model_state)

    def describe(self) -> str:
        """The pipeline's slots as a table."""
        return self._intake.describe()


def _mean(summation: str, resolution: float, *, renormalise: bool) -> Reduce:
    if summation == "exact":
        return ExactMean(resolution=resolution, renormalise=renormalise)
    if summation == "fixed":
        return ExactMean(arithmetic="fixed", renormalise=renormalise)
    try:
        baseline = BaselineMean(Summation(summation))
    except ValueError as e:
        raise ConfigurationError(
            f"there is no summation {summation!r}; choose one of exact, fixed, {', '.join(Summation)}"
        ) from e
    if renormalise:
        raise ConfigurationError(f"fednova goes with the exact mean, not with {summation} summation")
    return baseline


def one_vector(settings: IntakeSettings) -> IntakeSettings:
    """The settings, unless their method sends two vectors.

    Raises:
        ConfigurationError: It does.
    """
    if settings.aggregation_method is AggregationMethod.SCAFFOLD:
        raise ConfigurationError("scaffold sends two vectors, and goes with GradientAggregator only")
    return settings


def passes(intake: Intake, gradient: WorkerGradient, model_state: Mapping[str, Any] | None) -> bool:
    """Whether the intake lets an update pass."""
    try:
        intake.check(gradient, model_state)
    except ProtocolError:
        return False
    return True
