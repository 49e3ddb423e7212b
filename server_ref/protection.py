"""Settings of a task that protect its devices' updates: differential privacy and secret sharing."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PrivacyConfig(_Section):
    """Client-level differential privacy of everything that the task releases.

    Either a budget is given (``epsilon``, ``delta``) for the whole task, from which the noise follows, or the noise
    itself, from which epsilon follows. It is accounted for devices that take part at most ``max_participations``
    times, which the server enforces: who is chosen is no secret, so that no amplification by sampling is claimed.
    """

    noise: Literal["none", "server", "aggregators", "devices"] = Field(
        "none", description="who adds noise to a round's sum; aggregators and devices: of secret-shared updates"
    )
    honest_devices: int | None = Field(
        None, ge=1, description="with noise by devices: so many of each sum's are relied on to have added theirs"
    )
    epsilon: float | None = Field(None, gt=0, allow_inf_nan=False, description="budget of the whole task")
    delta: float = Field(1e-5, gt=0, lt=1, description="chance that epsilon does not hold; below 1 / devices")
    noise_multiplier: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="noise per coordinate, in units of the clip norm; or epsilon"
    )
    noise_schedule: Literal["constant", "linear", "exponential", "step"] = Field(
        "constant", description="how the noise changes over the task: fixed before it begins, whatever training does"
    )
    final_noise: float = Field(
        0.5, gt=0, allow_inf_nan=False, description="noise of the last round, as a multiple of the first one's"
    )
    adjacency: Literal["zero-out", "replace-one"] = Field(
        "zero-out", description="what one device could have done instead: report nothing, or report anything"
    )
    max_participations: int | None = Field(
        None, ge=1, description="rounds that count a device at most; default: all of them"
    )
    buckets: int | None = Field(
        None, ge=2, description="noised sums of disjoint groups of reports, from which a robust rule makes one"
    )

    adaptive_clipping: bool = Field(
        default=False, description="let the clip norm follow a noised count of the updates that are within it"
    )
    target_quantile: float = Field(0.5, gt=0, lt=1, description="share of the updates that should be within it")
    clip_learning_rate: float = Field(0.2, gt=0, le=10, description="how fast it moves: of its logarithm, a round")

    @property
    def enabled(self) -> bool:
        """Whether anybody adds noise."""
        return self.noise != "none"

    @property
    def claim_follows_rounds(self) -> bool:
        """Whether a longer task claims less privacy: with given noise, and no limit of participations."""
        return self.noise_multiplier is not None and self.max_participations is None

    @model_validator(mode="after")
    def _budget_or_noise(self) -> Self:
        given = [name for name in ("epsilon", "noise_multiplier") if getattr(self, name) is not None]
        if self.enabled and len(given) != 1:
            raise ValueError("differential privacy needs either epsilon (and delta) or noise_multiplier, not both")
        if (self.noise == "devices") != (self.honest_devices is not None):
            raise ValueError("honest_devices goes with noise = devices, and that with it")
        if self.noise == "devices" and self.buckets is not None:
            raise ValueError("buckets need the full noise in each sum: set noise = aggregators")
        if self.noise_schedule != "constant" and (self.epsilon is None or self.noise == "devices"):
            raise ValueError("a noise schedule spends a budget (epsilon), and devices add the same noise in each round")
        self._check_adaptive()
        if not self.enabled and (given or self.buckets is not None):
            wanted = given[0] if given else "buckets"
            raise ValueError(f"{wanted} is given, but nobody adds noise: set privacy.noise to server or aggregators")
        return self

    def _check_adaptive(self) -> None:
        if not self.adaptive_clipping:
            for name in ("target_quantile", "clip_learning_rate"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: only adaptive_clipping has a use for that; set it too")
        elif self.noise not in {"server", "aggregators"}:
            raise ValueError(
                "adaptive_clipping follows a noised count: let the server or aggregators add noise (privacy.noise)"
            )
        elif self.buckets is not None or self.noise_schedule != "constant":
            raise ValueError("adaptive_clipping needs one sum a round, with the same noise: no buckets, no schedule")


class SecureConfig(_Section):
    """Secret sharing: the server learns sums of updates only.

    No single one is known to anybody while fewer than ``threshold`` aggregators put their shares together.
    """

    num_aggregators: int = Field(5, ge=2, le=32, description="shares of each update")
    threshold: int = Field(3, ge=2, description="shares without which nothing is known")
    field: Literal["m61", "m127"] = Field("m61", description="prime field: 2^61 - 1 or 2^127 - 1")
    packing: Literal[1, 2] = Field(1, description="coordinates in one field element; 2 needs one aggregator more")
    suite: Literal["x25519", "mlkem768-x25519"] = Field("x25519", description="how shares are sealed; or post-quantum")
    checks: Literal["trust-devices", "projections"] = Field(
        "trust-devices", description="what is checked of an update that nobody sees"
    )
    minimum_cohort: int = Field(2, ge=2, description="fewest reports that a sum may be opened of")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.threshold > self.num_aggregators:
            raise ValueError(f"threshold {self.threshold} of {self.num_aggregators} aggregators can never be reached")
        if self.threshold + self.packing - 1 > self.num_aggregators:
            raise ValueError(f"packing {self.packing} needs {self.threshold + 1} of {self.num_aggregators} aggregators")
        return self

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``3of5``.

        Raises:
            ValueError: Anything else.
        """
        threshold, of, shares = text.partition("of")
        if not (of and threshold.isdecimal() and shares.isdecimal()):
            raise ValueError(f"{text!r} is not THRESHOLDofAGGREGATORS, such as 3of5")
        return cls(threshold=int(threshold), num_aggregators=int(shares))
