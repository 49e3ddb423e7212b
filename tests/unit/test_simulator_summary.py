"""The last words of a run: what came out, and what aggregation did, where it did something."""

from pathlib import Path

from simulator.config import SimulationConfig
from simulator.summary import summary_of
from tests.unit.test_simulator_report import results, round_result


def summary(rounds=(), **changes):
    facts = results(rounds=0).model_copy(update={"rounds": tuple(rounds) or (round_result(1),), **changes})
    return {line[:16].strip(): line[16:] for line in summary_of(facts, Path("runs/x"))[1:]}, facts


def test_a_plain_run_tells_nothing_but_what_came_out():
    lines, _ = summary()
    assert list(lines) == ["test accuracy", "model", "traffic", "throughput", "results", "report"]
    assert lines["report"] == "runs/x/report.html"


def test_what_was_in_use_has_a_line():
    rounds = [
        round_result(
            1, reports=4, excluded=(1, 2), attackers=1, excluded_attackers=1, clipped=3, staleness={0: 3, 4: 1},
            bytes_counted=120, bytes_dense=12_000,
        ),
        round_result(2, reports=4, staleness={0: 4}, bytes_counted=120, bytes_dense=12_000, unchanged="InvalidUpdate"),
    ]  # fmt: skip
    config = SimulationConfig.parse({"devices": 4, "rounds": 3, "cohort": 2, "overselect": 2.0})
    refusals = {"stale-report": 9, "update-out-of-range": 2}
    lines, _ = summary(rounds, refusals=refusals, config=config)
    assert lines["saved"] == "99.0 % (240 B instead of 24 kB)"
    assert lines["left out"] == (
        "2 of 8 reports; 1 were attackers' (precision 50.0 %), of all 1 of theirs (recall 100.0 %)"
    )
    assert lines["clipped"] == "3 of 8 reports"
    assert lines["staleness"] == "0.50 versions on average, at most 4"
    assert lines["fairness"] == "Jain's index 0.750; slow devices counted 0.00 times as often"
    assert lines["refused"] == "2 reports (update-out-of-range 2)", "a report that came too late is nobody's fault"
    assert lines["unchanged"] == "1 rounds left the model as it was (InvalidUpdate)"


def test_rounds_that_came_to_zero_are_told():
    lines, _ = summary([round_result(1, aggregate_norm=0.0), round_result(2)])
    assert lines["zero"] == "1 rounds: what became of their reports was 0 in every coordinate"


def test_a_rule_without_an_attack_has_no_precision():
    lines, _ = summary([round_result(1, excluded=(3,))])
    assert lines["left out"] == "1 of 2 reports"


def test_a_halted_run_says_so_first():
    _, facts = summary(halted="a loss of 8")
    first, second, *_ = summary_of(facts, Path("runs/x"))
    assert first.startswith("halted after 1 of 3 rounds")
    assert second == "why             a loss of 8"
