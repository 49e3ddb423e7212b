"""What ``Pipeline.build`` refuses, each by a name of its own, and that sound combinations pass."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from client_sdk.protocol.compression import CompressionSpec
from client_sdk.protocol.errors import BudgetExceeded, ConfigurationError, TooManyByzantine
from client_sdk.protocol.updates import UpdateKind
from server_ref.aggregation import (
    Adjacency,
    BaselineMean,
    BufferedSchedule,
    ClipGlobal,
    ClipLayers,
    DecodeCompressed,
    DecodeDense,
    ExactMean,
    ExternalNoise,
    Facts,
    NoClip,
    NoNoise,
    Pipeline,
    RobustRule,
    RuleOptions,
    Scaffold,
    Sgd,
    Slot,
    StalenessPolicy,
    ValidateFacts,
    Visibility,
)
from server_ref.aggregation.errors import (
    CohortDependentAcceptance,
    DataDependentSupport,
    IndividualUpdatesNeeded,
    NoiseMissing,
    NoiseUnexpected,
    NoiseUseless,
    PipelineError,
    SlotFilledTwice,
    SlotMissing,
    UnboundedRange,
    UnboundedWeight,
    UndeclaredRescaling,
    UnderstatedSensitivity,
    UnknownSensitivity,
)
from tests.noise import CalibratedNoise

FACTS = Facts(size=4, kind=UpdateKind.DELTA, capacity=20, max_weight=10, max_abs=100.0)
SUM_ONLY = replace(FACTS, visibility=Visibility.SUM, norm_bound=1.0)
NOISE = CalibratedNoise(noise_multiplier=1.0)
REPLACE_ONE = CalibratedNoise(noise_multiplier=1.0, adjacency=Adjacency.REPLACE_ONE)
MEAN, CLIP, APPLY = ExactMean(), ClipGlobal(1.0), Sgd()


@dataclass(frozen=True)
class AcceptNearTheMedian(ValidateFacts):
    """Lets an update pass by comparing it with the others: what makes acceptance depend on the cohort."""

    def derive(self, facts: Facts) -> Facts:
        return replace(facts, cohort_dependent=True)


@dataclass(frozen=True)
class NormaliseToTheMedian(ClipGlobal):
    """Rescales an update by something that other updates decide."""

    def derive(self, facts: Facts) -> Facts:
        return replace(super().derive(facts), rescaled=True)


def build(*stages, facts: Facts = FACTS, private: bool = False) -> Pipeline:
    return Pipeline.build(*stages, facts=facts, private=private)


# Name, stages, what differs from FACTS, the error, and what its message tells to change.
REFUSED: list[tuple[str, tuple, dict, type[Exception], str]] = [
    ("two reduces", (MEAN, RobustRule("median", 1), APPLY), {}, SlotFilledTwice, "drop one"),
    ("the same stage twice", (MEAN, CLIP, CLIP, APPLY), {}, SlotFilledTwice, "drop one"),
    ("no reduce", (APPLY,), {}, SlotMissing, "reduce slot is empty"),
    ("no apply", (MEAN,), {}, SlotMissing, "apply slot is empty"),
    ("neither", (CLIP,), {}, SlotMissing, "reduce and apply"),
    ("noise without a clip", (MEAN, NOISE, APPLY), {}, UnknownSensitivity, "add a clip stage"),
    (
        "noise for add/remove",
        (MEAN, CLIP, CalibratedNoise(1.0, Adjacency.ADD_REMOVE), APPLY),
        {},
        UnknownSensitivity,
        "another adjacency",
    ),
    ("noise on a rounding baseline", (BaselineMean(), CLIP, NOISE, APPLY), {}, UnknownSensitivity, "the mean"),
    ("noise on krum", (RobustRule("krum", 2), CLIP, REPLACE_ONE, APPLY), {}, NoiseUseless, "three sound modes"),
    (
        "noise on the median of an odd number",
        (RobustRule("median", 1), CLIP, REPLACE_ONE, APPLY),
        {"count": 19},
        NoiseUseless,
        "twice the clip norm",
    ),
    (
        "noise on trimming for zero-out",
        (RobustRule("trimmed-mean", 2), CLIP, NOISE, APPLY),
        {},
        UnknownSensitivity,
        "proved",
    ),
    ("noise on bulyan", (RobustRule("bulyan", 2), CLIP, REPLACE_ONE, APPLY), {}, UnknownSensitivity, "a rule"),
    (
        "noise on the geometric median",
        (RobustRule("geometric-median", 2), CLIP, REPLACE_ONE, APPLY),
        {},
        UnknownSensitivity,
        "a rule for which",
    ),
    (
        "noise on an estimated number",
        (RobustRule("median"), CLIP, REPLACE_ONE, APPLY),
        {},
        UnknownSensitivity,
        "a rule for which",
    ),
    (
        "noise after mixing",
        (RobustRule("median", 1, options=RuleOptions(mixing="nnm")), CLIP, REPLACE_ONE, APPLY),
        {},
        UnknownSensitivity,
        "a rule for which",
    ),
    ("noise on FedNova", (ExactMean(renormalise=True), CLIP, NOISE, APPLY), {}, UndeclaredRescaling, "drop the"),
    (
        "noise on a robust FedNova",
        (RobustRule("median", 1, renormalise=True), CLIP, REPLACE_ONE, APPLY),
        {},
        UndeclaredRescaling,
        "drop the rescaling",
    ),
    (
        "noise after a private rescaling",
        (MEAN, NormaliseToTheMedian(1.0), NOISE, APPLY),
        {},
        UndeclaredRescaling,
        "drop the rescaling",
    ),
    (
        "noise on relative acceptance",
        (AcceptNearTheMedian(), MEAN, CLIP, NOISE, APPLY),
        {},
        CohortDependentAcceptance,
        "accept by each update alone",
    ),
    ("a private pipeline without noise", (MEAN, CLIP, APPLY), {"private": True}, NoiseMissing, "fill the slot"),
    (
        "a private pipeline that says none",
        (MEAN, CLIP, NoNoise(), APPLY),
        {"private": True},
        NoiseMissing,
        "fill the slot",
    ),
    (
        "external noise on visible updates",
        (MEAN, CLIP, ExternalNoise(), APPLY),
        {},
        NoiseUnexpected,
        "use another stage",
    ),
    ("noise declared of what arrives", (MEAN, APPLY), {"noised": True}, NoiseUnexpected, "stages find out"),
    (
        "a sensitivity declared",
        (MEAN, APPLY),
        {"sensitivity": {Adjacency.ZERO_OUT: 0.1}},
        NoiseUnexpected,
        "stages find",
    ),
    ("an unbounded range", (MEAN, APPLY), {"max_abs": None}, UnboundedRange, "declare max_abs or clip"),
    (
        "fixed point of unbounded values",
        (ExactMean("fixed"), APPLY),
        {"max_abs": None},
        UnboundedRange,
        "declare max_abs",
    ),
    ("a norm bound that nothing enforces", (MEAN, NOISE, APPLY), {"norm_bound": 1.0}, UnboundedRange, "clip stage"),
    ("an infinite range", (MEAN, APPLY), {"max_abs": float("inf")}, UnboundedRange, "leave it out"),
    ("a range that is no number", (MEAN, APPLY), {"max_abs": float("nan")}, UnboundedRange, "leave it out"),
    ("sample weights without a maximum", (MEAN, CLIP, APPLY), {"max_weight": None}, UnboundedWeight, "max_weight"),
    ("the same for a baseline", (BaselineMean(), APPLY), {"max_weight": None}, UnboundedWeight, "max_weight"),
    (
        "staleness weights on top of them",
        (BufferedSchedule(StalenessPolicy(max_staleness=3), 5), MEAN, CLIP, APPLY),
        {"max_weight": None},
        UnboundedWeight,
        "declare max_weight",
    ),
    ("a weight of nothing", (MEAN, APPLY), {"max_weight": 0}, UnboundedWeight, "from 1"),
    ("a denominator of nothing", (MEAN, APPLY), {"constant_denominator": 0}, UnboundedWeight, "from 1"),
    (
        "a rule on a sum",
        (RobustRule("krum", 2), APPLY),
        {"visibility": Visibility.SUM, "norm_bound": 1.0},
        IndividualUpdatesNeeded,
        "use the mean",
    ),
    (
        "a baseline on a sum",
        (BaselineMean(), APPLY),
        {"visibility": Visibility.SUM, "norm_bound": 1.0},
        IndividualUpdatesNeeded,
        "use the exact mean",
    ),
    (
        "clipping a sum",
        (MEAN, CLIP, APPLY),
        {"visibility": Visibility.SUM, "norm_bound": 1.0},
        IndividualUpdatesNeeded,
        "leave it to the devices",
    ),
    (
        "clipping a sum by layers",
        (MEAN, ClipLayers(1.0, ((0, 4),)), APPLY),
        {"visibility": Visibility.SUM, "norm_bound": 1.0},
        IndividualUpdatesNeeded,
        "leave it to the devices",
    ),
    (
        "decoding a sum",
        (MEAN, DecodeDense(), APPLY),
        {"visibility": Visibility.SUM, "norm_bound": 1.0},
        IndividualUpdatesNeeded,
        "leave it to the devices",
    ),
    (
        "decompressing a sum",
        (MEAN, DecodeCompressed(CompressionSpec.parse("topk:0.5")), APPLY),
        {"visibility": Visibility.SUM, "norm_bound": 1.0},
        IndividualUpdatesNeeded,
        "leave it to the devices",
    ),
    ("layers that leave a gap", (MEAN, ClipLayers(1.0, ((0, 3),)), APPLY), {}, ConfigurationError, "do not cover"),
    (
        "an exact sum beyond three bins",
        (ExactMean(resolution=1e-30), APPLY),
        {"max_abs": 1e30},
        BudgetExceeded,
        "raise",
    ),
    ("fixed point beyond 60 bits", (ExactMean("fixed"), APPLY), {"max_abs": 1e18}, BudgetExceeded, "lower"),
    ("more dishonest ones than krum stands", (RobustRule("krum", 9), APPLY), {}, TooManyByzantine, "assume at most 8"),
    ("the same for a fixed count", (RobustRule("krum", 4), APPLY), {"count": 10}, TooManyByzantine, "assume at most 3"),
    (
        "krum on two, whose dishonest ones are to be estimated",
        (RobustRule("krum"), APPLY),
        {"count": 2},
        TooManyByzantine,
        "choose another rule",
    ),
    (
        "buckets too few for bulyan whoever is honest",
        (RobustRule("bulyan", options=RuleOptions(mixing="bucketing", bucket_size=3, seed=1)), APPLY),
        {"count": 6},
        TooManyByzantine,
        "enough for 3 buckets",
    ),
    ("SCAFFOLD on one vector", (MEAN, Scaffold(APPLY, 0.5)), {"size": 3}, ConfigurationError, "followed by"),
    ("SCAFFOLD on gradients", (MEAN, Scaffold(APPLY, 0.5)), {"kind": UpdateKind.GRADIENT}, ConfigurationError, "delta"),
    ("no room for an update", (MEAN, APPLY), {"capacity": 0}, ConfigurationError, "capacity from 1"),
    ("more updates than there is room for", (MEAN, APPLY), {"count": 21}, ConfigurationError, "up to the capacity"),
]


@pytest.mark.parametrize(
    ("stages", "changed", "error", "advice"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_a_combination_that_is_not_sound_is_refused_by_name(stages, changed, error, advice):
    changed = dict(changed)
    private = changed.pop("private", False)
    with pytest.raises(error, match=advice) as caught:
        build(*stages, facts=replace(FACTS, **changed), private=private)
    assert type(caught.value) is error


def test_every_refusal_has_a_case():
    def leaves(cls: type[PipelineError]) -> set[type[PipelineError]]:
        return {leaf for sub in cls.__subclasses__() for leaf in leaves(sub) or {sub}}

    # Refused by a configuration, before there are stages: their cases are among those of part 9.
    of_configurations = {DataDependentSupport, UnderstatedSensitivity}
    assert {case[3] for case in REFUSED} >= leaves(PipelineError) - of_configurations


SOUND: list[tuple[str, tuple, dict]] = [
    ("an exact mean", (MEAN, APPLY), {}),
    ("a bound by clipping alone", (MEAN, CLIP, APPLY), {"max_abs": None}),
    ("noise on a clipped mean", (MEAN, CLIP, NOISE, APPLY), {"private": True}),
    ("noise on layers", (MEAN, ClipLayers(1.0, ((0, 1), (1, 4))), NOISE, APPLY), {"private": True}),
    ("noise on a fixed denominator", (MEAN, CLIP, REPLACE_ONE, APPLY), {"private": True, "constant_denominator": 20}),
    (
        "noise on stale updates",
        (BufferedSchedule(StalenessPolicy(max_staleness=3), 5), MEAN, CLIP, NOISE, APPLY),
        {"private": True},
    ),
    ("noise on a proved rule", (RobustRule("trimmed-mean", 2), CLIP, REPLACE_ONE, APPLY), {"private": True}),
    (
        "noise on top-k that is clipped afterwards",
        (DecodeCompressed(CompressionSpec.parse("topk:0.5")), MEAN, CLIP, NOISE, APPLY),
        {"private": True},
    ),
    (
        "the aggregators' noise on a sum",
        (MEAN, ExternalNoise(), APPLY),
        {"private": True, "visibility": Visibility.SUM, "norm_bound": 1.0, "max_abs": None},
    ),
    ("a rule that needs no bound", (RobustRule("krum", 2), APPLY), {"max_abs": None, "max_weight": None}),
    ("a rule whose buffer is just large enough for nobody dishonest", (RobustRule("krum"), APPLY), {"count": 3}),
    (
        "a buffer that is too small for it, degraded",
        (RobustRule("krum", options=RuleOptions(degraded=True)), APPLY),
        {"count": 2},
    ),
    ("the largest clip norm", (MEAN, ClipGlobal(2.0**500), APPLY), {"max_abs": 1.0}),
    ("FedNova without noise", (ExactMean(renormalise=True), ValidateFacts(max_normaliser=50.0), CLIP, APPLY), {}),
    ("SCAFFOLD", (MEAN, CLIP, Scaffold(APPLY, 0.5)), {}),
]


@pytest.mark.parametrize(("stages", "changed"), [case[1:] for case in SOUND], ids=[case[0] for case in SOUND])
def test_a_sound_combination_is_built_whatever_the_order_of_its_stages(stages, changed):
    changed = dict(changed)
    private = changed.pop("private", False)
    facts = replace(FACTS, **changed)
    built = [build(*order, facts=facts, private=private) for order in itertools.permutations(stages)]
    assert all(pipeline == built[0] for pipeline in built)
    assert list(built[0].stages) == [slot for slot in Slot if slot in built[0].stages]


@pytest.mark.parametrize("case", [case for case in REFUSED if case[3] is not SlotFilledTwice], ids=lambda case: case[0])
def test_no_order_of_the_stages_talks_it_round(case):
    _, stages, changed, error, _ = case
    changed = dict(changed)
    private = changed.pop("private", False)
    for order in itertools.permutations(stages):
        with pytest.raises(error):
            build(*order, facts=replace(FACTS, **changed), private=private)


@pytest.mark.parametrize(
    "stage",
    [
        lambda: RobustRule("mean-ish"),
        lambda: RobustRule("median", num_byzantine=-1),
        lambda: RobustRule("median", num_byzantine=1, byzantine_fraction=0.1),
        lambda: RobustRule("median", byzantine_fraction=0.5),
        lambda: RobustRule("median", options=RuleOptions(m=3)),
        lambda: ClipGlobal(0.0),
        lambda: ClipGlobal(float("nan")),
        lambda: ClipLayers(float("inf"), ((0, 4),)),
        lambda: ClipGlobal(2.0**501),
        lambda: ClipGlobal(2.0**-501),
        lambda: ClipLayers(2.0**501, ((0, 4),)),
        lambda: ClipLayers(1.0, ((0, 2), (3, 4))),
        lambda: ClipLayers(1.0, ((0, 0), (0, 4))),
        lambda: Scaffold(APPLY, 0.0),
    ],
)
def test_a_stage_that_makes_no_sense_alone_is_refused_before_any_pipeline(stage: Callable[[], object]):
    with pytest.raises(ConfigurationError):
        stage()


def test_what_nothing_was_said_about_is_filled_with_the_plain_stage():
    stages = build(MEAN, APPLY).stages
    assert [type(stage).__name__ for stage in stages.values()] == [
        "SynchronousSchedule", "ValidateFacts", "DecodeDense", "NoClip", "ExactMean", "NoNoise", "Sgd",
    ]  # fmt: skip


def test_a_pipeline_of_sums_has_no_slot_for_single_updates():
    pipeline = build(MEAN, ExternalNoise(), APPLY, facts=SUM_ONLY, private=True)
    assert list(pipeline.stages) == [Slot.SCHEDULE, Slot.REDUCE, Slot.NOISE, Slot.APPLY]


def test_krum_s_sensitivity_does_not_shrink_with_the_number_of_updates():
    """C / n would be the mean's; Krum may jump from one update to another."""
    clip = ClipGlobal(3.0)
    for capacity in (20, 200, 2000):
        facts = replace(FACTS, capacity=capacity)
        known = build(RobustRule("krum", 2), clip, APPLY, facts=facts).released.sensitivity
        assert known == {Adjacency.REPLACE_ONE: 6.0}


@pytest.mark.parametrize(
    ("facts", "zero_out"),
    [
        (FACTS, 3.0 * 10 / 20),
        (replace(FACTS, count=5), 3.0 * 10 / 5),
        (replace(FACTS, constant_denominator=50), 3.0 * 10 / 50),
        (replace(FACTS, max_weight=1, count=8), 3.0 / 8),
    ],
)
def test_the_mean_s_sensitivity_is_the_textbook_s(facts: Facts, zero_out: float):
    known = build(MEAN, ClipGlobal(3.0), APPLY, facts=facts).released.sensitivity
    assert known == {Adjacency.ZERO_OUT: pytest.approx(zero_out), Adjacency.REPLACE_ONE: pytest.approx(2 * zero_out)}


def test_staleness_scales_cancel_out_of_the_sensitivity_because_they_only_shrink():
    schedule = BufferedSchedule(StalenessPolicy(max_staleness=3), 8)
    facts = replace(FACTS, max_weight=1)
    known = build(MEAN, schedule, ClipGlobal(3.0), APPLY, facts=facts).released
    assert known.max_scale == 256
    assert known.sensitivity[Adjacency.ZERO_OUT] == pytest.approx(3.0 / 8)


@pytest.mark.parametrize("clip", [ClipGlobal(3.0), ClipLayers(3.0, ((0, 1), (1, 4)))])
def test_clipping_twice_over_is_bounded_by_the_tighter_of_range_and_norm(clip):
    assert build(MEAN, clip, APPLY).released.max_abs == pytest.approx(3.0)
    assert build(MEAN, clip, APPLY, facts=replace(FACTS, max_abs=0.5)).released.max_abs == 0.5


def test_a_pipeline_is_a_value():
    assert build(MEAN, CLIP, APPLY) == build(APPLY, CLIP, MEAN)
    with pytest.raises(AttributeError):
        build(MEAN, APPLY).private = True
    with pytest.raises(TypeError):
        build(MEAN, APPLY).stages[Slot.CLIP] = NoClip()


# --- words -------------------------------------------------------------------------------------------------

START = "4 coordinates, visible: individual, "
WIDE = START + "|x| <= 100, weight <= 10"
TIGHT = START + "|x| <= 1, norm <= 1, weight <= 10"
PROVED = TIGHT + ", sensitivity 0.5 (zero-out), sensitivity 1 (replace-one)"
TABLE = [
    ["slot", "stage", "known afterwards"],
    ["schedule", "synchronous: updates of the current model only", WIDE],
    ["validate", "weight and local steps within their bounds", WIDE],
    ["decode", "float32, finite, within the declared range", WIDE],
    ["clip", "L2 norm of the whole update <= 1", TIGHT],
    ["reduce", "exact weighted mean (float64 bins)", PROVED],
    ["noise", "Gaussian noise, noise_multiplier 1 (zero-out adjacency)", PROVED + ", noised"],
    ["apply", "sgd on float64 weights, learning rate 1", PROVED + ", noised"],
]


def test_describe_prints_slots_stages_and_what_is_known():
    head, rule, *rows = build(MEAN, CLIP, NOISE, APPLY, private=True).describe().splitlines()
    assert [re.split("  +", line) for line in [head, *rows]] == TABLE
    assert set(rule) == {"-"}
    assert len(rule) == max(map(len, rows))
    assert {row.index("4 coordinates") for row in rows} == {head.index("known")}


def test_the_diagram_is_one_path_through_the_slots_in_order():
    lines = build(MEAN, CLIP, APPLY).diagram().splitlines()
    arrows = [line.split() for line in lines if "-->" in line]
    assert [(a, b) for a, _, b in arrows] == list(itertools.pairwise(["entry", *[str(slot) for slot in Slot], "model"]))
    assert lines[0] == "flowchart LR"
