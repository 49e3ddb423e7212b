"""Settings of a process: a TOML file, environment variables over it, flags over both; unknown names are refused."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

from client_sdk.protocol.errors import ConfigurationError

S = TypeVar("S", bound=BaseSettings)


def read_toml(path: Path, anchored: Iterable[str]) -> dict[str, Any]:
    """A TOML file's values.

    Args:
        path: The file.
        anchored: Dotted names of settings that are paths; a relative one is taken from the file's folder.

    Raises:
        ConfigurationError: Unreadable, or not TOML.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigurationError(f"cannot read {path}: {e.strerror or e}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigurationError(f"{path} is not valid TOML: {e}") from e
    for name in anchored:
        *tables, key = name.split(".")
        table: Any = values
        for each in tables:
            table = table.get(each) if isinstance(table, dict) else None
        if isinstance(table, dict) and isinstance(table.get(key), str):
            table[key] = path.parent / table[key]
    return values


def toml_table(name: str, values: Mapping[str, Any]) -> list[str]:
    """The lines of a table, then those of the tables inside it.

    Args:
        name: Dotted name of the table.
        values: Booleans, numbers, and what has a text; None leaves a setting out.
    """
    lines = ["", f"[{name}]"]
    tables = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            tables += toml_table(f"{name}.{key}", value)
        elif value is not None:
            lines.append(f"{key} = {toml_value(value)}")
    return lines + tables


def toml_value(value: Any) -> str:  # noqa: ANN401 - strings, paths, numbers, lists of them
    """A value as TOML writes it."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case list() | tuple():
            return f"[{', '.join(map(toml_value, value))}]"
        case _:
            # A JSON string without escaped non-ASCII characters is a TOML basic string.
            return json.dumps(str(value), ensure_ascii=False)


def layered(settings: type[S], values: Mapping[str, Any], overrides: Mapping[str, Any]) -> S:
    """The settings: ``overrides`` win over the environment, the environment over ``values``.

    Raises:
        ValidationError: Unknown names, or values that cannot be.
    """

    class Layered(settings):  # type: ignore[valid-type, misc]  # a class that is an argument
        """With a source of its own."""

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            del dotenv_settings, file_secret_settings
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=dict(values))

    loaded: S = Layered(**overrides)
    return loaded


def explain(error: ValidationError, path: Path | None, flags: Mapping[str, tuple[str, str]]) -> str:
    """One line: every setting that is wrong, and how to give the ones that are missing.

    Args:
        error: What is wrong.
        path: The file, if there was one.
        flags: For what may be missing, the setting to give and its flag.
    """
    problems = []
    for problem in error.errors():
        name = ".".join(map(str, problem["loc"]))
        if problem["type"] == "missing" and name in flags:
            setting, flag = flags[name]
            problems.append(f"{setting} is missing (give {flag}, or set it in the --config file)")
        else:
            problems.append(f"{name}: {problem['msg']}")
    return f"configuration{f' {path}' if path else ''}: {'; '.join(problems)}"
