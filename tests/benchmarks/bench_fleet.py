"""Clients a second through the whole stack: SDK, HTTP, durable server, exported program; beside a plain torch loop.

One client's work is that of the field's usual comparison: a 784-64-10 MLP (50,890 parameters), 20 examples, one step
of SGD. 1000 clients a round, all of them distinct devices that check in, download the model, train it with the real
exported program, and upload an update that the server makes durable before it acknowledges it.

The peer is the same arithmetic in eager PyTorch, one client after another in one process: no network, no server, no
durability, no isolation. Bar: >= 150 clients a second.

    python tests/benchmarks/bench_fleet.py [--clients 1000] [--rounds 3] [--workers 2]
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from simulator import Dataset, Fleet, Population, RunFolder, RunOptions, SimulationConfig, Split, run_simulation

SAMPLES = 20
FEATURES, HIDDEN, CLASSES = 784, 64, 10


def synthetic(clients: int) -> Dataset:
    """Random images; what they hold does not change the work."""
    rng = np.random.default_rng(0)

    def split(n: int) -> Split:
        return Split(rng.standard_normal((n, FEATURES), np.float32), rng.integers(0, CLASSES, n))

    return Dataset("synthetic", split(clients * SAMPLES), split(256), split(256), (FEATURES,), CLASSES, "0" * 64)


def stack(clients: int, rounds: int, workers: int) -> dict[str, object]:
    """The whole stack; the first round also enrols every device and gives it the program."""
    config = SimulationConfig(
        dataset="synthetic", devices=clients, rounds=rounds, model="mlp", partition="iid", cohort=clients, epochs=1,
        batch_size=SAMPLES, learning_rate=0.1,
    )  # fmt: skip
    data = synthetic(clients)
    parts = np.split(np.arange(clients * SAMPLES), clients)
    # Every device takes part in every round, so it comes back about when the next one opens; one that comes too early
    # costs a check-in that is answered "wait".
    population = Population(1, clients, check_in_spread=0.1)
    with tempfile.TemporaryDirectory() as scratch, RunFolder.begin(Path(scratch) / "run", config) as folder:
        results = run_simulation(folder, RunOptions(workers=workers, say=print), Fleet(population, data, parts))
    seconds = [r.seconds for r in results.rounds]
    later = seconds[1:] or seconds
    return {
        "clients_per_s": round(clients * len(later) / sum(later), 1),
        "clients_per_s_with_enrolment": round(clients * rounds / sum(seconds), 1),
        "round_s": [round(s, 2) for s in seconds],
        "runtime": results.runtime,
    }


def torch_loop(clients: int) -> float:
    """Clients a second of the plain loop, single-threaded, best of three."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(FEATURES, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, CLASSES))
    start = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.randn(clients, SAMPLES, FEATURES), torch.randint(0, CLASSES, (clients, SAMPLES))
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        total = {k: torch.zeros_like(v) for k, v in start.items()}
        for client in range(clients):
            model.load_state_dict(start)
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[client]), y[client]).backward()
            optimizer.step()
            for k, v in model.state_dict().items():
                total[k] += v
        best = min(best, time.perf_counter() - begun)
    return clients / best


def main() -> None:
    """Run both and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    peer = torch_loop(args.clients)
    ours = stack(args.clients, args.rounds, args.workers)
    print(  # noqa: T201 - what a benchmark is for
        json.dumps(
            {
                "bench": "fleet", "work": f"784-64-10 MLP, {SAMPLES} examples, 1 step", "clients": args.clients,
                **ours, "torch_loop_clients_per_s": round(peer, 1),
                "ratio_to_torch_loop": round(float(str(ours["clients_per_s"])) / peer, 3), "bar_clients_per_s": 150,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
