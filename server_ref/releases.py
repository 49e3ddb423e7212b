"""A private aggregate as bytes: written before anything uses it, so that its noise is drawn once whatever happens."""

from __future__ import annotations

import json
from typing import Final, cast

import numpy as np

from client_sdk.protocol.errors import ProtocolError, StorageUnavailable
from client_sdk.protocol.frames import FrameLimits, decode_frame, encode_frame
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation.batch import Adjacency, Float64Array, PrivateAggregate

_VALUES: Final = "values"
_FACTS: Final = "facts"
_LIMITS: Final = FrameLimits(max_bytes=2**40, max_header_bytes=2**24)


def encode_release(aggregate: PrivateAggregate) -> bytes:
    """A frame with the values, and the facts as JSON."""
    facts = {
        "kind": aggregate.kind.value,
        "count": aggregate.count,
        "total_weight": aggregate.total_weight,
        "sensitivity": {str(a): value for a, value in aggregate.sensitivity.items()},
        "measurements": dict(aggregate.measurements),
        "indicator": aggregate.indicator,
        "noise_stddev": aggregate.noise_stddev,
        "adjacency": str(aggregate.adjacency),
    }
    return bytes(encode_frame({_VALUES: aggregate.values}, {_FACTS: json.dumps(facts, sort_keys=True)}))


def decode_release(data: bytes | memoryview) -> PrivateAggregate:
    """The inverse of ``encode_release``.

    Raises:
        StorageUnavailable: Damaged.
    """
    try:
        frame = decode_frame(data, _LIMITS)
        facts = json.loads(frame.metadata[_FACTS])
        return PrivateAggregate(
            values=np.array(cast("Float64Array", frame.tensors[_VALUES])),
            kind=UpdateKind(facts["kind"]),
            count=facts["count"],
            total_weight=facts["total_weight"],
            sensitivity={Adjacency(a): value for a, value in facts["sensitivity"].items()},
            measurements=facts["measurements"],
            indicator=facts.get("indicator"),
            noise_stddev=facts["noise_stddev"],
            adjacency=Adjacency(facts["adjacency"]),
        )
    except (ProtocolError, AttributeError, KeyError, ValueError, TypeError) as e:
        raise StorageUnavailable("a stored release is damaged on disk") from e
