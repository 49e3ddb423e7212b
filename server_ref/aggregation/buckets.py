"""Buckets: a robust rule under differential privacy, as post-processing of noised sums of disjoint groups.

A robust rule on single updates has a sensitivity of up to twice the clip norm, whatever the number of clients, so noise
that protects one client drowns all others (and for most rules no sensitivity is proved at all). Instead, the reports
of a round are dealt out to R buckets by a public draw, each bucket's sum gets the *full* noise, and the rule looks at
the noised sums only. A client is in one bucket, so all R sums together cost what one sum costs; the rule, whatever it
is, is post-processing. The price is noise: R times the variance on the mean of all.

f dishonest clients spoil at most f buckets. The rule must stand f bad rows among R (Krum: R >= 2f + 3).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from client_sdk.protocol.errors import ConfigurationError, ShapeMismatch
from server_ref.aggregation.batch import Adjacency, Aggregate, PrivateAggregate
from server_ref.aggregation.errors import NoiseMissing, NoiseUnexpected
from server_ref.aggregation.robust import RULES, RuleOptions, apply_rule, check_options
from server_ref.aggregation.robust.limits import tolerated

_SEED_BYTES: Final = 16
"""Shortest seed of a round: nobody guesses it before it is drawn."""


def assign_buckets(
    numbers: Sequence[int], num_buckets: int, seed: bytes, *, adjacency: Adjacency = Adjacency.ZERO_OUT
) -> tuple[tuple[int, ...], ...]:
    """Deal reports out to buckets, by a pseudorandom function of their assignment numbers.

    Anybody can repeat the draw from the seed. It must be drawn after the reports are fixed, or a coalition of devices
    could arrange to meet. Assignment numbers are the server's, so that no device can choose where it lands.

    Args:
        numbers: Assignment numbers of the round's reports, all different; their order does not matter.
        num_buckets: R.
        seed: Of this round, 16 bytes or more; public.
        adjacency: Where who reports is public (zero-out, replace-one), buckets differ in size by at most one. Under
            add/remove adjacency a report's bucket must not depend on who else reports, so each is drawn on its own, and
            some may stay empty.

    Returns:
        For each bucket its assignment numbers, ascending. A report is in exactly one.

    Raises:
        ConfigurationError: No buckets, a short seed, a number twice or negative, or fewer reports than buckets of equal
            size need.
    """
    if num_buckets < 1 or len(seed) < _SEED_BYTES:
        raise ConfigurationError(
            f"{num_buckets} buckets from a seed of {len(seed)} bytes; at least 1 and {_SEED_BYTES}"
        )
    if len(set(numbers)) < len(numbers) or any(n < 0 for n in numbers):
        raise ConfigurationError("assignment numbers are different, and not negative")
    drawn = {n: hmac.digest(seed, b"pocketfed bucket v1" + n.to_bytes(16, "big"), "sha256") for n in numbers}
    if adjacency is Adjacency.ADD_REMOVE:
        # 256 bits modulo R: even up to 2**-200.
        places = {n: int.from_bytes(d, "big") % num_buckets for n, d in drawn.items()}
    else:
        if len(numbers) < num_buckets:
            raise ConfigurationError(f"{len(numbers)} reports do not fill {num_buckets} buckets; use fewer")
        places = {n: i % num_buckets for i, n in enumerate(sorted(numbers, key=drawn.__getitem__))}
    return tuple(tuple(sorted(n for n in numbers if places[n] == bucket)) for bucket in range(num_buckets))


def bucket_seed(round_id: int, contributions: Sequence[bytes]) -> bytes:
    """A round's public seed from what several parties contribute, each before it saw the others'.

    Unpredictable if one of them is: with commitments to the contributions exchanged first, no party chooses the draw.
    """
    hashed = hashlib.sha256(b"pocketfed bucket seed v1" + round_id.to_bytes(8, "big"))
    for part in contributions:
        hashed.update(len(part).to_bytes(8, "big") + part)
    return hashed.digest()


@dataclass(frozen=True)
class BucketedRule:
    """A robust rule on the noised aggregates of disjoint buckets.

    Attributes:
        num_buckets: R.
        num_byzantine: f, dishonest clients, and so bad buckets, that it has to stand.
        rule: Name of a rule of ``robust.RULES``.
        options: What the rule can be told besides. A seed in it may be public: it goes with positions of buckets.

    Raises:
        ConfigurationError: No such rule, or options that do not fit it.
        TooManyByzantine: The rule does not stand f of R (Krum and Multi-Krum: R >= 2f + 3).
    """

    num_buckets: int
    num_byzantine: int
    rule: str = "krum"
    options: RuleOptions = field(default_factory=RuleOptions)

    def __post_init__(self) -> None:
        check_options(self.rule, self.options)
        if self.options.degraded:
            raise ConfigurationError("a degraded rule would stand fewer bad buckets than declared; use more buckets")
        tolerated(RULES[self.rule], self.num_buckets, self.num_byzantine, self.options)

    @property
    def title(self) -> str:
        """The rule and what it assumes."""
        return f"{self.rule} on {self.num_buckets} noised buckets, of which {self.num_byzantine} may be bad"

    def combine(self, buckets: Sequence[Aggregate]) -> PrivateAggregate:
        """One aggregate from the buckets' noised ones. It claims what they claim: nothing else was looked at.

        Args:
            buckets: One ``PrivateAggregate`` for each bucket, means over their own public denominators.

        Returns:
            ``noise_stddev`` is the largest of the buckets': what the rule leaves of it is not Gaussian.
            ``measurements`` has ``buckets`` (their counts), and ``excluded_buckets`` where the rule selects.

        Raises:
            NoiseMissing: A bucket carries no noise.
            NoiseUnexpected: Buckets whose noise is for different adjacencies.
            ShapeMismatch: Another number of buckets, or buckets of different sizes or kinds.
        """
        private = [b for b in buckets if isinstance(b, PrivateAggregate) and b.noise_stddev > 0]
        if len(private) < len(buckets):
            raise NoiseMissing(
                "a bucket's sum carries no noise, so the rule would look at bare updates; noise each sum"
            )
        if len(private) != self.num_buckets:
            raise ShapeMismatch(f"{len(private)} buckets for a rule on {self.num_buckets}")
        first = private[0]
        if any(b.adjacency is not first.adjacency for b in private):
            raise NoiseUnexpected("the buckets' noise is calibrated for different adjacencies")
        if any(b.kind is not first.kind or b.values.shape != first.values.shape for b in private):
            raise ShapeMismatch("the buckets hold updates of different kinds or sizes")
        found = apply_rule(self.rule, [b.values for b in private], self.num_byzantine, self.options)
        measurements: dict[str, object] = {
            "rule": self.rule,
            "num_byzantine": found.num_byzantine,
            "buckets": [b.count for b in private],
        }
        if found.selected is not None:
            measurements["excluded_buckets"] = [i for i in range(len(private)) if i not in set(found.selected)]
        return PrivateAggregate(
            values=np.asarray(found.values, np.float64),
            kind=first.kind,
            count=sum(b.count for b in private),
            total_weight=sum(b.total_weight for b in private),
            measurements=measurements,
            noise_stddev=max(b.noise_stddev for b in private),
            adjacency=first.adjacency,
        )
