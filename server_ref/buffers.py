"""The buffer that a task's settings ask for, and the aggregators that it may need."""

from __future__ import annotations

import logging

from client_sdk.protocol.messages import SecurePlan
from server_ref.buffer import OpenBuffer
from server_ref.config import ServerConfig
from server_ref.durable import DurableState
from server_ref.private_buffer import Buffer, PrivateBuffer
from server_ref.secure_rounds import OpenedRounds, open_rounds
from server_ref.shared_buffer import SharedBuffer
from server_ref.task import Task

_log = logging.getLogger("pocketfed.coordinator")


class Buffers:
    """Opens the buffer of one task.

    Args:
        config: Of the server.
        task: Whose updates come.
        state: Where they are kept.
    """

    def __init__(self, config: ServerConfig, task: Task, state: DurableState) -> None:
        self._config = config
        self._task = task
        self._state = state
        self._rounds: OpenedRounds | None = None

    @property
    def announced(self) -> SecurePlan | None:
        """What devices are told now of how to share their updates; None in other tasks, and before ``open``."""
        return None if self._rounds is None else self._task.announced(self._rounds.plan)

    def open(self) -> Buffer:
        """The task's buffer.

        Raises:
            ConfigurationError: The aggregators are not configured for this task.
        """
        task = self._task
        buffer: Buffer
        if task.sharing is not None:
            buffer = self._shared()
        else:
            buffer = OpenBuffer(lambda: task.pipeline, self._state.load_update)
        if task.privacy is None or task.keeper is None:
            return buffer
        _log.info("differential privacy: %s", task.privacy.words)
        return PrivateBuffer(buffer, task.keeper, task.privacy, self._state.releases)

    def _shared(self) -> SharedBuffer:
        opened = open_rounds(self._config, self._task, self._state.releases)
        self._rounds = opened
        return SharedBuffer(self._task, opened.plan, opened.rounds, self._state.load_shares)

    def close(self) -> None:
        """Let go of the aggregators."""
        if self._rounds is not None:
            self._rounds.close()
