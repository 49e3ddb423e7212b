"""One device as a process of its own: what ``pocketfed device`` runs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TextIO

from client_sdk import events
from client_sdk.client import MobileClient
from client_sdk.data import load_examples
from client_sdk.memory_budget import device_memory_mib
from client_sdk.personal_client import PersonalizedMobileClient
from client_sdk.personal_store import PERSONAL_FOLDER, PersonalModelStore
from client_sdk.personalization import PersonalizationConfig, PersonalRecord
from client_sdk.power import PowerMonitor, PowerPolicy
from client_sdk.privacy import LocalPrivacy, LocalPrivacyPolicy
from client_sdk.privacy_ledger import LEDGER_FILE, LocalPrivacyLedger
from client_sdk.programs import DownloadedPrograms
from client_sdk.protocol.errors import ConfigurationError, PocketfedError
from client_sdk.protocol.profile import DeviceProfile, DeviceTier
from client_sdk.store import FileDeviceStore
from client_sdk.transport import HttpTransport
from client_sdk.trust import load_aggregator_keys


def run_device(
    *,
    server_url: str,
    data: Path,
    state_dir: Path,
    runtime: str = "auto",
    tier: DeviceTier = DeviceTier.MID_RANGE,
    name: str | None = None,
    max_reports: int | None = None,
    aggregator_keys: Path | None = None,
    min_threshold: int | None = None,
    power_policy: PowerPolicy | None = None,
    memory_limit_mib: int | None = None,
    checkpoint_key: Path | None = None,
    run_for_s: float | None = None,
    server_keys: Sequence[str] | None = None,
    local_privacy: LocalPrivacyPolicy | None = None,
    personalization: PersonalizationConfig | None = None,
) -> int:
    """Run one device until the task is finished, ``max_reports`` are accepted, or SIGINT or SIGTERM comes.

    The first signal ends the wait or the training step in hand and keeps the state; a second one ends at once, and
    what was saved by then still counts.

    Args:
        server_url: Base address of the server.
        data: ``.npz`` with x (float32, examples first) and y (int64).
        state_dir: Key, session, sealed report, cached blobs and programs.
        runtime: ExecuTorch adapter.
        tier: Class of phone to report.
        name: What the device calls itself in its own messages; by default its id.
        max_reports: How many accepted reports to leave after.
        aggregator_keys: File with the sealing keys of the aggregators that the device trusts.
        min_threshold: How many of those it must take at least to read an update; by default more than half.
        power_policy: When battery, heat, network and user allow to work; None does not ask.
        memory_limit_mib: What this process may use at most.
        checkpoint_key: File with 32 secret bytes in hex, with which checkpoints and the personal model are encrypted.
        run_for_s: Leave after so many seconds, at a step boundary; the state is kept.
        server_keys: The server's public keys in hex, of which one signs each reply; by default that of its first reply,
            which is kept in the state directory.
        local_privacy: Noise on each report, and its budget; what is spent stands in the state directory.
        personalization: How the newest model is adapted after the rounds; what comes of it is kept in the state
            directory. None for not at all.

    Returns:
        0.

    Raises:
        InvalidDataFile, StateDirLocked, StateDirUnusable, ConfigurationError: Before anything is sent.
        PocketfedError: What made the device give up.
    """
    examples = load_examples(data)
    trusted = None if aggregator_keys is None else load_aggregator_keys(aggregator_keys)
    key = None if checkpoint_key is None else load_checkpoint_key(checkpoint_key)
    opened = FileDeviceStore(state_dir, checkpoint_key=key)
    with closing(opened) as store, closing(_transport(server_url, store, server_keys)) as transport:
        profile = DeviceProfile(
            device_id=name or store.identity.device_id,
            device_type=tier,
            available_memory_mb=device_memory_mib(),
            cpu_cores=os.cpu_count() or 1,
        )
        lines = ProgressLines(profile.device_id, sys.stderr)
        private = None
        if local_privacy is not None:
            private = LocalPrivacy(local_privacy, LocalPrivacyLedger(store.folder / LEDGER_FILE))
            lines.say(private.label())
        programs = DownloadedPrograms(store.folder / "programs", runtime)
        with closing(programs), _stop_on_signals() as stop:
            make: Callable[..., MobileClient] = MobileClient
            if personalization is not None:
                models = PersonalModelStore(store.folder / PERSONAL_FOLDER, key=key)
                make = partial(PersonalizedMobileClient, personalization_config=personalization, personal_models=models)
            client = make(
                None,
                profile,
                data=examples,
                transport=transport,
                store=store,
                programs=programs,
                on_event=lines,
                aggregator_keys=trusted,
                min_threshold=min_threshold,
                power_monitor=None if power_policy is None else PowerMonitor(policy=power_policy),
                memory_limit_bytes=None if memory_limit_mib is None else memory_limit_mib * 2**20,
                local_privacy=private,
            )
            if run_for_s is None:
                summary = client.run(max_reports, stop)
            else:
                summary = client.run_for(run_for_s, max_reports=max_reports, stop=stop)
    if summary.cause in {"gave-up", "refused"}:
        raise summary.error or PocketfedError(summary.detail)
    return 0


def _transport(server_url: str, store: FileDeviceStore, server_keys: Sequence[str] | None) -> HttpTransport:
    if server_keys is None:
        return HttpTransport(server_url, store.identity, server_keys=store)
    return HttpTransport(server_url, store.identity, server_key=server_keys)


class ProgressLines:
    """Writes one line per event; of training, only its end."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self._prefix = f"device {name[:12]}: "
        self._stream = stream

    def __call__(self, event: events.Event) -> None:
        """Write the event's line, if it has one."""
        line = self._line(event)
        if line is not None:
            self.say(line)

    def say(self, line: str) -> None:
        """Write a line that no event has."""
        self._stream.write(f"{self._prefix}{line}\n")
        self._stream.flush()

    @staticmethod
    def _line(event: events.Event) -> str | None:
        line: str | None
        match event:
            case events.Enrolled(device_id):
                line = f"enrolled as {device_id}"
            case events.CheckedIn(a):
                line = f"round {a.round_id}: got model version {a.model_version}; {a.lease_s:.0f} s to report"
            case events.Downloaded(sha256, size) if size:
                line = f"downloaded {sha256[:12]} ({size:,} bytes)"
            case events.Uploaded(_, a, size, dense):
                instead = f" instead of {dense:,}" if dense is not None and dense > size else ""
                line = f"round {a.round_id}: report accepted ({size:,} bytes{instead})"
            case events.Waiting(delay, reason):
                line = f"waiting {delay:.1f} s: {reason}"
            case events.Dropped(a, reason):
                line = f"round {a.round_id}: dropped: {reason}"
            case events.Finished(_, detail, reports):
                line = f"{detail}; {reports} report{'' if reports == 1 else 's'} accepted"
            case _:
                line = _training_line(event)
        return line


def _training_line(event: events.Event) -> str | None:
    match event:
        case events.TrainingProgress(done, total, loss) if done >= total:
            return f"trained on {done:,} examples; loss {loss:.4f}"
        case events.TrainingResumed(epoch, steps):
            return f"training goes on from its checkpoint: epoch {epoch + 1}, {steps} steps done"
        case events.Paused(step, _, detail):
            return f"{step} paused: {detail}"
        case events.CheckpointFailed(detail):
            return f"no checkpoint: {detail}"
        case _:
            return _personal_line(event)


def _personal_line(event: events.Event) -> str | None:
    match event:
        case events.Personalized(record):
            return f"personal model: {personal_summary(record)}"
        case events.PersonalModelSetAside(version, program):
            return f"the personal model of version {version} is set aside: it is one of program {program[:12]}"
        case events.NotPersonalized(detail):
            return f"no new personal model: {detail}"
        case _:
            return None


def personal_summary(record: PersonalRecord) -> str:
    """One line about a personal model: of what it was made, and what its own examples say of it."""
    made = f"{record.steps} steps from version {record.model_version} on {record.support_examples} examples"
    of_all, own = record.of_global, record.of_personal
    if of_all is None or own is None:
        return f"{made}; no example is left to judge it"
    # The loss decides which serves: without it a model of lower accuracy that does would read as a mistake.
    figures = (
        f"global {of_all.accuracy:.1%} (loss {of_all.loss:.3f}), personal {own.accuracy:.1%} (loss {own.loss:.3f})"
    )
    kept = None if record.retention is None else record.retention.loss_kept
    return (
        f"{made}; accuracy on {own.examples} own held-out examples: {figures}"
        + ("" if kept is None else f"; {kept:.0%} of the former gain in loss is kept")
        + ("" if record.adapted else "; the global model serves")
    )


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; the handlers of before are back afterwards."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers; whoever embeds us there stops us otherwise
        return

    def on_signal(signum: int, _: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt(f"signal {signum}")
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load_checkpoint_key(path: Path) -> bytes:
    """The key of encrypted checkpoints: 32 bytes in hex.

    Raises:
        ConfigurationError: No such file, or something else in it; the message does not repeat it.
    """
    try:
        key = bytes.fromhex(path.read_text("ascii"))
    except OSError as e:
        raise ConfigurationError(f"{path}: {e.strerror}; name a file with a key of 64 hex digits") from e
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigurationError(f"{path} is not a key of 64 hex digits; `openssl rand -hex 32` makes one")
    return key
