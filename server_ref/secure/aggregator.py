"""The aggregator: the rules of one round, over a durable store.

Every operation reads, decides and writes in one transaction, and what it answers is durable before it is sent. So an
aggregator that was killed at any point repeats the answers it gave, and never gives a second one: no second noise for
one sum, no second signature for one round, no second charge. No decision depends on a clock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from sqlalchemy.engine import Connection

from client_sdk.protocol.errors import BudgetExceeded, ConfigurationError, UnknownBlob
from client_sdk.protocol.secure import SecureLayout
from server_ref.secure import queries, tables
from server_ref.secure.answers import Answers
from server_ref.secure.challenges import Challenges
from server_ref.secure.comparisons import Comparisons
from server_ref.secure.distance_messages import DistanceRequest, DistanceShare, ZeroKeys, ZeroKeyShare
from server_ref.secure.distances import SecretDistances, distance_settings
from server_ref.secure.errors import (
    AnswerDiscarded,
    CheckRefused,
    ContributorsRefused,
    DistancesRefused,
    NotCommitted,
    TaskMismatch,
    TaskNotBound,
)
from server_ref.secure.identity import AggregatorConfig, AggregatorKeys
from server_ref.secure.intake import Intake
from server_ref.secure.layout import secure_layout
from server_ref.secure.ledger import charge
from server_ref.secure.messages import (
    UNSIGNED,
    AggregateShare,
    AggregatorInfo,
    ChallengeCommitment,
    ChallengeNonce,
    ChallengeRequest,
    CheckAnswer,
    CheckRequest,
    CommitSignature,
    DeliveredShare,
    NoiseContribution,
    NoiseShare,
    RevealRequest,
    RoundStatement,
    TaskBinding,
    Verdict,
)
from server_ref.secure.noise_shares import make_contribution, sum_received
from server_ref.secure.parameters import CheckingMode
from server_ref.secure.projection_messages import ProjectionShare
from server_ref.secure.queries import StoredRound
from server_ref.secure.record_rules import current_run, examine, require_quorum
from server_ref.secure.rules import check_statement
from server_ref.secure.store import AggregatorStore
from server_ref.secure.wire import pack_answer, pack_contribution, unpack_answer, unpack_contribution
from server_ref.secure.zero_keys import ZeroKeyDealer


class Aggregator:
    """One aggregator of n; safe for concurrent calls.

    Satisfies ``AggregatorPort``, and ``ProjectionPort`` and ``DistancePort`` where these are pinned.

    Args:
        config: What it pins. Nothing of it is ever taken from the coordinator.
        keys: Its private keys.
        store: Its own, used by no other aggregator. Closed by the caller.
        random: Where noise, seeds and nonces come from: for anything but tests, the operating system's source.

    Raises:
        ConfigurationError: The keys are not those that the others pin for this index, or the store belongs to another
            aggregator, task or set of parameters.
        BudgetExceeded: Distances are pinned, and could wrap around the field.
    """

    def __init__(
        self,
        config: AggregatorConfig,
        keys: AggregatorKeys,
        store: AggregatorStore,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        if config.peers[config.index - 1] != keys.public:
            raise ConfigurationError(f"the keys are not those that are pinned for aggregator {config.index}")
        self._config = config
        self._pinned = config.parameters
        self._keys = keys
        self._store = store
        self._random = random
        self._intake = Intake(config, keys, store)
        self._challenges = Challenges(config, keys, store, random)
        self._comparisons = Comparisons(config.index, store)
        self._answers = Answers(config, keys, store)
        if config.parameters.distances:
            distance_settings(config.parameters)
        self._claim_store()
        store.sweep()
        if config.task is not None:
            try:
                self.bind(config.task)
            except TaskMismatch as e:
                raise ConfigurationError(f"the aggregator's store: {e}") from e

    def __repr__(self) -> str:
        return f"Aggregator({self._config.index} of {self._pinned.num_aggregators})"

    # --- who and for what --------------------------------------------------------------------------------------

    def describe(self) -> AggregatorInfo:
        """See ``AggregatorPort``."""
        with self._store.transaction() as connection:
            task = self._load_task(connection)
        public = self._keys.public
        return self._keys.sign(
            AggregatorInfo(
                index=self._config.index,
                signing_key=public.signing_key,
                sealing_key=public.sealing_key,
                parameters=self._pinned,
                task=task,
                signature=UNSIGNED,
            )
        )

    def bind(self, task: TaskBinding) -> AggregatorInfo:
        """See ``AggregatorPort``."""
        with self._store.transaction() as connection:
            bound = self._load_task(connection) or self._config.task
            if bound is not None and bound != task:
                raise TaskMismatch(f"the aggregator serves task {bound.task_id}, not {task.task_id} or another layout")
            if self._pinned.checking is CheckingMode.PROJECTIONS:
                try:
                    self._pinned.projection_settings(task.size)
                except BudgetExceeded as e:
                    raise TaskMismatch(str(e)) from e
            queries.save_task(connection, task.model_dump_json())
        return self.describe()

    def _claim_store(self) -> None:
        index, parameters = self._config.index, self._pinned.model_dump_json()
        with self._store.transaction() as connection:
            found = queries.load_identity(connection)
            if found is None:
                queries.save_identity(connection, index, parameters)
            elif found["schema_version"] != tables.SCHEMA_VERSION:
                raise ConfigurationError("the aggregator's store was written by another release")
            elif (found["aggregator_index"], found["parameters_json"]) != (index, parameters):
                raise ConfigurationError(
                    "the aggregator's store belongs to another index, or was begun with other parameters"
                )

    @staticmethod
    def _load_task(connection: Connection) -> TaskBinding | None:
        found = queries.load_identity(connection)
        json = None if found is None else found["task_json"]
        return None if json is None else TaskBinding.model_validate_json(json)

    def _task(self) -> tuple[TaskBinding, SecureLayout]:
        with self._store.transaction() as connection:
            task = self._load_task(connection)
        if task is None:
            raise TaskNotBound
        return task, secure_layout(self._pinned, task, self._config.suite)

    # --- reports -----------------------------------------------------------------------------------------------

    def deliver(self, round_id: int, reports: Sequence[DeliveredShare]) -> tuple[Verdict, ...]:
        """See ``AggregatorPort``."""
        return self._intake.deliver(round_id, reports, *self._task())

    def challenge_commit(self, request: ChallengeRequest) -> ChallengeCommitment:
        """See ``AggregatorPort``."""
        return self._challenges.commit(request)

    def challenge_reveal(self, request: RevealRequest) -> ChallengeNonce:
        """See ``AggregatorPort``."""
        return self._challenges.reveal(request)

    def check(self, request: CheckRequest) -> CheckAnswer:
        """See ``AggregatorPort``."""
        _task, layout = self._task()
        return self._challenges.check(request, layout)

    def deal_zero_keys(self, transcript_sha256: str) -> ZeroKeys:
        """See ``ProjectionPort``."""
        task, layout = self._task()
        return self._challenges.deal_keys(transcript_sha256, self._dealer(task, layout))

    def open_projections(self, request: CheckRequest, keys: Sequence[ZeroKeyShare]) -> ProjectionShare:
        """See ``ProjectionPort``."""
        task, layout = self._task()
        return self._challenges.open_projections(request, keys, layout, self._dealer(task, layout))

    def _dealer(self, task: TaskBinding, layout: SecureLayout) -> ZeroKeyDealer:
        if self._pinned.checking is not CheckingMode.PROJECTIONS:
            raise CheckRefused(f"projections and norms are not opened in the checking mode {self._pinned.checking}")
        return ZeroKeyDealer(self._config, self._keys, task.task_id, layout.scheme)

    def deal_distance_keys(self, request: DistanceRequest) -> ZeroKeys:
        """See ``DistancePort``."""
        distances, _layout = self._distances()
        return self._comparisons.deal(request, distances)

    def compare(self, request: DistanceRequest, keys: Sequence[ZeroKeyShare]) -> DistanceShare:
        """See ``DistancePort``."""
        return self._comparisons.answer(request, keys, *self._distances())

    def _distances(self) -> tuple[SecretDistances, SecureLayout]:
        task, layout = self._task()
        if not self._pinned.distances:
            raise DistancesRefused("this aggregator does not pin distances")
        return SecretDistances(self._config, self._keys, task.task_id, task.size), layout

    # --- the sum -----------------------------------------------------------------------------------------------

    def contribute(self, statement: RoundStatement) -> NoiseContribution:
        """See ``AggregatorPort``."""
        task, layout = self._task()
        check_statement(statement, self._pinned, task.task_id)
        if self._config.index not in statement.contributors:
            raise ContributorsRefused(f"aggregator {self._config.index} is not among the contributors")
        with self._store.transaction() as connection:
            stored = current_run(connection, statement)
            if stored is None:
                examine(connection, statement, self._pinned, layout.size)
        if stored is None:
            drawn = make_contribution(statement, self._config, self._keys, layout, self._random)
            kept = self._store.put(pack_contribution(drawn))
            with self._store.transaction() as connection:
                # Nobody has seen what was just drawn: if another call was faster, its noise is the one that counts.
                stored = current_run(connection, statement)
                if stored is None:
                    stored = replace(_begun(statement), contribution=kept)
                    queries.save_round(connection, stored)
        if stored.contribution is None:
            # Drawn anew, it could be added to the same sum a second time, and the two sums be averaged.
            raise AnswerDiscarded(f"the noise for round {statement.round_id} is no longer kept")
        return unpack_contribution(self._store.get(stored.contribution))

    def commit(self, statement: RoundStatement, noise: Sequence[NoiseShare]) -> CommitSignature:
        """See ``AggregatorPort``."""
        task, layout = self._task()
        with self._store.transaction() as connection:
            stored = current_run(connection, statement)
        if stored is not None and stored.signature is not None:
            return self._commit_signature(stored)
        check_statement(statement, self._pinned, task.task_id)
        received = sum_received(statement, noise, self._config, self._keys, layout)
        to_bytes = layout.scheme.field.to_bytes
        noise_blob = self._store.put(b"".join(map(to_bytes, received))) if received else None
        accepted_blob = self._store.put(statement.model_dump_json().encode())
        with self._store.transaction() as connection:
            stored = current_run(connection, statement) or _begun(statement)
            if stored.signature is None:
                release = examine(connection, statement, self._pinned, layout.size)
                if release is not None:
                    charge(connection, release)
                queries.mark_reports(
                    connection, [e.report_id for e in statement.accepted.entries], signed_in=statement.round_id
                )
                queries.count_participations(connection, [e.device_id for e in statement.accepted.entries])
                stored = replace(
                    stored, accepted=accepted_blob, noise=noise_blob, signature=self._sign_commit(statement)
                )
                queries.save_round(connection, stored)
        return self._commit_signature(stored)

    def answer(self, round_id: int, signatures: Sequence[CommitSignature]) -> AggregateShare:
        """See ``AggregatorPort``."""
        _task, layout = self._task()
        with self._store.transaction() as connection:
            stored = queries.load_round(connection, round_id)
        if stored is None or stored.signature is None:
            raise NotCommitted(f"aggregator {self._config.index} has signed nothing for round {round_id}")
        require_quorum(stored, signatures, self._config)
        if stored.answer is None:
            if stored.accepted is None:
                raise AnswerDiscarded(f"round {round_id} is too long ago")
            stored = self._answered(stored, layout)
            self._answers.discard_needless(round_id)
        return unpack_answer(self._store.get(stored.answer or ""))

    def _answered(self, stored: StoredRound, layout: SecureLayout) -> StoredRound:
        try:
            share = self._answers.compute(stored, layout)
        except UnknownBlob:
            # Another call was faster, and has let go of the shares.
            with self._store.transaction() as connection:
                found = queries.load_round(connection, stored.round_id)
            if found is None or found.answer is None:
                raise
            return found
        kept = self._store.put(pack_answer(share))
        with self._store.transaction() as connection:
            found = queries.load_round(connection, stored.round_id) or stored
            answered = found if found.answer is not None else replace(found, answer=kept)
            queries.save_round(connection, answered)
        return answered

    # --- what is made ----------------------------------------------------------------------------------------------

    def _sign_commit(self, statement: RoundStatement) -> str:
        unsigned = CommitSignature(
            index=self._config.index,
            round_id=statement.round_id,
            statement_sha256=statement.sha256,
            signature=UNSIGNED,
        )
        return self._keys.sign(unsigned).signature

    def _commit_signature(self, stored: StoredRound) -> CommitSignature:
        return CommitSignature(
            index=self._config.index,
            round_id=stored.round_id,
            statement_sha256=stored.statement,
            signature=stored.signature or UNSIGNED,
        )


def _begun(statement: RoundStatement) -> StoredRound:
    return StoredRound(statement.round_id, statement.run, statement.sha256)
