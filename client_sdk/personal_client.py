"""The facade for an app whose model fits its owner: a ``MobileClient`` that also adapts, keeps and serves its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy.typing as npt

from client_sdk import events
from client_sdk.adaptation import Adaptation, best_size, check_conditions
from client_sdk.checkpoint import data_fingerprint
from client_sdk.client import MobileClient, RunSummary
from client_sdk.data import Examples, Int64Array, as_examples
from client_sdk.errors import NoPersonalModel, PrivacyRefusal, TrainingPaused
from client_sdk.global_model import GlobalModel, ModelSource
from client_sdk.inference import PersonalInference, Precision, known_precision
from client_sdk.local_training import Weights, flat
from client_sdk.personal_model import PersonalModel, weights_hash
from client_sdk.personal_store import PersonalModelStore
from client_sdk.personalization import Judgement, PersonalizationConfig
from client_sdk.personalizer import GlobalWeights, Personalizer, judge
from client_sdk.programs import NamesProgram
from client_sdk.protocol.errors import ConfigurationError, NotEnoughExamples, PocketfedError
from client_sdk.protocol.meta_learning import MetaAlgorithm, MetaPlan
from client_sdk.protocol.profile import DeviceProfile
from client_sdk.protocol.program import Float32Array, Manifest, Program, Role
from client_sdk.protocol.training import TrainingPlan
from client_sdk.protocol.updates import WorkerGradient
from client_sdk.stopping import Stopper

_METHODS: Mapping[MetaAlgorithm, tuple[Role, ...]] = {
    "maml": (Role.MAML,),
    "fomaml": (Role.FOMAML, Role.GRAD),
    "reptile": (Role.REPTILE, Role.ADAPT, Role.TRAIN, Role.GRAD),
    "per-fedavg": (Role.PER_FEDAVG,),
}
"""Roles whose batch sizes an algorithm can be trained in."""


class PersonalizedMobileClient(MobileClient):
    """One device with a model of its own. What ``MobileClient`` does, it does.

    The personal model is made from a global one by some steps on the device's own examples, judged by others of them,
    and served instead. After each ``run`` and ``run_for`` it is brought together with the server's newest model.

    Attributes:
        personalization_config: The app's choices.
    """

    def __init__(
        self,
        program: Program | None,
        device_profile: DeviceProfile,
        *,
        personalization_config: PersonalizationConfig | None = None,
        personal_models: PersonalModelStore | None = None,
        precision: str = Precision.FLOAT,
        **settings: Any,  # noqa: ANN401 - MobileClient's own, which it checks
    ) -> None:
        """Put a device together; nothing is sent, loaded or adapted yet.

        Args:
            program: As ``MobileClient`` takes it.
            device_profile: Likewise.
            personalization_config: How to adapt. What it leaves at its defaults follows the plan of a server's task.
            personal_models: Where the personal model is kept; None keeps it in memory, for as long as the client lives.
            precision: What it is served in, see ``PersonalInference``: float, int8, or auto.
            settings: All others of ``MobileClient``.

        Raises:
            ConfigurationError: An unknown precision, or see ``MobileClient``.
        """
        super().__init__(program, device_profile, **settings)
        self.personalization_config = personalization_config or PersonalizationConfig()
        self._models = personal_models
        self._precision = known_precision(precision)
        self._newest: GlobalModel | None = None
        self._own: PersonalModel | None = None
        self._own_is_for: str | None = None
        self._served: tuple[Program, Float32Array, PersonalInference] | None = None

    # --- adapting ---

    def train_with_personalization(
        self,
        local_data: Any,  # noqa: ANN401 - arrays, tensors and loaders have no common type
        global_model_state: Weights,
        algorithm: MetaAlgorithm = "maml",
        *,
        model_version: int = 0,
    ) -> WorkerGradient | None:
        """Compute what a server learns to adapt from, and adapt the personal model to the same examples.

        The update is an ordinary one, of kind gradient (maml, fomaml, per-fedavg) or delta (reptile): it passes
        clipping, noise and secret sharing as any other. Nothing else of the adapted model is in it.

        Args:
            local_data: ``(x, y)`` or an iterable of such batches.
            global_model_state: The global weights: flat float32 ``[d]``, or name -> array.
            algorithm: What the server trains by.
            model_version: Of the global weights; comes back in the metadata.

        Returns:
            The update per parameter; None if the device's conditions did not allow to train, and then nothing has
            changed. Where the update is there and adapting the personal model then fails, an event says why.

        Raises:
            NotEnoughExamples: Fewer than two different ones; reptile needs one.
            UnknownMethod: The program was not exported for it; the message says how to.
            ConfigurationError, ProgramError, MemoryBudgetExceeded, TrainingDiverged: See ``train_local_model``.
        """
        if algorithm not in _METHODS:
            raise ConfigurationError(f"unknown algorithm {algorithm!r}; choose one of {list(_METHODS)}")
        examples = as_examples(local_data)
        config = self.personalization_config
        plan = TrainingPlan(
            algorithm=algorithm,
            batch_size=config.batch_size or best_size(_sizes(self._embedded().manifest, algorithm), len(examples[0])),
            learning_rate=config.inner_lr,
            shuffle=config.shuffle,
            meta=MetaPlan(
                inner_steps=config.inner_steps, query_fraction=config.val_split, meta_learning_rate=config.meta_lr
            ),
        )
        update = self.train_local_model(
            examples, model_version, weights=global_model_state, plan=plan, shuffle_seed=config.seed
        )
        if update is not None:
            # The update is done, and the server's: nothing that fails from here on takes it away.
            with self._reporting():
                self.personalize(examples, global_weights=global_model_state, model_version=model_version)
        return update

    def personalize(
        self,
        data: Any = None,  # noqa: ANN401 - as above
        *,
        global_weights: Weights,
        model_version: int,
    ) -> PersonalModel:
        """Adapt a global model to the device's examples; what came of it takes the place of the former one.

        It is kept before this returns. Whatever fails, or kills the process, leaves the former one.

        Args:
            data: The examples; by default the client's own.
            global_weights: Flat float32 ``[d]``, or name -> array.
            model_version: Theirs.

        Returns:
            The personal model and its record; ``record.adapted`` is false where the global weights serve, because the
            examples that judge have said so.

        Raises:
            NotEnoughExamples, TrainingPaused, ProgramError: See ``Personalizer.personalize``, which has more.
            StateDirUnusable: It could not be kept.
        """
        program = self._program_now()
        base = GlobalWeights(flat(global_weights, program.manifest), model_version)
        return self._keep(self._personalizer(program).personalize(base, self._examples(data)))

    def on_global_model(self, weights: Weights, version: int, data: Any = None) -> PersonalModel:  # noqa: ANN401
        """Bring the personal model together with a newer global one, as ``personalization_config.merge`` says.

        Where there is none yet, ``personalize``. One of another program is set aside, with an event.

        Args:
            weights: Flat float32 ``[d]``, or name -> array.
            version: Theirs.
            data: The examples that adapt and judge; by default the client's own.

        Raises:
            See ``personalize``.
        """
        program = self._program_now()
        base = GlobalWeights(flat(weights, program.manifest), version)
        return self._merge(self._personalizer(program), base, self._examples(data))

    # --- serving ---

    @property
    def personal_model(self) -> PersonalModel | None:
        """The personal model of the present program; None where there is none yet.

        Raises:
            ConfigurationError: There is no program yet.
            CheckpointKeyError: It was written with another key, or with one where none is given.
            StateDirUnusable: It cannot be read.
        """
        return self._former(self._program_now().manifest)

    def infer_with_personalized_model(self, x: npt.ArrayLike) -> Float32Array:
        """Logits of the personal model; of the global weights where there is no personal one yet.

        Args:
            x: Float32 ``[n, *feature_shape]``, any n.

        Returns:
            Float32 ``[n, num_classes]``.

        Raises:
            NoPersonalModel: There are no weights at all.
            UnknownMethod, Int8Refused, ProgramInputError, ProgramExecutionError: See ``PersonalInference``.
        """
        return self.inference().logits(x)

    def inference(self) -> PersonalInference:
        """What serves, with its latency and memory; good until the next adaptation.

        Raises:
            See ``infer_with_personalized_model``.
        """
        program = self._program_now()
        weights, of_all = self._weights_now(program.manifest)
        if self._served is None or self._served[0] is not program or self._served[1] is not weights:
            inference = PersonalInference(program, weights, precision=self._precision, global_weights=of_all)
            self._served = program, weights, inference
        return self._served[2]

    def evaluate(self, x: Float32Array, y: Int64Array) -> Judgement:
        """How the model that serves does on examples, in float.

        Args:
            x: Float32 ``[n, *feature_shape]``, n at least 1.
            y: int64 ``[n]``.

        Raises:
            See ``infer_with_personalized_model``.
        """
        program = self._program_now()
        return judge(program, self._weights_now(program.manifest)[0], *as_examples((x, y)))

    # --- with a server ---

    def fetch_global_model(self) -> GlobalModel:
        """The task's newest model, whether or not this device was given work; it serves until there is a personal one.

        Raises:
            ConfigurationError: No transport.
            BundleMismatch: Model, program and manifest do not belong together.
            PocketfedError: The server refuses, cannot be reached, or what it gives cannot be used here.
        """
        self._newest = ModelSource(self._networked()).newest()
        return self._newest

    def _run(self, stop: Stopper, max_reports: int | None) -> RunSummary:
        summary = super()._run(stop, max_reports)
        # Who will not send, its own budget being spent say, may still receive: adapting tells nobody anything.
        if (summary.error is None or isinstance(summary.error, PrivacyRefusal)) and not stop.is_set():
            self._renew(stop)
        return summary

    def _renew(self, stop: Stopper) -> None:
        """Bring the personal model up to date. The run has done its work: nothing that fails here undoes it."""
        with self._reporting():
            check_conditions(self._power, self._conditions)
            newest = self.fetch_global_model()
            program = self._program_now()
            personalizer = self._personalizer(program, stop)
            base = GlobalWeights(newest.weights, newest.version)
            if not self._is_up_to_date(personalizer, base):
                self._merge(personalizer, base, self._examples(None))

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """What keeps the device from a new personal model is told, and nothing worse."""
        try:
            yield
        except TrainingPaused as e:
            self._on_event(events.Paused("adaptation", e.reason, str(e)))
        except MemoryError:
            self._on_event(events.NotPersonalized("the device ran out of memory while it adapted the model"))
        except PocketfedError as e:
            self._on_event(events.NotPersonalized(str(e)))

    # --- pieces ---

    def _program_now(self) -> Program:
        """The app's own, else that of the newest model, else that of the personal model of an earlier process."""
        if self._program is not None:
            return self._program
        names: NamesProgram | None = None if self._newest is None else self._newest.reply
        if names is None and self._models is not None and (kept := self._models.newest()) is not None:
            names = kept.record.program_names
        if names is None or self._executor is None:
            raise ConfigurationError("there is no program yet: give the client one, or fetch_global_model first")
        return ModelSource(self._executor).program(names)

    def _personalizer(self, program: Program, stop: Stopper | None = None) -> Personalizer:
        config, newest = self.personalization_config, self._newest
        if newest is not None and newest.reply.program_sha256 == program.manifest.program_sha256:
            config = config.for_task(newest.reply.plan)
        should_stop = (lambda: False) if stop is None else stop.is_set
        return Personalizer(Adaptation(self._local(program), config, self._conditions, should_stop))

    def _examples(self, data: Any) -> Examples:  # noqa: ANN401 - as above
        if data is not None:
            return as_examples(data)
        if self._data is None:
            raise NotEnoughExamples("there are no examples to adapt with: give the client its data, or the call some")
        return self._data

    def _former(self, manifest: Manifest) -> PersonalModel | None:
        """The personal model of this program, looked for once; one of another is set aside."""
        if self._own_is_for == manifest.program_sha256:
            return self._own
        models = self._models
        last = self._own if models is None else models.newest()
        self._own = models.load(manifest) if models is not None else None
        self._own_is_for = manifest.program_sha256
        if last is not None and not last.is_of(manifest):
            self._on_event(events.PersonalModelSetAside(last.record.model_version, last.record.program_sha256))
        return self._own

    def _is_up_to_date(self, personalizer: Personalizer, base: GlobalWeights) -> bool:
        """Whether adapting again would make the same model again."""
        former = self._former(personalizer.adaptation.local.program.manifest)
        return (
            former is not None
            and former.record.config == personalizer.adaptation.config
            and former.record.global_sha256 == weights_hash(base.weights)
            and former.record.data_sha256 == data_fingerprint(*self._examples(None))
        )

    def _merge(self, personalizer: Personalizer, base: GlobalWeights, examples: Examples) -> PersonalModel:
        former = self._former(personalizer.adaptation.local.program.manifest)
        if former is None or former.record.global_sha256 == weights_hash(base.weights):
            # Of the same global model there is nothing to merge: new examples, or other choices, adapt it anew.
            return self._keep(personalizer.personalize(base, examples))
        model = personalizer.merge(base, examples, former)
        if model is former:
            self._on_event(
                events.NotPersonalized(
                    f"the device's examples speak against model {base.version}: the former one serves"
                )
            )
            return former
        return self._keep(model)

    def _keep(self, model: PersonalModel) -> PersonalModel:
        newest = self._newest
        if newest is not None and newest.reply.program_sha256 == model.record.program_sha256:
            record = model.record.model_copy(update={"manifest_sha256": newest.reply.manifest_sha256})
            model = replace(model, record=record)
        if self._models is not None:
            self._models.save(model)
        self._own, self._own_is_for = model, model.record.program_sha256
        self._on_event(events.Personalized(model.record))
        return model

    def _weights_now(self, manifest: Manifest) -> tuple[Float32Array, Float32Array | None]:
        """What serves, and the global weights that it comes from, where they are known."""
        own, newest = self._former(manifest), self._newest
        if own is not None:
            return own.weights, own.global_weights
        if newest is not None and newest.reply.program_sha256 == manifest.program_sha256:
            return newest.weights, newest.weights
        if self._weights is not None:
            self._weights = flat(self._weights, manifest)
            return self._weights, self._weights
        raise NoPersonalModel("there are no weights to serve: personalize, fetch_global_model, or give the client some")


def _sizes(manifest: Manifest, algorithm: MetaAlgorithm) -> set[int]:
    """Batch sizes that the program has for an algorithm; where it has none, those that its export is to be told."""
    own = {size for role in _METHODS[algorithm] for size in manifest.batch_sizes(role)}
    return own or {size for role in (Role.GRAD, Role.TRAIN) for size in manifest.batch_sizes(role)} or {8}
