"""The command that a report prints repeats its run: whatever flags can say, parsing it gives the same configuration."""

from __future__ import annotations

import argparse
import shlex

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server_ref.flags import OPTIMIZERS, RULES
from simulator.cli import given_settings, simulate_command
from simulator.command import command_of
from simulator.config import SimulationConfig

# What decides how a run is carried out, and no bit of its outcome.
HOW = {"--help", "--out", "--workers", "--runtime", "--resume", "--overwrite", "--no-progress"}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    simulate_command(made)
    return made


def parse(words: list[str]) -> SimulationConfig:
    return SimulationConfig.parse(given_settings(parser().parse_args(words)))


def floats(low, high, **more):
    return st.floats(low, high, allow_nan=False, allow_infinity=False, **more).map(str)


def ints(low, high):
    return st.integers(low, high).map(str)


def one_of(*texts):
    return st.sampled_from(texts)


@st.composite
def weights(draw):
    first, last = sorted(draw(st.tuples(st.floats(0, 16), st.floats(0, 16))))
    return draw(one_of("constant", "polynomial", f"polynomial:{first}", "adaptive", f"adaptive:{first}..{last}"))


PARTITIONS = st.one_of(
    st.just("iid"), floats(1e-3, 1e3).map("dirichlet:{}".format), st.integers(1, 9).map("shards:{}".format)
)
SPECS = st.one_of(
    st.just("none"),
    floats(1e-4, 1.0).map("topk:{},bits=8".format),
    floats(1e-4, 1.0).map("randomk:{},rotate".format),
    st.just("threshold:1e-3"),
    st.just("quantize:4,rotate"),
)
ATTACKS = one_of("sign-flip", "scaling:1000", "alie", "alie:1.5", "backdoor:target=7,scale=5", "min-max:sign")
ALGORITHMS = one_of("fedavg", "scaffold", "fednova")
META = {
    "--inner-steps": ints(1, 100),
    "--query-fraction": floats(0, 1, exclude_min=True, exclude_max=True),
    "--meta-lr": floats(1e-9, 1e3),
    "--adapt-steps": ints(0, 100),
}
# Every flag that decides something, with values that do not contradict one another (the others: ``CHOICES``).
FREE = {
    "--dataset": one_of("digits", "fashion-mnist"),
    "--model": one_of("softmax", "mlp", "cnn"),
    "--devices": ints(500, 2000),
    "--partition": PARTITIONS,
    "--seed": ints(0, 2**31 - 1),
    "--rounds": ints(1, 1000),
    "--cohort": ints(10, 50),
    "--overselect": floats(1, 5),
    "--refill-at": ints(1, 10),
    "--dropout": floats(0, 1, exclude_max=True),
    "--skew": one_of("rotation:30", "slant:12.5,blur:0.5", "brightness:0.1,contrast:1,noise:0.05", "writers"),
    "--lease": floats(1e-3, 7 * 86400),
    "--work-scale": floats(1e-9, 1e9),
    "--stragglers": floats(0, 1, exclude_max=True),
    "--slowdown": floats(1, 1000),
    "--epochs": ints(1, 1000),
    "--batch-size": st.one_of(ints(1, 4096), st.sampled_from(["8", "16"])),
    "--lr": st.one_of(floats(1e-9, 1e3), st.sampled_from(["0.1", "0.5"])),
    "--byzantine": floats(0.01, 0.9),
    "--rule": one_of(*RULES),
    "--num-byzantine": ints(0, 50),
    "--degraded": None,
    "--mixing": one_of("none", "bucketing", "nnm"),
    "--distances": one_of("exact", "sketch", "sampled"),
    "--clip-norm": floats(1e-9, 1e9),
    "--clip-scope": one_of("global", "layer"),
    "--weighting": one_of("samples", "uniform"),
    "--server-lr": floats(1e-9, 1e3),
    "--max-steps": ints(1, 1000),
    "--compression": SPECS,
    "--async": None,
    "--delay-damping": floats(1e-9, 1),
    "--selection": one_of("any", "fair", "fast", "diverse"),
    "--selection-floor": floats(1e-9, 1),
}
STALE = {"--max-staleness": ints(0, 100), "--staleness": weights(), "--tighten": ints(1, 100), "--stale-lr": None}
LINKED = {
    *("--prox-mu", "--algorithm", "--optimizer", "--server-momentum", "--attack", "--engine", "--server"),
    *("--profiles", "--local-work"),
    *("--personalize", "--personal-layers", "--adapt-lr"),
    *META,
}
# Of privacy and secrecy; each needs a clip norm beside it.
NOISE = {
    "--delta": floats(1e-12, 1e-3),
    "--adjacency": one_of("zero-out", "replace-one"),
    "--max-participations": ints(100_000, 10**6),
}
SHARES = {
    "--field": one_of("m61", "m127"),
    "--checks": one_of("trust-devices", "projections"),
    "--minimum-cohort": ints(2, 10),
    "--aggregators": one_of("embedded", "processes"),
}
PROTECTION = {
    *("--epsilon", "--noise-multiplier", "--noise", "--honest-devices", "--noise-schedule", "--final-noise"),
    *("--adaptive-clipping", "--target-quantile", "--buckets", "--secure", "--packing"),
    *NOISE,
    *SHARES,
}


def word(flag, values):
    """A flag with a value, or alone where it takes none."""
    return st.just(flag) if values is None else values.map(f"{flag}={{}}".format)


@st.composite
def protected(draw):
    """Noise, shares or both, with a clip norm."""

    def some(of):
        return [draw(word(flag, of[flag])) for flag in draw(st.lists(st.sampled_from(sorted(of)), unique=True))]

    words = ["--clip-norm=1", "--clip-scope=global"]
    shared, noised = draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    if shared:
        words += [
            draw(one_of("--secure=3of5", "--secure=2of7")),
            *some(SHARES),
            *draw(st.sampled_from([[], ["--packing=2"]])),
        ]
    if noised:
        schedule = st.tuples(
            word("--noise-schedule", one_of("constant", "linear", "step")), word("--final-noise", floats(0.1, 2))
        )
        adaptive = st.tuples(st.just("--adaptive-clipping"), word("--target-quantile", floats(0.1, 0.9)))
        spent = st.tuples(word("--epsilon", floats(0.1, 10)))
        words += draw(st.one_of(spent, st.tuples(word("--noise-multiplier", floats(0.1, 100)))))
        if words[-1].startswith("--epsilon"):
            words += draw(st.one_of(st.just(()), schedule, adaptive, st.tuples(word("--buckets", ints(2, 50)))))
        words += some(NOISE)
        if not shared:
            words += draw(st.sampled_from([[], ["--noise=server"]]))
        else:
            words += draw(st.sampled_from([[], ["--noise=aggregators"]]))
    return words


LAYERS = word("--personal-layers", one_of("output", "fc1.bias,output"))
RATE = st.one_of(st.just([]), st.tuples(word("--adapt-lr", floats(1e-9, 1e3))))


@st.composite
def personal(draw):
    """Meta-learning, layers that stay, or an evaluation alone."""
    words = draw(st.one_of(st.just([]), st.tuples(LAYERS), st.tuples(word("--adapt-steps", ints(1, 100)))))
    if not words or draw(st.booleans()):
        layered = any(w.startswith("--personal") for w in words)
        algorithms = ("reptile",) if layered else ("maml", "fomaml", "reptile", "per-fedavg")
        some = draw(st.lists(st.sampled_from(sorted(META)), unique=True))
        said = [draw(word(flag, META[flag])) for flag in some if not any(w.startswith(flag) for w in words)]
        return [draw(word("--personalize", one_of(*algorithms))), *words, *said]
    return [*words, *draw(RATE)]


# Flags that do not go with each other: one choice of each row.
CHOICES = [
    [st.just([]), st.tuples(word("--prox-mu", floats(0, 1e6))), st.tuples(word("--algorithm", ALGORITHMS))],
    [
        st.just([]),
        st.tuples(word("--server-momentum", floats(0, 1, exclude_max=True))),
        st.tuples(word("--optimizer", one_of(*OPTIMIZERS))),
    ],
    [
        st.just([]),
        st.tuples(st.just("--byzantine=0.2"), word("--attack", ATTACKS)),
        st.just(["--engine=cohort"]),
        st.just(["--server=http://127.0.0.1:8470"]),
        st.tuples(word("--profiles", one_of("steady", "phones"))),
        st.tuples(word("--profiles", one_of("steady", "phones")), word("--local-work", one_of("planned", "adaptive"))),
        protected(),
        st.just(["--secure=3of5", "--epsilon=1", "--clip-norm=1", "--noise=devices", "--honest-devices=2"]),
    ],
]


@st.composite
def flags(draw):
    # Always a fleet that is large enough for what the others ask of it.
    said = {"--devices": None, **draw(st.dictionaries(st.sampled_from(sorted(FREE)), st.none()))}
    if draw(st.booleans()):
        # What staleness costs is refused where none is accepted.
        said |= {"--max-staleness": None, **draw(st.dictionaries(st.sampled_from(sorted(STALE)), st.none()))}
    if draw(st.booleans()):
        # Devices that adapt train by the plan, here, and by nothing else.
        adapting, others = draw(personal()), CHOICES[1:-1]
        said = {flag: None for flag in said if flag not in {"--epochs", "--max-steps"}}
    else:
        adapting, others = [], CHOICES
    words = [*adapting, *(draw(word(flag, {**FREE, **STALE}[flag])) for flag in sorted(said))]
    for row in others:
        words += draw(st.one_of(row))
    return ["--out=DIR", *words]


@given(flags())
@example(["--out=DIR", "--dataset=fashion-mnist", "--lr=0.5"])
def test_the_words_of_the_command_give_the_same_configuration(words):
    config = parse(words)
    command = shlex.split(command_of(config))
    assert command[:2] == ["pocketfed", "simulate"]
    assert parse(command[2:]) == config


def test_every_flag_that_decides_something_is_tried():
    known = {action.option_strings[0 if len(action.option_strings[0]) > 2 else -1] for action in parser()._actions}
    assert known - HOW == {*FREE, *STALE, *LINKED, *PROTECTION}


def test_nothing_but_what_the_run_is_about_is_said_of_a_run_of_defaults():
    assert command_of(SimulationConfig()) == (
        "pocketfed simulate --dataset digits --devices 100 --rounds 60 --model mlp --partition dirichlet:0.5 --seed 1 "
        "--out DIR"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"aggregation": {"rule": "multi-krum", "selected": 3, "bucket_size": 4, "arithmetic": "fixed"}},
        {"optimizer": {"name": "adam", "beta2": 0.9}},
        {"divergence": {"enabled": False}},
        {"staleness": {"max_staleness": 3, "min_staleness": 1, "step_times_curvature": 0.1}},
    ],
)
def test_what_no_flag_can_say_is_left_out(settings):
    words = shlex.split(command_of(SimulationConfig.parse(settings)))[2:]
    parse(words)
