"""A task: the bundle, the settings that decide its bits, and the identity that follows from both."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from client_sdk.protocol.errors import ConfigurationError, ProgramHashMismatch, ProtocolError
from client_sdk.protocol.messages import Assignment, F32Encoding, I64SharesEncoding, SecurePlan
from client_sdk.protocol.personal_layers import SharedLayers
from client_sdk.protocol.program import MANIFEST_FILE, PROGRAM_FILE, WEIGHTS_FILE, Manifest
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation.accounting import LedgerKeeper, PrivacyLedger
from server_ref.aggregation.adaptive_clipping import AdaptiveClipNorm
from server_ref.aggregation.pipeline import Pipeline
from server_ref.aggregation.server_state import ServerState
from server_ref.assignments import AssignmentRecord
from server_ref.config import TaskConfig
from server_ref.current_pipeline import CurrentPipeline
from server_ref.methods import require_methods
from server_ref.models import decode_model
from server_ref.privacy_plan import PrivacyPlan
from server_ref.recipe import build_pipeline, compression_of
from server_ref.secure_plan import SharingPlan

# Settings that change a bit of the result. Concurrency, leases and retries change who takes part, which the accepted
# sets record.
_IDENTITY = frozenset(
    {
        "plan",
        "weight_cap",
        "max_abs",
        "resolution",
        "buffer_size",
        "seed",
        "population",
        "aggregation",
        "optimizer",
        "staleness",
        "delay_damping",
        "selection",
        "divergence",
        "privacy",
        "secure",
    }
)


def _settings(config: TaskConfig) -> dict[str, Any]:
    """Those of the identity. A task of an earlier release stays the same one: what is new and off is not there."""
    found = {name: settings for name, settings in config.model_dump(mode="json").items() if name in _IDENTITY}
    # As leases and retries.
    del found["selection"]["patience_s"]
    if not config.plan.adaptive:
        del found["plan"]["adaptive"]
    found["optimizer"]["learning_rate"] = config.server_learning_rate
    return found


@dataclass(frozen=True)
class Task:
    """What the server trains. ``identity_json`` holds every setting that changes a bit of the result.

    Two things here change while rounds go on: ``keeper``, the ledger in memory of a private task, and ``current``, the
    pipeline, where its clip norm is adaptive.
    """

    task_id: str
    identity_json: str
    manifest: Manifest
    manifest_json: bytes
    manifest_sha256: str
    program: bytes
    initial_weights: npt.NDArray[np.float32]
    layers: SharedLayers
    kind: UpdateKind
    current: CurrentPipeline
    compression: str | None
    settings: TaskConfig
    privacy: PrivacyPlan | None = None
    keeper: LedgerKeeper | None = None
    sharing: SharingPlan | None = None

    @property
    def pipeline(self) -> Pipeline:
        """What is made of the updates of the present model version."""
        return self.current.pipeline

    @property
    def clip_norm(self) -> AdaptiveClipNorm | None:
        """That of the present model version, where it is adaptive."""
        return self.current.clip_norm

    def announced(self, plan: SecurePlan) -> SecurePlan:
        """What devices are told with the present model version: the plan of the first, but for what has moved."""
        if self.clip_norm is None:
            return plan
        norm = self.clip_norm.clip_norm
        return plan.model_copy(update={"clip_norm": norm, "indicator_norm": norm})

    def initial_state(self, weights: npt.NDArray[np.float32] | None = None) -> ServerState:
        """The server's state before the first round: of the shared coordinates alone.

        Args:
            weights: The whole model, float32[d]; None: the bundle's.
        """
        whole = self.initial_weights if weights is None else weights
        return self.pipeline.optimizer.initial(self.layers.gather(whole))

    def whole_weights(self, state: ServerState) -> npt.NDArray[np.float32]:
        """The model that devices get, float32[d].

        Its personal layers, of which nothing is ever known here, are the bundle's bit for bit: what a device begins
        with.
        """
        if not self.layers.personal:
            return state.weights
        return self.layers.with_shared(self.initial_weights, state.weights)

    def shuffle_seed(self, assignment_number: int) -> int:
        """Seed of one assignment's shuffles."""
        return self._seed("shuffle", assignment_number)

    def compression_seed(self, record: AssignmentRecord) -> int:
        """Public randomness of one assignment's compression; 0 where nothing is compressed.

        One for each assignment: devices that round by the same draws all err to the same side, and the mean with them.
        Shares of one sum must be at the same coordinates, which one seed for the round decides.
        """
        if self.sharing is not None:
            return self.round_seed(record.round_id)
        return 0 if self.compression is None else self._seed("compression", record.number)

    def round_seed(self, round_id: int) -> int:
        """Seed of the coordinates that the shared updates of a round are at; 0 where they are at all of them."""
        return 0 if self.compression is None else self._seed("round", round_id)

    def _seed(self, purpose: str, number: int) -> int:
        """53 bits, so that every JSON reader keeps them."""
        digest = hashlib.sha256(f"{purpose}:{self.settings.seed}:{number}".encode("ascii")).digest()
        return int.from_bytes(digest[:8], "big") >> 11

    def assignment(
        self,
        record: AssignmentRecord,
        *,
        model_sha256: str,
        control_sha256: str | None,
        now: float,
        max_report_bytes: int,
        secure: SecurePlan | None = None,
    ) -> Assignment:
        """The message that gives a device its work; ``secure`` where its update is to be shared."""
        return Assignment(
            assignment_id=record.assignment_id,
            assignment_number=record.number,
            task_id=self.task_id,
            round_id=record.round_id,
            model_version=record.model_version,
            model_sha256=model_sha256,
            program_sha256=self.manifest.program_sha256,
            manifest_sha256=self.manifest_sha256,
            parameter_table_sha256=self.manifest.parameter_table_sha256,
            kind=self.kind,
            encoding=F32Encoding(max_abs=self.settings.max_abs) if secure is None else I64SharesEncoding(),
            weight=record.weight,
            compression=self.compression,
            compression_seed=self.compression_seed(record),
            control_sha256=control_sha256,
            plan=self.settings.plan,
            shuffle_seed=self.shuffle_seed(record.number),
            lease_s=max(0.0, record.deadline - now),
            max_report_bytes=max_report_bytes,
            secure=secure,
            withhold_metrics=self.settings.withholds_loss,
        )


def load_task(config: TaskConfig) -> Task:
    """Read and check a bundle.

    Raises:
        ConfigurationError: Files missing, weights that do not fit, or a plan that the program cannot train.
        ManifestError: Unreadable manifest.
        ProgramHashMismatch: The program or the weights are not those of the manifest.
        BudgetExceeded: The declared bounds leave no exact sum.
        PipelineError: Settings of the aggregation that do not go together.
    """
    try:
        manifest_json, program, frame = (
            (config.bundle / name).read_bytes() for name in (MANIFEST_FILE, PROGRAM_FILE, WEIGHTS_FILE)
        )
    except OSError as e:
        raise ConfigurationError(
            f"{config.bundle} is not an exported bundle ({e.strerror}: {e.filename}); make one with `pocketfed export`"
        ) from e
    manifest = Manifest.from_json(manifest_json)
    if hashlib.sha256(program).hexdigest() != manifest.program_sha256:
        raise ProgramHashMismatch(f"{config.bundle / PROGRAM_FILE} is not the program its manifest describes")
    if hashlib.sha256(frame).hexdigest() != manifest.initial_weights_sha256:
        raise ProgramHashMismatch(f"{config.bundle / WEIGHTS_FILE} are not the weights its manifest describes")
    require_methods(config.plan, manifest)
    try:
        weights = decode_model(0, frame, manifest).weights
    except ProtocolError as e:
        raise ConfigurationError(f"{config.bundle / WEIGHTS_FILE}: {e.detail}") from e
    privacy = PrivacyPlan.of(config)
    keeper = None if privacy is None else LedgerKeeper(PrivacyLedger(budget=privacy.budget))

    def build(adaptive: AdaptiveClipNorm | None) -> Pipeline:
        settings = config if adaptive is None else config.clipped_to(adaptive.clip_norm)
        return build_pipeline(settings, manifest, privacy=privacy, keeper=keeper)

    current = CurrentPipeline(build, None if privacy is None else privacy.clip_norm)
    pipeline = current.pipeline
    sharing = SharingPlan.of(config, pipeline.entry.size, pipeline.admitted.max_scale, privacy)
    if sharing is None:
        # An exact sum that the bounds do not allow is an error of the settings, not of the first report.
        pipeline.start()
    compression = compression_of(config)
    manifest_sha256 = hashlib.sha256(manifest_json).hexdigest()
    identity = {
        "manifest": manifest_sha256,
        "kind": config.plan.update_kind.value,
        **_settings(config),
        # Two spellings of one compression are one task.
        "compression": None if compression is None else str(compression),
        # Where the noise is given, more rounds are another claim. (Where epsilon is, the ledger keeps it.)
        "rounds": config.rounds if config.privacy.claim_follows_rounds else None,
    }
    identity_json = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return Task(
        task_id=hashlib.sha256(identity_json.encode("utf-8")).hexdigest()[:32],
        identity_json=identity_json,
        manifest=manifest,
        manifest_json=manifest_json,
        manifest_sha256=manifest_sha256,
        program=program,
        initial_weights=weights,
        layers=SharedLayers.of(manifest.parameters, config.plan.personal),
        kind=config.plan.update_kind,
        current=current,
        compression=None if compression is None else str(compression),
        settings=config,
        privacy=privacy,
        keeper=keeper,
        sharing=sharing,
    )
