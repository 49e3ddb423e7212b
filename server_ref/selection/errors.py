"""What can be wrong with a wish to select."""

from __future__ import annotations

from client_sdk.protocol.errors import ConfigurationError


class UnknownStrategy(ConfigurationError, ValueError):
    """A way of selecting that there is not; the message lists those that there are."""
