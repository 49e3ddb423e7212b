"""Makes and judges personal models: a few steps on some of a device's examples, judged by the others. No files here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from client_sdk.adaptation import Adaptation
from client_sdk.checkpoint import data_fingerprint
from client_sdk.data import Examples, Int64Array
from client_sdk.inference import PersonalInference
from client_sdk.personal_merge import merged, steps_after
from client_sdk.personal_model import PersonalModel, weights_hash
from client_sdk.personalization import Judgement, MergePolicy, PersonalRecord, Retention
from client_sdk.protocol.errors import ProgramInputError, TrainingDiverged
from client_sdk.protocol.meta_learning import ExampleSplit
from client_sdk.protocol.program import Float32Array, Program

_CLEARLY: Final = 2.0
"""So many times the loss of the former personal model is clearly worse, if fewer answers are right as well."""


@dataclass(frozen=True)
class GlobalWeights:
    """A global model as a device begins with it.

    Attributes:
        weights: float32 ``[d]``; where a task has personal layers, with the device's own in their place.
        version: The server's.
    """

    weights: Float32Array
    version: int


@dataclass(frozen=True)
class Personalizer:
    """A device that adapts a global model to its examples, and judges what comes of it.

    Attributes:
        adaptation: How, and with what.
    """

    adaptation: Adaptation

    def personalize(self, base: GlobalWeights, examples: Examples) -> PersonalModel:
        """Adapt a global model, and choose between it and what came of it.

        The choice goes by the mean loss over the examples that did not adapt it (``ExampleSplit``): the adapted model
        serves unless its loss is higher. Of one example, or of equal ones, none is left to judge, and it serves
        unvalidated.

        Raises:
            NotEnoughExamples: There are none.
            TrainingPaused: The device's conditions do not allow it now.
            Interrupted: ``should_stop`` said so.
            MemoryBudgetExceeded: It does not fit into the device's memory.
            TrainingDiverged: Weights stopped being finite.
            ProgramError, ConfigurationError: The program cannot do it, or the examples do not fit it.
        """
        return self._chosen(base, examples, start=base.weights, steps=self.adaptation.config.inner_steps)[0]

    def merge(self, base: GlobalWeights, examples: Examples, old: PersonalModel) -> PersonalModel:
        """Bring a personal model together with a newer global one, as the policy says, and measure what is kept.

        A global model may be worse than the one before, by accident or by somebody's intent. So the former personal
        model stays, but with ``replace``, where the best that can be made of the new global model is clearly worse on
        the examples that judge: fewer right answers, and twice the loss. (Few examples judge roughly: were the lower
        loss enough, chance would hold devices back. New examples may have moved some there that once adapted it.)

        Args:
            base: The newer one.
            examples: The device's, of now.
            old: Of the same program.

        Returns:
            A new personal model; or ``old`` itself.

        Raises:
            See ``personalize``.
        """
        config = self.adaptation.config
        start = merged(old, base.weights, config)
        new, query = self._chosen(base, examples, start=start, steps=steps_after(config))
        # What a refitted model had is unknown: the examples that would judge have adapted it.
        if not len(query[0]) or config.refit or old.record.config.refit:
            return new
        old_global, old_personal, new_global, of_start, served = (
            judge(self.adaptation.local.program, weights, *query)
            for weights in (old.global_weights, old.weights, base.weights, start, new.weights)
        )
        worse = served.correct < old_personal.correct and served.loss > _CLEARLY * old_personal.loss
        if worse and config.merge is not MergePolicy.REPLACE:
            return old
        retention = Retention(
            before=old_personal.gain_over(old_global),
            renewed=new_global.gain_over(old_global),
            merged=of_start.gain_over(new_global),
            after=served.gain_over(new_global),
        )
        return replace(new, record=new.record.model_copy(update={"retention": retention}))

    def _chosen(
        self, base: GlobalWeights, examples: Examples, *, start: Float32Array, steps: int
    ) -> tuple[PersonalModel, Examples]:
        """The better one, and the examples that judge, of which there may be none."""
        x, y = examples
        adaptation, program = self.adaptation, self.adaptation.local.program
        split = ExampleSplit.of(x, y, adaptation.config.val_split, require_query=False)
        query = x[split.query], y[split.query]
        own = adaptation.adapted(start, examples, split.support, steps)
        adapted, of_global, of_personal = own is not base.weights, None, None
        if len(split.query):
            of_global, of_personal = judge(program, base.weights, *query), judge(program, own, *query)
            adapted = adapted and of_personal.loss <= of_global.loss
            if adapted and adaptation.config.refit:
                own = adaptation.adapted(start, examples, np.arange(len(x)), steps)
        record = PersonalRecord(
            program_sha256=program.manifest.program_sha256,
            parameter_table_sha256=program.manifest.parameter_table_sha256,
            model_version=base.version,
            global_sha256=weights_hash(base.weights),
            data_sha256=data_fingerprint(*examples),
            config=adaptation.config,
            adapted=adapted,
            steps=steps,
            support_examples=len(split.support),
            query_examples=len(split.query),
            of_global=of_global,
            of_personal=of_personal,
        )
        return PersonalModel(own if adapted else base.weights, base.weights, record), query


def judge(program: Program, weights: Float32Array, x: Float32Array, y: Int64Array) -> Judgement:
    """How weights do on examples, by the program's ``infer`` methods.

    Args:
        program: Has them.
        weights: float32 ``[d]``.
        x: float32 ``[n, *feature_shape]``, n at least 1.
        y: int64 ``[n]``, labels in ``[0, num_classes)``.

    Raises:
        UnknownMethod, ProgramInputError, ProgramExecutionError: See ``PersonalInference``.
        TrainingDiverged: The loss is not finite.
    """
    logits = PersonalInference(program, weights).logits(x).astype(np.float64)
    if not len(y) or not (y.min() >= 0 and y.max() < logits.shape[1]):
        raise ProgramInputError(f"a model is judged by at least one example, with labels in [0, {logits.shape[1]})")
    largest = logits.max(axis=1)
    log_sums = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    losses = log_sums - logits[np.arange(len(y)), y]
    loss = float(losses.mean())
    if not math.isfinite(loss):
        raise TrainingDiverged(f"the model gives a loss of {loss} on its own examples")
    # Rounding may leave the loss of a sure answer a trifle below 0.
    return Judgement(examples=len(y), correct=int((logits.argmax(axis=1) == y).sum()), loss=max(0.0, loss))
