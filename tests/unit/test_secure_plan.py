"""What devices are told of a task is what its aggregators open shares under, or nobody's report would count."""

from typing import Any

import pytest

from client_sdk.protocol.sealing import SealingSuite
from server_ref.config import TaskConfig
from server_ref.privacy_plan import PrivacyPlan
from server_ref.secure.identity import AggregatorConfig, AggregatorKeys
from server_ref.secure.intake import accepted_terms
from server_ref.secure_plan import SharingPlan

KEYS = [AggregatorKeys.generate(SealingSuite.X25519) for _ in range(5)]


def plan_of(**privacy: Any) -> SharingPlan:
    task = TaskConfig(
        bundle="b", rounds=7, buffer_size=10, aggregation={"clip_norm": 0.5}, privacy=privacy, secure={"packing": 2}
    )
    plan = SharingPlan.of(task, 100, 1, PrivacyPlan.of(task))
    assert plan is not None
    return plan


@pytest.mark.parametrize(
    ("privacy", "participations"),
    [
        ({}, None),
        ({"noise": "aggregators", "epsilon": 8.0}, 7),
        ({"noise": "aggregators", "epsilon": 8.0, "max_participations": 3}, 3),
        ({"noise": "aggregators", "noise_multiplier": 2.0, "max_participations": 99}, 7),
        ({"noise": "devices", "epsilon": 8.0, "honest_devices": 4, "max_participations": 1}, 1),
    ],
    ids=["exact", "every round", "three", "more than rounds", "devices"],
)
def test_devices_and_aggregators_are_told_the_same(privacy: dict[str, Any], participations: int | None):
    sharing = plan_of(**privacy)
    announced = sharing.announce([key.public.sealing_key for key in KEYS])
    config = AggregatorConfig(index=1, parameters=sharing.pinned, peers=tuple(key.public for key in KEYS))
    assert announced.terms == accepted_terms(config, announced.clip_norm, announced.indicator_norm)
    assert announced.max_participations == participations
    assert (announced.noise == "none") == (sharing.pinned.privacy is None)
