"""Settings of ``pocketfed aggregator``: what one party's operator decides, and nobody else.

Precedence: flags, then ``POCKETFED_AGGREGATOR_*`` environment variables, then the file, then the defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from client_sdk.protocol.errors import ConfigurationError
from client_sdk.protocol.messages import Message, SigningKeyHex
from server_ref.app.requests import public_key
from server_ref.secure.identity import AggregatorConfig
from server_ref.secure.keys import Peers, read_public
from server_ref.secure.messages import Index, TaskBinding
from server_ref.secure.parameters import PinnedParameters
from server_ref.settings import explain, layered, read_toml

_PATHS = ("data_dir", "key_file", "peers_file", "tls_certificate", "tls_key")
_FLAGS = {
    "index": ("index", "--index"),
    "data_dir": ("data_dir", "--data-dir"),
    "key_file": ("key_file", "--key-file"),
    "peers_file": ("peers_file", "--peers-file"),
}


def _table(model: type[Message]) -> BeforeValidator:
    """A message written as a TOML table, or as variables: there an enum is its name, and a number its digits."""

    def read(value: Any) -> Any:  # noqa: ANN401 - whatever a file or a variable holds
        return model.model_validate(value, strict=False) if isinstance(value, dict) else value

    return BeforeValidator(read)


class AggregatorSettings(BaseSettings):
    """One aggregator process."""

    model_config = SettingsConfigDict(
        env_prefix="POCKETFED_AGGREGATOR_",
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        validate_default=True,
    )

    index: Index = Field(description="which of the n aggregators this is, from 1")
    data_dir: Path = Field(description="this aggregator's own database and blobs")
    key_file: Path = Field(description="private keys, made by `pocketfed aggregator init`")
    peers_file: Path = Field(description="public keys of all aggregators, made by `pocketfed aggregator peers`")
    coordinator_key: SigningKeyHex = Field(description="public key of the one coordinator that is served")
    host: str = Field("127.0.0.1", description="address to listen on; the default is loopback only")
    port: int = Field(8471, ge=0, le=65535, description="0 picks a free port")
    tls_certificate: Path | None = Field(None, description="PEM chain; with it the process itself speaks TLS")
    tls_key: Path | None = Field(None, description="PEM key of the certificate")
    exit_with_stdin: bool = Field(
        default=False, description="stop when standard input closes: for a parent that must not leave orphans"
    )
    blob_quota_bytes: int | None = Field(None, gt=0, description="refuse shares beyond this much blob storage")
    keep_rounds: int = Field(64, ge=1, description="for so many rounds answers and unused shares are kept")
    parameters: Annotated[PinnedParameters, _table(PinnedParameters)] = Field(
        description="what this aggregator insists on, whoever asks"
    )
    task: Annotated[TaskBinding, _table(TaskBinding)] | None = Field(
        None, description="the task to serve; without it, the first that the coordinator names"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            public_key(self.coordinator_key)
        except ValueError:
            raise ValueError("coordinator_key is no Ed25519 key") from None
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        return self

    def aggregator_config(self) -> AggregatorConfig:
        """What the aggregator itself is given.

        Raises:
            ConfigurationError: The peers' file cannot be read, or does not fit the parameters.
        """
        peers = read_public(self.peers_file, Peers)
        try:
            return AggregatorConfig(
                index=self.index,
                parameters=self.parameters,
                suite=peers.suite,
                peers=peers.peers,
                task=self.task,
                keep_rounds=self.keep_rounds,
            )
        except ValidationError as e:
            raise ConfigurationError("; ".join(str(problem["msg"]) for problem in e.errors())) from e


def load_settings(path: Path | None = None, overrides: dict[str, Any] | None = None) -> AggregatorSettings:
    """Read the settings.

    Args:
        path: TOML file; relative paths inside it are taken from its folder.
        overrides: Values from flags; they win over file and environment.

    Raises:
        ConfigurationError: Unreadable file, unknown name, or a value that cannot be.
    """
    values = {} if path is None else read_toml(path, _PATHS)
    try:
        return layered(AggregatorSettings, values, overrides or {})
    except ValidationError as e:
        raise ConfigurationError(explain(e, path, _FLAGS)) from e
