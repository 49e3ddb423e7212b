"""What anybody may read from a server: its task, its rounds, its models."""

from __future__ import annotations

from typing import Any, Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.transport import open_client
from simulator.errors import ServerUnavailable


class TaskView(BaseModel):
    """``GET /v1/task``, as far as a simulation needs it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_version: int
    model_sha256: str
    manifest_sha256: str
    program_sha256: str
    rounds: int
    finished: bool
    halted: str | None = None
    dense_report_bytes: int = 0
    pipeline: dict[str, str] = Field(default_factory=dict)
    buffer_size: int
    virtual_clock: bool


class Measurements(BaseModel):
    """What a round's stages measured, as far as a report shows it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    staleness: dict[int, int] = Field(default_factory=dict, description="age -> counted reports")
    excluded: tuple[int, ...] = Field((), description="assignment numbers that a robust rule left out")
    clipped: int = 0
    norm_median: float | None = Field(None, description="of the counted updates' L2 norms, before clipping")
    norm_max: float | None = None
    aggregate_norm: float | None = Field(None, description="L2 norm of what the updates were made into")
    num_byzantine: int | None = Field(None, description="dishonest updates that the rule reckoned with")
    degraded: bool = Field(default=False, description="whether these are fewer than it was to stand")
    unchanged: str | None = Field(None, description="why the round left the model as it was")


class CommittedRound(BaseModel):
    """One entry of ``GET /v1/rounds``, as far as a simulation needs it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    round_id: int
    model_version: int
    model_sha256: str
    reports: int
    discarded: int
    train_loss: float | None = None
    opened_at_s: float
    closed_at_s: float
    validation_accuracy: float | None
    validation_loss: float | None
    bytes_up: int = 0
    measurements: Measurements = Measurements()


_ROUNDS = TypeAdapter(list[CommittedRound])


class ServerView:
    """Reads a server's public resources."""

    def __init__(self, url: str) -> None:
        """Prepare; nothing is sent yet.

        Raises:
            ConfigurationError: Not a server's address.
        """
        self._url = url.rstrip("/")
        self._http = open_client(url, max_connections=1)

    def task(self) -> TaskView:
        """The task and where it stands.

        Raises:
            ServerUnavailable: Nobody answers, or not a pocketfed server.
        """
        try:
            return TaskView.model_validate_json(self._get("/v1/task"))
        except ValidationError as e:
            raise ConfigurationError(f"{self._url} does not answer like a pocketfed server") from e

    def rounds(self, since: int) -> list[CommittedRound]:
        """Committed rounds from ``since`` on, oldest first."""
        return _ROUNDS.validate_json(self._get("/v1/rounds", {"since": since}))

    def blob(self, sha256: str) -> bytes:
        """A model, program or manifest."""
        return self._get(f"/v1/blobs/{sha256}")

    def _get(self, path: str, params: dict[str, Any] | None = None) -> bytes:
        try:
            response = self._http.get(self._url + path, params=params)
            response.raise_for_status()
        except httpx.HTTPError as e:
            raise ServerUnavailable(f"{self._url}{path}: {e or type(e).__name__}") from e
        return response.content

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """``close``."""
        self.close()
