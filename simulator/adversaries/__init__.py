"""Devices that attack: the literature's attacks on updates and on data, who carries them out, and how they are sent."""

from simulator.adversaries.base import Adversary, Attack, AttackContext
from simulator.adversaries.plan import AttackPlan, Coalition, Rehearse
from simulator.adversaries.registry import ATTACKS, attack_forms, parse_attack
from simulator.adversaries.roster import Roster

__all__ = [
    "ATTACKS",
    "Adversary",
    "Attack",
    "AttackContext",
    "AttackPlan",
    "Coalition",
    "Rehearse",
    "Roster",
    "attack_forms",
    "parse_attack",
]
