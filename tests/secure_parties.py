"""All parties of a secret-shared round in one process: devices that seal, aggregators over real stores, a coordinator.

The coordinator here is a few lines that do what they are told, so that a test can make it lie at any step.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import obstore
import sqlalchemy as sa

from client_sdk.protocol import sealing
from client_sdk.protocol.sealing import SealingSuite
from client_sdk.protocol.secure import encode_shares
from client_sdk.protocol.shamir import reconstruct, share_seeded
from server_ref.secure.aggregator import Aggregator
from server_ref.secure.identity import AggregatorConfig, AggregatorKeys
from server_ref.secure.intake import accepted_terms
from server_ref.secure.layout import secure_layout
from server_ref.secure.messages import (
    AcceptedSet,
    AggregateShare,
    ChallengeRequest,
    CheckAnswer,
    CheckRequest,
    CommitSignature,
    DeliveredShare,
    NoiseContribution,
    ReportRef,
    RevealRequest,
    RoundStatement,
    SetEntry,
    ShareHeader,
    TaskBinding,
    ciphertext_id,
)
from server_ref.secure.parameters import PinnedParameters, PinnedPrivacy, RoundParameters
from server_ref.secure.port import AggregatorPort
from server_ref.secure.store import AggregatorStore
from server_ref.store.blobs import BlobStore

SIZE = 6
TASK = TaskBinding(task_id="7a" * 16, parameter_table_sha256="5c" * 32, size=SIZE)


def hex_id(number: int, kind: str) -> str:
    """A readable id of 128 bits."""
    return f"{kind.encode().hex():0<24}{number:08x}"


def pinned(**changes: Any) -> PinnedParameters:
    """Three of five, noise a little above what integers need, a budget for a few rounds."""
    values = {"min_cohort": 2, "clip_norm": 1.0, "fraction_bits": 16, "privacy": pinned_privacy()} | changes
    return PinnedParameters(**values)


def pinned_privacy(**changes: Any) -> PinnedPrivacy:
    """An epsilon of about 2 in four rounds."""
    return PinnedPrivacy(**({"noise_multiplier": 4.0, "max_rounds": 8, "epsilon": 2.2, "delta": 1e-5} | changes))


def default_codes(number: int, size: int = SIZE) -> list[int]:
    """Small, different for each number, of both signs."""
    return [(number * 7 + i * 3) % 11 - 5 for i in range(size)]


class QuickBlobs(BlobStore):
    """Blobs that are written and not flushed."""

    def put(self, key: str, data: bytes) -> None:
        obstore.put(self._store, key, data)


@cache
def _empty_database() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        AggregatorStore(Path(folder)).close()
        return (Path(folder) / "aggregator.db").read_bytes()


def quick_store(folder: Path) -> AggregatorStore:
    """A store that does not wait for the disk: these tests end processes, not power."""
    if not (folder / "aggregator.db").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "aggregator.db").write_bytes(_empty_database())
    store = AggregatorStore(folder, QuickBlobs(folder / "blobs"))
    hurry(store)
    return store


_COMPILED: dict[Any, Any] = {}
"""The statements of all stores, which are the same."""


def hurry(store: AggregatorStore) -> None:
    """Wait for no flush of the database, and compile no statement twice."""
    store.engine.dispose()
    store.engine.update_execution_options(compiled_cache=_COMPILED)

    @sa.event.listens_for(store.engine, "connect")
    def _no_flush(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")


@dataclass(frozen=True)
class Upload:
    """One device's report, sealed for all aggregators."""

    header: ShareHeader
    ciphertexts: tuple[bytes, ...]
    codes: npt.NDArray[np.int64] = field(repr=False)

    def share(self, index: int) -> DeliveredShare:
        """What aggregator ``index`` is given."""
        return DeliveredShare(self.header, self.ciphertexts[index - 1])

    def entry(self, weight: int = 1) -> SetEntry:
        """How a set names it."""
        return SetEntry(
            report_id=self.header.report_id, device_id=self.header.device_id, digest=self.header.digest(), weight=weight
        )

    @property
    def ref(self) -> ReportRef:
        """How a challenge names it."""
        return ReportRef(report_id=self.header.report_id, digest=self.header.digest())


class Parties:
    """Aggregators and devices of one task.

    Args:
        folder: For the aggregators' stores.
        parameters: What all aggregators pin.
        suite: How everything is sealed.
        own: What one of them pins instead: parameters by index.
        open_store: Makes a store of a folder.
        random: The aggregators' randomness.
        wrap: How the coordinator reaches an aggregator.
        size: Coordinates of an update.
        live: Which aggregators there are; all by default.
    """

    def __init__(
        self,
        folder: Path,
        parameters: PinnedParameters | None = None,
        *,
        suite: SealingSuite = SealingSuite.X25519,
        own: dict[int, PinnedParameters] | None = None,
        open_store: Callable[[Path], AggregatorStore] = quick_store,
        random: Callable[[int], bytes] = os.urandom,
        wrap: Callable[[Aggregator], AggregatorPort] = lambda aggregator: aggregator,
        size: int = SIZE,
        live: Iterable[int] | None = None,
    ) -> None:
        self.parameters = parameters = parameters or pinned()
        self.task = TASK.model_copy(update={"size": size})
        self.wrap = wrap
        self.folder = folder
        self.open_store = open_store
        self.random = random
        self.keys = [AggregatorKeys.generate(suite) for _ in range(parameters.num_aggregators)]
        peers = tuple(key.public for key in self.keys)
        self.configs = [
            AggregatorConfig(
                index=i,
                parameters=(own or {}).get(i, parameters),
                suite=suite,
                peers=peers,
                task=self.task,
                keep_rounds=2,
            )
            for i in range(1, len(peers) + 1)
        ]
        self.stores: dict[int, AggregatorStore] = {}
        self.ports: dict[int, AggregatorPort] = {}
        for i in live or self.indices:
            self.stores[i] = self.open_store(self._folder(i))
            self.ports[i] = self._port(i)
        self.layout = secure_layout(parameters, self.task, suite)

    @property
    def indices(self) -> range:
        """Of the aggregators, from 1."""
        return range(1, self.parameters.num_aggregators + 1)

    def __getitem__(self, index: int) -> AggregatorPort:
        return self.ports[index]

    def _port(self, index: int) -> AggregatorPort:
        i = index - 1
        return self.wrap(Aggregator(self.configs[i], self.keys[i], self.stores[index], self.random))

    def _folder(self, index: int) -> Path:
        return self.folder / f"aggregator-{index}"

    def close(self) -> None:
        """Close all stores."""
        for store in self.stores.values():
            store.close()

    def restart(self, index: int, open_store: Callable[[Path], AggregatorStore] | None = None) -> AggregatorPort:
        """Let go of all that an aggregator has in memory, and open what it has on disk."""
        self.stores[index].close()
        self.stores[index] = (open_store or self.open_store)(self._folder(index))
        self.ports[index] = self._port(index)
        return self[index]

    # --- a device ------------------------------------------------------------------------------------------------

    def upload(self, number: int, codes: Sequence[int] | None = None, **header: Any) -> Upload:
        """Report ``number`` of device ``number``, unless the header says otherwise.

        Args:
            number: Makes the ids and, by default, the codes.
            codes: The update's, and the indicator's.
            header: Changes of the header's fields; they are sealed as they are stated.
        """
        vector = np.array(codes if codes is not None else default_codes(number, self.layout.num_values), np.int64)
        facts = {
            "report_id": hex_id(number, "report"),
            "assignment_id": hex_id(number, "assign"),
            "device_id": hex_id(number, "device"),
            "model_version": 3,
            "clip_norm": self.parameters.clip_norm,
            "indicator_norm": 1.0 if self.parameters.indicator else None,
        } | header
        secret = self.layout.secret(vector, os.urandom(32))
        plaintexts = encode_shares(share_seeded(secret, self.layout.scheme), self.layout)
        return self.seal(facts, plaintexts, vector)

    def seal(self, facts: dict[str, Any], plaintexts: Sequence[bytes], codes: npt.NDArray[np.int64]) -> Upload:
        """Seal plaintexts as shares, whatever they are."""
        terms = accepted_terms(self.configs[0], facts["clip_norm"], facts["indicator_norm"])
        sealed = tuple(
            sealing.seal(
                plaintext,
                self.configs[0].sealing_key(index),
                sealing.share_info(
                    task_id=TASK.task_id,
                    assignment_id=facts["assignment_id"],
                    device_id=facts["device_id"],
                    aggregator_index=index,
                    model_version=facts["model_version"],
                    parameter_table_sha256=TASK.parameter_table_sha256,
                    terms=terms,
                ),
            )
            for index, plaintext in enumerate(plaintexts, 1)
        )
        ids = tuple(ciphertext_id(ciphertext, self.layout.suite) for ciphertext in sealed)
        return Upload(ShareHeader(**facts, ciphertext_ids=ids), sealed, codes)

    # --- a coordinator -------------------------------------------------------------------------------------------

    def deliver(self, uploads: Iterable[Upload], round_id: int = 0, to: Iterable[int] | None = None) -> None:
        """Deliver, and insist that all is accepted."""
        uploads = list(uploads)
        for index in to or self.indices:
            verdicts = self[index].deliver(round_id, [upload.share(index) for upload in uploads])
            assert all(verdict.ok for verdict in verdicts), verdicts

    def uploads(self, numbers: Iterable[int], round_id: int = 0) -> list[Upload]:
        """Uploads of these numbers, delivered to all."""
        made = [self.upload(number) for number in numbers]
        self.deliver(made, round_id)
        return made

    def statement(
        self,
        *parts: Sequence[Upload] | Sequence[SetEntry],
        round_id: int = 0,
        run: int = 0,
        contributors: Iterable[int] | None = None,
        parameters: RoundParameters | None = None,
    ) -> RoundStatement:
        """A statement about uploads (with weight 1) or entries."""
        entries = tuple(tuple(e.entry() if isinstance(e, Upload) else e for e in part) for part in parts)
        noisy = self.parameters.aggregators_add_noise
        return RoundStatement(
            task_id=TASK.task_id,
            round_id=round_id,
            run=run,
            contributors=tuple((self.indices if contributors is None else contributors) if noisy else ()),
            accepted=AcceptedSet(parts=entries),
            parameters=parameters or self.parameters.round_parameters(),
        )

    def contributions(self, statement: RoundStatement) -> list[NoiseContribution]:
        """The noise of all contributors."""
        return [self[index].contribute(statement) for index in statement.contributors]

    def commit(
        self,
        statement: RoundStatement,
        noise: Sequence[NoiseContribution] | None = None,
        by: Iterable[int] | None = None,
    ) -> list[CommitSignature]:
        """Signatures of these aggregators (all by default)."""
        noise = self.contributions(statement) if noise is None else noise
        return [
            self[index].commit(statement, [one.for_receiver(index) for one in noise]) for index in by or self.indices
        ]

    def answers(
        self, round_id: int, signatures: Sequence[CommitSignature], by: Iterable[int] | None = None
    ) -> list[AggregateShare]:
        """Answers of these aggregators (all by default)."""
        return [self[index].answer(round_id, signatures) for index in by or self.indices]

    def run(self, statement: RoundStatement) -> list[npt.NDArray[np.int64]]:
        """A whole round: the opened sum of each part."""
        return self.open(self.answers(statement.round_id, self.commit(statement)))

    def open(self, answers: Sequence[AggregateShare]) -> list[npt.NDArray[np.int64]]:
        """The sums that answers open, int64 ``[num_values]`` each."""
        scheme = self.layout.scheme
        length = (self.layout.share_length - 1) * scheme.field.element_bytes
        parts = len(answers[0].payload) // length
        opened = []
        for part in range(parts):
            shares = {
                answer.header.index: scheme.field.from_bytes(answer.payload[part * length : (part + 1) * length])
                for answer in answers
            }
            values = reconstruct(shares, scheme, (self.layout.share_length - 1) * scheme.packing)
            opened.append(scheme.field.to_signed(values[: self.layout.num_values]))
        return opened

    def challenge(self, uploads: Sequence[Upload], among: Iterable[int] | None = None) -> list[CheckAnswer]:
        """A whole challenge among these aggregators (all by default)."""
        among = list(among or self.indices)
        request = ChallengeRequest(round_id=0, reports=tuple(upload.ref for upload in uploads))
        commitments = tuple(self[index].challenge_commit(request) for index in among)
        reveal = RevealRequest(challenge_sha256=request.sha256(), commitments=commitments)
        nonces = tuple(self[index].challenge_reveal(reveal) for index in among)
        check = CheckRequest(transcript_sha256=reveal.transcript(), nonces=nonces)
        return [self[index].check(check) for index in among]


def reweighted(uploads: Iterable[Upload], weight: int) -> list[SetEntry]:
    """Entries with this weight."""
    return [upload.entry(weight) for upload in uploads]
