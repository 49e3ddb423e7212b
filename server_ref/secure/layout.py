"""What the shares of a task hold: from what an aggregator pins and the task that it serves."""

from __future__ import annotations

from client_sdk.protocol.field import Field
from client_sdk.protocol.sealing import SealingSuite
from client_sdk.protocol.secure import SecureLayout
from client_sdk.protocol.shamir import Scheme
from server_ref.secure.messages import TaskBinding
from server_ref.secure.parameters import PinnedParameters


def secure_layout(parameters: PinnedParameters, task: TaskBinding, suite: SealingSuite) -> SecureLayout:
    """The layout of every share of the task."""
    field = Field.by_name(parameters.field)
    scheme = Scheme(parameters.threshold, parameters.num_aggregators, field, parameters.packing)
    return SecureLayout(scheme, task.size, parameters.indicator, suite)
