"""Group commit: one thread owns all writes, many requests share one transaction and one flush.

A request's future resolves only after its transaction is durable. Whatever is queued while a transaction flushes is
taken into the next one, so the cost of a flush is shared under load and nobody waits for a timer.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from client_sdk.protocol.errors import PocketfedError, ServerBusy, StorageUnavailable

_log = logging.getLogger("pocketfed.writer")
_MAX_BATCH = 256
T = TypeVar("T")


class WriterHooks(Protocol):
    """What the owner of the in-memory state does around a transaction. All run in the writer's thread."""

    def flush(self, connection: Connection) -> None:
        """Write what the batch's operations changed in memory."""
        ...

    def after_commit(self) -> None:
        """The batch is durable and its futures are resolved."""
        ...

    def reload(self) -> None:
        """The batch was rolled back: rebuild the in-memory state from the database."""
        ...


@dataclass(frozen=True)
class _Operation:
    run: Callable[[Connection], Any]
    future: Future[Any]


class GroupCommitWriter:
    """Runs operations in batches, each batch in one transaction.

    An operation changes the in-memory state and leaves the writing to ``hooks.flush``, or writes itself. It may
    refuse with a ``PocketfedError`` before it changes anything; the rest of its batch goes on.
    """

    def __init__(self, engine: Engine, hooks: WriterHooks) -> None:
        self._engine = engine
        self._hooks = hooks
        self._queue: queue.SimpleQueue[_Operation | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="pocketfed-writer", daemon=True)
        self._closed = False
        self._stale = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what is queued and stop."""
        self._closed = True
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, run: Callable[[Connection], T]) -> Future[T]:
        """Queue an operation; the future resolves when its result is durable."""
        future: Future[T] = Future()
        if self._closed:
            future.set_exception(ServerBusy("the server is stopping"))
        else:
            self._queue.put(_Operation(run, future))
        return future

    def _loop(self) -> None:
        while True:
            operation = self._queue.get()
            if operation is None:
                return
            batch = [operation]
            stopping = False
            while len(batch) < _MAX_BATCH:
                try:
                    operation = self._queue.get_nowait()
                except queue.Empty:
                    break
                if operation is None:
                    stopping = True
                    break
                batch.append(operation)
            self._run(batch)
            if stopping:
                return

    def _run(self, batch: list[_Operation]) -> None:
        # Whoever gave up before its turn is left out; from here on a future can no longer be cancelled.
        batch = [operation for operation in batch if operation.future.set_running_or_notify_cancel()]
        results: list[tuple[_Operation, Any, PocketfedError | None]] = []
        if self._stale and not self._reload():
            _fail(batch, StorageUnavailable("the database cannot be read now"))
            return
        try:
            with self._engine.begin() as connection:
                for operation in batch:
                    try:
                        results.append((operation, operation.run(connection), None))
                    except PocketfedError as e:
                        results.append((operation, None, e))
                self._hooks.flush(connection)
        except Exception as e:  # noqa: BLE001 - whatever it was, memory and database must agree again
            _log.error("a batch of %d writes was rolled back: %s", len(batch), e)
            self._reload()
            _fail(batch, _as_refusal(e))
            return
        for operation, value, refusal in results:
            if refusal is None:
                operation.future.set_result(value)
            else:
                operation.future.set_exception(refusal)
        try:
            self._hooks.after_commit()
        except Exception as e:  # noqa: BLE001 - the batch itself is durable; the work is repeated after the next one
            _log.error("work after a commit failed and will be repeated: %s", e)
            self._stale = True

    def _reload(self) -> bool:
        """Rebuild the memory's state; until that has worked, nothing is written."""
        try:
            self._hooks.reload()
        except Exception as e:  # noqa: BLE001 - as long as the database cannot be read, requests are refused
            _log.error("the state could not be read back from the database: %s", e)
            self._stale = True
            return False
        self._stale = False
        return True


def _fail(batch: list[_Operation], error: PocketfedError) -> None:
    for operation in batch:
        operation.future.set_exception(error)


def _as_refusal(error: Exception) -> PocketfedError:
    """What the devices of a lost batch are told: all of it can be tried again."""
    if isinstance(error, PocketfedError):
        return error
    if isinstance(error, (SQLAlchemyError, OSError)):
        return StorageUnavailable("the database cannot be written now")
    return ServerBusy(str(error))
