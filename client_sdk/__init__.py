"""pocketfed's client SDK: what an app embeds to take part in federated learning.

Names are loaded on first use (PEP 562): importing this package, or ``client_sdk.protocol``, imports neither the
network nor the runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client_sdk.checkpoint import CheckpointManager
    from client_sdk.client import MobileClient
    from client_sdk.inference import PersonalInference
    from client_sdk.meta_training import MetaTrainer
    from client_sdk.personal_client import PersonalizedMobileClient
    from client_sdk.personal_store import PersonalModelStore
    from client_sdk.personalization import PersonalizationConfig
    from client_sdk.power import PowerMonitor
    from client_sdk.protocol.profile import DeviceProfile
    from client_sdk.protocol.program import Program
    from client_sdk.protocol.updates import WorkerGradient
    from client_sdk.runtime import load_program
    from client_sdk.training import LocalTrainer

__all__ = [
    "CheckpointManager",
    "DeviceProfile",
    "LocalTrainer",
    "MetaTrainer",
    "MobileClient",
    "PersonalInference",
    "PersonalModelStore",
    "PersonalizationConfig",
    "PersonalizedMobileClient",
    "PowerMonitor",
    "Program",
    "WorkerGradient",
    "load_program",
]

_HOMES = {
    "CheckpointManager": "client_sdk.checkpoint",
    "DeviceProfile": "client_sdk.protocol.profile",
    "LocalTrainer": "client_sdk.training",
    "MetaTrainer": "client_sdk.meta_training",
    "MobileClient": "client_sdk.client",
    "PersonalInference": "client_sdk.inference",
    "PersonalModelStore": "client_sdk.personal_store",
    "PersonalizationConfig": "client_sdk.personalization",
    "PersonalizedMobileClient": "client_sdk.personal_client",
    "PowerMonitor": "client_sdk.power",
    "Program": "client_sdk.protocol.program",
    "WorkerGradient": "client_sdk.protocol.updates",
    "load_program": "client_sdk.runtime",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - classes and functions alike
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
