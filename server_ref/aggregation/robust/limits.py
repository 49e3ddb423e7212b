"""The rules by name: how many dishonest rows each stands, which options it has a use for, where its code is.

Loads no compiler: a rule's module is imported when the rule is first applied.

Sources: P. Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017 (Krum); E. M. El Mhamdi et al., "The
Hidden Vulnerability of Distributed Learning in Byzantium", ICML 2018 (Multi-Krum, Bulyan); D. Yin et al., "Byzantine-
Robust Distributed Learning", ICML 2018 (median, trimmed mean); K. Pillutla et al., "Robust Aggregation for Federated
Learning", IEEE TSP 2022 (geometric median); S. P. Karimireddy et al., "Learning from History", ICML 2021 (centred
clipping) and "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR 2022; Y. Allouah et al.,
"Fixing by Mixing", AISTATS 2023 (nearest-neighbour mixing).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from client_sdk.protocol.errors import ConfigurationError, EmptyAggregate, TooManyByzantine
from server_ref.aggregation.robust.options import DistanceMode, Mixing, RuleOptions


@dataclass(frozen=True)
class Rule:
    """A rule's facts.

    Attributes:
        name: As configuration spells it.
        module: Module of this package that has the code.
        function: Its name there.
        slope: The rule stands f dishonest rows among ``slope * f + offset`` or more.
        offset: See ``slope``.
        modes: Ways to compute distances that it can work with.
        uses: Options that may be set for it.
    """

    name: str
    module: str
    function: str
    slope: int
    offset: int
    modes: frozenset[DistanceMode] = frozenset({DistanceMode.EXACT})
    uses: frozenset[str] = frozenset()

    def limit(self, num_rows: int) -> int:
        """The most dishonest rows that it stands among so many; negative if it needs more rows even for none."""
        return (num_rows - self.offset) // self.slope

    @property
    def condition(self) -> str:
        """What ``limit`` stands for, as a formula."""
        return f"n >= {self.slope}f + {self.offset}"


_ALL_MODES = frozenset(DistanceMode)
_TABLE = (
    Rule("krum", "selection", "krum", 2, 3, _ALL_MODES),
    Rule("multi-krum", "selection", "multi_krum", 2, 3, _ALL_MODES, frozenset({"m"})),
    Rule("trimmed-mean", "coordinatewise", "trimmed_mean", 2, 1),
    Rule("median", "coordinatewise", "median", 2, 1),
    Rule("geometric-median", "centres", "geometric_median", 2, 1, uses=frozenset({"iterations", "tolerance"})),
    Rule("centered-clipping", "centres", "centered_clipping", 2, 1, uses=frozenset({"iterations", "radius"})),
    Rule("bulyan", "iterated_selection", "bulyan", 4, 3, _ALL_MODES - {DistanceMode.SAMPLED}),
)

RULES: Mapping[str, Rule] = MappingProxyType({rule.name: rule for rule in _TABLE})
"""All rules by name."""

_OF_SINGLE_RULES = ("m", "radius", "iterations", "tolerance")


def check_options(name: str, options: RuleOptions) -> Rule:
    """The rule of this name, if the options fit it.

    Raises:
        ConfigurationError: No such rule, an option that it has no use for, a distance mode that it cannot work with,
            or a random mode without a seed.
    """
    rule = RULES.get(name)
    if rule is None:
        raise ConfigurationError(f"there is no rule {name!r}; choose one of {', '.join(RULES)}")
    for option in _OF_SINGLE_RULES:
        if getattr(options, option) is not None and option not in rule.uses:
            raise ConfigurationError(f"{name} has no use for {option}; leave it out")
    modes = rule.modes
    if options.mixing is Mixing.NNM:
        # Mixing itself needs every distance, whatever rule follows; it then lends its mode to the rule.
        modes = (modes | {DistanceMode.SKETCH}) - {DistanceMode.SAMPLED}
    if options.mode not in modes:
        raise ConfigurationError(
            f"{name} with mixing {options.mixing.value!r} cannot use {options.mode.value} distances; choose "
            f"{' or '.join(sorted(modes))}"
        )
    if options.seed is None and (options.mode is not DistanceMode.EXACT or options.mixing is Mixing.BUCKETING):
        raise ConfigurationError("sketches, sampled peers and buckets need a seed, drawn after the updates came in")
    return rule


def rows_after_mixing(num_rows: int, options: RuleOptions) -> int:
    """How many rows the rule sees: one a bucket, or all."""
    return -(-num_rows // options.bucket_size) if options.mixing is Mixing.BUCKETING else num_rows


def tolerated(rule: Rule, num_rows: int, num_byzantine: int, options: RuleOptions) -> int:
    """The dishonest rows that the rule assumes: what the caller assumes, or fewer in degraded mode.

    Args:
        rule: The rule.
        num_rows: Updates, before mixing. A dishonest update spoils its bucket, so f updates spoil up to f buckets.
        num_byzantine: Dishonest ones among them.
        options: Mixing and ``degraded`` count here.

    Returns:
        ``num_byzantine``, or in degraded mode the rule's limit (0 where that is negative) if it is smaller.

    Raises:
        EmptyAggregate: No rows.
        ConfigurationError: A negative number, or an m that ``rows_to_average`` refuses.
        TooManyByzantine: More than the rule stands, and not in degraded mode.
    """
    if num_rows < 1:
        raise EmptyAggregate(f"{rule.name} of no updates")
    if num_byzantine < 0:
        raise ConfigurationError(f"{num_byzantine} dishonest updates; 0 means none, an estimate is made before")
    seen = rows_after_mixing(num_rows, options)
    limit = rule.limit(seen)
    if num_byzantine <= limit:
        # Refused here, and not only by the first buffer that is reduced.
        rows_to_average(seen, num_byzantine, options)
        return num_byzantine
    if options.degraded:
        return max(0, limit)
    buckets = f" in {seen} buckets" if seen != num_rows else ""
    need = rule.slope * num_byzantine + rule.offset
    raise TooManyByzantine(
        f"{rule.name} stands f dishonest updates only if {rule.condition}; there are {num_rows}{buckets}, and f = "
        f"{num_byzantine} is assumed: gather {need if not buckets else f'enough for {need} buckets'}, "
        f"{f'assume at most {limit}' if limit >= 0 else 'choose another rule'}, or allow the degraded mode",
        rule=rule.name,
        num_rows=seen,
        num_byzantine=num_byzantine,
        limit=limit,
    )


def rows_to_average(num_rows: int, num_byzantine: int, options: RuleOptions) -> int:
    """Multi-Krum's m: n - f - 2 unless the options name another.

    Raises:
        ConfigurationError: More than n - f, so that a dishonest row is certain to be among them.
    """
    most = max(1, num_rows - num_byzantine)
    if options.m is None:
        return max(1, most - 2)
    if options.m <= most:
        return options.m
    if options.degraded:
        return most
    raise ConfigurationError(
        f"multi-krum cannot leave {num_byzantine} of {num_rows} rows out and average m = {options.m}; "
        f"choose m <= {most}"
    )
