"""Compression of updates, both ends: specification, codec, error feedback (docs/compression.md)."""

from client_sdk.protocol.compression.codec import Codec
from client_sdk.protocol.compression.feedback import ErrorFeedback
from client_sdk.protocol.compression.layout import Layout
from client_sdk.protocol.compression.payloads import CompressionStats, SparseUpdate
from client_sdk.protocol.compression.spec import CompressionMethod, CompressionSpec

__all__ = [
    "Codec",
    "CompressionMethod",
    "CompressionSpec",
    "CompressionStats",
    "ErrorFeedback",
    "Layout",
    "SparseUpdate",
]
