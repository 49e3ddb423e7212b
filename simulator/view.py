"""What anybody may read from a server: its task, its rounds, its models."""

from __future__ import annotations

from typing import Any, Literal, Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.transport import open_client
from simulator.errors import ServerUnavailable


class PrivacyClaim(BaseModel):
    """Differential privacy of everything that a task releases, at the level of a whole device.

    An epsilon means something only together with the rest.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    noise: Literal["server", "aggregators", "devices"] = Field(description="who adds it")
    epsilon: float = Field(ge=0, allow_inf_nan=False, description="budget of the whole task")
    spent: float = Field(ge=0, allow_inf_nan=False, description="of it, by the releases so far")
    delta: float = Field(gt=0, lt=1)
    adjacency: Literal["zero-out", "add-remove", "replace-one"] = Field(description="which cohorts are neighbours")
    noise_multiplier: float = Field(gt=0, allow_inf_nan=False, description="of a round: noise / sensitivity")
    participations: int | None = Field(ge=1, description="rounds that count one device at most; null: all")
    buckets: int | None = Field(None, ge=2, description="noised sums of a round; null: one sum")
    honest_devices: int | None = Field(
        None, ge=1, description="of each sum, that are relied on to have added theirs; null: devices add none"
    )


class Secrecy(BaseModel):
    """How the updates of a task are shared among aggregators."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    threshold: int = Field(ge=1, description="fewer of the aggregators learn nothing")
    num_aggregators: int = Field(ge=1)
    field: str = Field(description="of the shares")
    packing: int = Field(ge=1, description="coordinates in a share")
    suite: str = Field(description="how shares are sealed")
    checks: str = Field(description="what is checked of updates that nobody sees")
    minimum_cohort: int = Field(ge=1, description="fewest reports that a sum is opened of")
    embedded: bool | None = Field(
        None, description="whether all aggregators are in the server's process, whose operator then sees everything"
    )


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
    privacy: PrivacyClaim | None = None
    secure: Secrecy | None = None


class RoundPrivacy(BaseModel):
    """What the account says of a round."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    epsilon: float | None = Field(None, description="spent by this round and all before it")
    noise_stddev: float | None = Field(None, description="per coordinate of the aggregate, as it is accounted for")


class Measurements(BaseModel):
    """What a round's stages measured, as far as a report shows it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    staleness: dict[int, int] = Field(default_factory=dict, description="age -> counted reports")
    excluded: tuple[int, ...] = Field((), description="assignment numbers that a robust rule left out")
    clipped: int = 0
    norm_median: float | None = Field(None, description="of the counted updates' L2 norms, before clipping")
    norm_max: float | None = None
    clip_norm: float | None = Field(None, description="that the round used, where it is adaptive")
    aggregate_norm: float | None = Field(None, description="L2 norm of what the updates were made into")
    num_byzantine: int | None = Field(None, description="dishonest updates that the rule reckoned with")
    degraded: bool = Field(default=False, description="whether these are fewer than it was to stand")
    unchanged: str | None = Field(None, description="why the round left the model as it was")
    privacy: RoundPrivacy = RoundPrivacy()
    shares_rejected: dict[str, int] = Field(default_factory=dict, description="reason -> reports left out of the sum")
    contributors: tuple[int, ...] = Field((), description="aggregators that added noise")
    answered: tuple[int, ...] = Field((), description="aggregators whose answers opened the sum")
    tampered: tuple[int, ...] = Field((), description="those of them that answered wrongly, and were left out")
    integrity: Literal["unchecked", "checked", "corrected"] | None = Field(
        None, description="what is known of the answers"
    )


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
