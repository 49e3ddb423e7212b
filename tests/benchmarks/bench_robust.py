"""Robust rules: speed against reading the data once and against plain numpy and torch, memory, selection error.

    .venv/bin/python tests/benchmarks/bench_robust.py               # one JSON line a case: time, ratios, memory
    .venv/bin/python tests/benchmarks/bench_robust.py --selection   # what the fast modes choose otherwise
    .venv/bin/python tests/benchmarks/bench_robust.py --estimate    # false alarms and misses of the estimate
    .venv/bin/python tests/benchmarks/bench_robust.py --check       # exit status 1 if an outcome is wrong

L is the time to read the same data once (an XOR over all of it, two threads). Every repeat times L, ours and the
baselines one after the other; the figures are medians of the repeats' ratios, which a busy machine disturbs least.
``cpu_s`` (all threads) disturbs it less still. Memory is the peak of the process above what it held before. Linear
algebra of numpy runs on one thread on both sides: more made it slower.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "2")
# Idle OpenMP threads spin by default, and would take the next candidate's cores.
os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numba
import numpy as np
import torch

from server_ref.aggregation import robust
from server_ref.aggregation.robust import RuleOptions, apply_rule
from server_ref.aggregation.robust.distances import squared_distances
from server_ref.aggregation.robust.rows import Rows

SHAPES = ((100, 1_000_000), (1000, 100_000))
SEED = 1
"""Of sketches and peers. A server draws it after the updates came in."""

Job = Callable[[], np.ndarray]


def say(**fields: object) -> None:
    print(json.dumps({"bench": "robust", **fields}), flush=True)  # noqa: T201 - a benchmark reports on stdout


# --- what everybody writes first --------------------------------------------------------------------------------


def numpy_krum_scores(rows: list[np.ndarray], f: int) -> np.ndarray:
    """All distances from one Gram matrix of the stacked float32 rows."""
    x = np.stack(rows)
    squares = np.einsum("ij,ij->i", x, x)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * (x @ x.T), 0)
    return np.sort(distances, axis=1)[:, 1 : len(rows) - f - 1].sum(axis=1)


def numpy_krum(rows: list[np.ndarray], f: int) -> np.ndarray:
    return rows[int(np.argmin(numpy_krum_scores(rows, f)))]


def numpy_multi_krum(rows: list[np.ndarray], f: int) -> np.ndarray:
    chosen = np.argsort(numpy_krum_scores(rows, f), kind="stable")[: len(rows) - f - 2]
    return np.mean([rows[i] for i in chosen], axis=0)


def numpy_median(rows: list[np.ndarray], _f: int) -> np.ndarray:
    return np.median(np.stack(rows), axis=0)


def numpy_trimmed_mean(rows: list[np.ndarray], f: int) -> np.ndarray:
    return np.sort(np.stack(rows), axis=0)[f : len(rows) - f].mean(axis=0)


def torch_krum(rows: list[np.ndarray], f: int) -> np.ndarray:
    distances = torch.cdist(*[torch.from_numpy(np.stack(rows))] * 2) ** 2
    scores = torch.sort(distances, dim=1).values[:, 1 : len(rows) - f - 1].sum(dim=1)
    return rows[int(torch.argmin(scores))]


def torch_median(rows: list[np.ndarray], _f: int) -> np.ndarray:
    return torch.from_numpy(np.stack(rows)).median(dim=0).values.numpy()


def torch_trimmed_mean(rows: list[np.ndarray], f: int) -> np.ndarray:
    return torch.from_numpy(np.stack(rows)).sort(dim=0).values[f : len(rows) - f].mean(dim=0).numpy()


Plain = Callable[[list[np.ndarray], int], np.ndarray]


@dataclass(frozen=True)
class Case:
    """A rule with its options, and who does the same job."""

    rule: str
    options: RuleOptions = field(default_factory=RuleOptions)
    baselines: tuple[Plain, ...] = ()

    @property
    def title(self) -> str:
        mode = "" if self.options.mode == "exact" else f", {self.options.mode.value}"
        mixing = "" if self.options.mixing == "none" else f"{self.options.mixing.value} + "
        return f"{mixing}{self.rule}{mode}"


CASES = (
    Case("krum", baselines=(numpy_krum, torch_krum)),
    Case("multi-krum", baselines=(numpy_multi_krum,)),
    Case("multi-krum", RuleOptions(mode="sketch", seed=SEED)),
    Case("multi-krum", RuleOptions(mode="sampled", peers=32, seed=SEED)),
    Case("median", baselines=(numpy_median, torch_median)),
    Case("trimmed-mean", baselines=(numpy_trimmed_mean, torch_trimmed_mean)),
    Case("geometric-median"),
    Case("centered-clipping"),
    Case("bulyan"),
    Case("median", RuleOptions(mixing="bucketing", bucket_size=2, seed=SEED)),
    Case("median", RuleOptions(mixing="nnm")),
)


# --- speed and memory -------------------------------------------------------------------------------------------


@numba.njit(parallel=True)
def read_once(words):
    parts = 64
    length = words.size // parts
    out = np.zeros(parts, np.int64)
    for part in numba.prange(parts):
        acc = np.int64(0)
        for word in words[part * length : (part + 1) * length]:
            acc ^= word
        out[part] = acc
    return out


def memory_kib(what: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(what))


def extra_mib(job: Job) -> float:
    """Peak of the resident memory above what it was before, the outcome included."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = memory_kib("VmRSS")
    job()
    return (memory_kib("VmHWM") - before) / 1024


def timed(job: Callable[[], object]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    job()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(case: Case, matrix: np.ndarray, f: int, repeats: int) -> None:
    rows = list(matrix)
    words = matrix.reshape(-1).view(np.int64)

    def ours() -> np.ndarray:
        return apply_rule(case.rule, rows, f, case.options).values

    ours()
    peak = extra_mib(ours)
    walls, cpus, reads = [], [], []
    others: dict[str, list[float]] = {plain.__name__: [] for plain in case.baselines}
    for repeat in range(repeats):
        reads.append(timed(lambda: read_once(words))[0])
        wall, cpu = timed(ours)
        walls.append(wall)
        cpus.append(cpu)
        if repeat < max(1, repeats // 3):
            for plain in case.baselines:
                others[plain.__name__].append(timed(lambda plain=plain: plain(rows, f))[0] / wall)
    say(
        case=case.title,
        n=matrix.shape[0],
        d=matrix.shape[1],
        f=f,
        seconds=round(statistics.median(walls), 4),
        least_s=round(min(walls), 4),
        cpu_s=round(statistics.median(cpus), 4),
        times_L=round(statistics.median(w / r for w, r in zip(walls, reads, strict=True)), 2),
        extra_mib=round(peak, 1),
        slower={name: round(statistics.median(ratios), 2) for name, ratios in others.items()},
    )


def attacked(n: int, d: int, f: int) -> np.ndarray:
    matrix = np.random.default_rng(0).standard_normal((n, d), dtype=np.float32) * np.float32(0.01)
    matrix[:f] *= 100
    return matrix


# --- selection error of the fast modes --------------------------------------------------------------------------


def honest_rows(n: int, d: int, rng: np.random.Generator, spread: float) -> np.ndarray:
    """A common direction, noise of the same size, and lengths that differ by factors (log-normal)."""
    direction = rng.standard_normal(d)
    rows = direction + rng.standard_normal((n, d))
    return rows * np.exp(spread * rng.standard_normal((n, 1)))


ATTACKS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "none": lambda honest, f: honest[:f],
    "sign flip": lambda honest, f: -honest[:f],
    "scaled x3": lambda honest, f: 3 * honest[:f],
    "ALIE z=1": lambda honest, f: np.tile(honest.mean(axis=0) - honest.std(axis=0), (f, 1)),
    "mimic": lambda honest, f: np.tile(honest[-1], (f, 1)),
}

MODES = {
    "sketch k=1024": {"mode": "sketch", "sketch_size": 1024},
    "sketch k=4096": {"mode": "sketch", "sketch_size": 4096},
    "sampled r=32": {"mode": "sampled", "peers": 32},
    "sampled r=64": {"mode": "sampled", "peers": 64},
    "sampled r=128": {"mode": "sampled", "peers": 128},
}


def report_selection(seeds: int, n: int, d: int) -> None:
    f = n // 5
    for spread in (0.0, 0.3):
        for attack, make in ATTACKS.items():
            figures: dict[str, list[tuple[float, float, int, int]]] = {mode: [] for mode in MODES}
            for seed in range(seeds):
                rng = np.random.default_rng([seed, n, d])
                rows = honest_rows(n, d, rng, spread)
                if attack != "none":
                    rows[:f] = make(rows[f:], f)
                rows = rows.astype(np.float32)
                exact = robust.multi_krum(rows, f)
                wanted = set(exact.selected)
                for mode, chosen in MODES.items():
                    options = RuleOptions(**chosen, seed=1000 + seed)
                    one = robust.krum(rows, f, options).selected[0]
                    found = set(robust.multi_krum(rows, f, options).selected)
                    bad = set(range(f)) if attack != "none" else set()
                    figures[mode].append(
                        (
                            float(exact.scores[one] / exact.scores.min() - 1),
                            len(found - wanted) / len(wanted),
                            len(found & bad),
                            len(wanted & bad),
                        )
                    )
            for mode, rows_of_figures in figures.items():
                excess, other, bad_here, bad_exact = map(list, zip(*rows_of_figures, strict=True))
                say(
                    table="selection",
                    n=n,
                    d=d,
                    f=f,
                    seeds=seeds,
                    lengths="alike" if spread == 0 else "log-normal 0.3",
                    attack=attack,
                    mode=mode,
                    krum_excess_mean=round(statistics.mean(excess), 5),
                    krum_excess_max=round(max(excess), 5),
                    other_rows=round(statistics.mean(other), 4),
                    dishonest_kept=round(statistics.mean(bad_here), 2),
                    dishonest_kept_exact=round(statistics.mean(bad_exact), 2),
                )


# --- the estimate -----------------------------------------------------------------------------------------------

HONEST: dict[str, Callable[[int, int, np.random.Generator], np.ndarray]] = {
    "alike": lambda n, d, rng: honest_rows(n, d, rng, 0.0),
    "log-normal 0.3": lambda n, d, rng: honest_rows(n, d, rng, 0.3),
    "log-normal 0.6": lambda n, d, rng: honest_rows(n, d, rng, 0.6),
    "two clusters": lambda n, d, rng: (
        rng.standard_normal((n, d)) + np.where(rng.random((n, 1)) < 0.3, 1.0, -1.0) * rng.standard_normal(d)
    ),
    "heavy tails (t, 3)": lambda n, d, rng: rng.standard_t(3, (n, d)),
}


def report_estimate(cohorts: int) -> None:
    for n in (10, 30, 100, 300):
        for d in (30, 3000):
            for kind, make in HONEST.items():
                rng = np.random.default_rng([n, d, len(kind)])
                found = [robust.estimate_num_byzantine(make(n, d, rng).astype(np.float32)) for _ in range(cohorts)]
                say(
                    table="estimate",
                    honest=kind,
                    n=n,
                    d=d,
                    cohorts=cohorts,
                    rows_flagged=round(sum(found) / (n * cohorts), 5),
                    cohorts_flagged=round(sum(x > 0 for x in found) / cohorts, 4),
                )
    attacks = {
        **{f"scaled x{k}": (lambda h, f, k=k: k * h[:f]) for k in (2, 3, 10, 100)},
        "sign flip": ATTACKS["sign flip"],
        "ALIE z=1": ATTACKS["ALIE z=1"],
        "mimic": ATTACKS["mimic"],
    }
    for spread in (0.0, 0.3):
        for attack, act in attacks.items():
            for fraction in (0.1, 0.3):
                n, d = 50, 3000
                f = round(n * fraction)
                rng = np.random.default_rng([n, f, len(attack)])
                found = []
                for _ in range(cohorts):
                    rows = honest_rows(n, d, rng, spread)
                    rows[:f] = act(rows[f:], f)
                    found.append(robust.estimate_num_byzantine(rows.astype(np.float32)))
                say(
                    table="estimate",
                    lengths="alike" if spread == 0 else "log-normal 0.3",
                    attack=attack,
                    n=n,
                    d=d,
                    f=f,
                    cohorts=cohorts,
                    estimate_mean=round(statistics.mean(found), 2),
                    estimate_least=min(found),
                    estimate_most=max(found),
                )


# --- outcomes ---------------------------------------------------------------------------------------------------


def wrong_outcomes(n: int, d: int) -> Iterator[str]:
    """What the timed code computes, against numpy in float64 written down once more."""
    f = n // 5
    matrix = attacked(n, d, f)
    matrix += np.float32(0.5)
    wide = matrix.astype(np.float64)
    distances = np.array([((wide - row) ** 2).sum(axis=1) for row in wide])
    found = squared_distances(Rows.of(matrix), RuleOptions())
    worst = float(np.max(np.abs(found - distances) / np.maximum(distances, 1e-300)))
    say(check="distances", n=n, d=d, worst_relative_error=worst)
    if worst > 2.0**-18:
        yield "distances"
    scores = np.sort(distances, axis=1)[:, 1 : n - f - 1].sum(axis=1)
    if robust.krum(matrix, f).selected != (int(np.argmin(scores)),):
        yield "krum"
    chosen = np.sort(np.argsort(scores, kind="stable")[: n - f - 2])
    several = robust.multi_krum(matrix, f)
    exact = np.array([math.fsum(column) for column in wide[chosen].T.tolist()]) / len(chosen)
    if several.selected != tuple(chosen.tolist()) or not np.array_equal(several.values, exact):
        yield "multi-krum"
    if not np.array_equal(robust.median(matrix, f).values, np.median(wide, axis=0)):
        yield "median"
    if not np.array_equal(robust.trimmed_mean(matrix, f).values, np.sort(wide, axis=0)[f : n - f].mean(axis=0)):
        yield "trimmed mean"
    for mode in ("sketch", "sampled"):
        if set(robust.multi_krum(matrix, f, RuleOptions(mode=mode, seed=SEED)).selected) & set(range(f)):
            yield f"multi-krum, {mode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare outcomes with numpy instead; status 1 if wrong")
    parser.add_argument("--selection", action="store_true", help="print the selection error of the fast modes instead")
    parser.add_argument("--estimate", action="store_true", help="print the error of the estimate instead")
    parser.add_argument("--repeats", type=int, default=7, help="repeats a figure is the median of (default: 7)")
    parser.add_argument("--seeds", type=int, default=20, help="cohorts of a line of a table (default: 20)")
    args = parser.parse_args()
    start = time.perf_counter()
    robust.warm_robust()
    say(
        kernels_s=round(time.perf_counter() - start, 2),
        cpus=os.cpu_count(),
        machine=platform.machine(),
        python=platform.python_version(),
        numpy=np.__version__,
        torch=torch.__version__,
    )
    if args.check:
        wrong = [what for n, d in ((100, 10_000), (150, 3001)) for what in wrong_outcomes(n, d)]
        say(check="outcomes", wrong=wrong)
        return 1 if wrong else 0
    if args.selection:
        report_selection(args.seeds, 300, 20_000)
        return 0
    if args.estimate:
        report_estimate(10 * args.seeds)
        return 0
    torch.set_num_threads(2)
    for n, d in SHAPES:
        matrix = attacked(n, d, n // 5)
        for case in CASES:
            measure(case, matrix, n // 5, args.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
