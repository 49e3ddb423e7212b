"""A run shows itself: two live lines in a terminal, one line a round elsewhere."""

import io

from rich.console import Console

from simulator.monitor import Standing
from simulator.progress import LiveDisplay, PlainDisplay
from simulator.view import CommittedRound


def committed(**changes):
    values = {
        "round_id": 2, "model_version": 3, "model_sha256": "0" * 64, "reports": 20, "discarded": 0, "train_loss": 0.5,
        "opened_at_s": 1.0, "closed_at_s": 2.0, "validation_accuracy": 0.9137, "validation_loss": 0.3011,
    }  # fmt: skip
    return CommittedRound(**{**values, **changes})


def standing(**changes):
    values = {
        "rounds": 3, "of_rounds": 40, "reports": 7, "cohort": 20, "latest": None, "bytes_up": 1_234_567,
        "bytes_down": 9_876_543, "saved": None, "sessions": 67, "clients_per_s": 151.4, "eta_s": 95.0,
    }  # fmt: skip
    return Standing(**{**values, **changes})


def plain(*args):
    out = io.StringIO()
    PlainDisplay(out).round_done(*args)
    return out.getvalue()


def test_a_plain_line_says_everything_about_its_own_round():
    later = committed(round_id=3, validation_accuracy=0.99)
    line = plain(committed(), standing(latest=later))
    for word in ("round 3/40", "reports 20", "accuracy 0.914", "loss 0.301", "up 1.23 MB", "down 9.88 MB", "ETA 1:35"):
        assert word in line
    assert "151 clients/s" in line
    assert line.endswith("\n")
    assert line.count("\n") == 1


def test_reports_that_were_not_needed_are_told_apart():
    assert "reports 20 (+6 not needed)" in plain(committed(discarded=6), standing())


def test_what_became_of_the_reports_is_told_where_it_is_more_than_that_they_counted():
    measured = {"excluded": (3, 4), "clipped": 1, "staleness": {0: 18, 5: 2}, "unchanged": "TooManyByzantine"}
    line = plain(committed(discarded=1, measurements=measured), standing(saved=0.966))
    assert (
        "reports 20 (+1 not needed, 2 left out, 1 clipped, at most 5 versions old, model unchanged: TooManyByzantine)  "
    ) in line
    assert "up 1.23 MB (97 % saved)" in line


def test_a_terminal_sees_what_became_of_the_latest_rounds_reports():
    out = io.StringIO()
    with LiveDisplay(Console(file=out, force_terminal=True, width=120)) as live:
        live.show(standing(latest=committed(measurements={"excluded": (3, 4)})))
    assert "latest round: 2 left out" in out.getvalue()


def test_what_nobody_knows_yet_is_a_dash():
    line = plain(committed(validation_accuracy=None, validation_loss=None), standing(eta_s=None))
    assert "accuracy -  loss -" in line
    assert "ETA -" in line


def test_a_terminal_sees_the_open_round_and_the_latest_figures():
    out = io.StringIO()
    with LiveDisplay(Console(file=out, force_terminal=True, width=120)) as live:
        live.show(standing(latest=committed()))
    text = out.getvalue()
    for word in ("round 3/40", "reports 7/20", "ETA 1:35", "0.914", "151 clients/s"):
        assert word in text
