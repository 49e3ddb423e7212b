"""Peak memory of device processes, measured from outside, beside what the planner estimates.

A real server hands an exported model to ``pocketfed device``, whose task has the batch size and epochs that the planner
chooses for a phone of 512 MiB, 2 GiB or 8 GiB; the kernel's own account of the finished process (``ru_maxrss``) is what
counts. Bars: no process takes more than was estimated; no estimate is more than 1.6 times what was taken; the reference
CNN (28x28, batches of 64, with the adaptive plan) takes at most 120 MiB; and a device that has not opened a program yet
takes no more than the planner assumes for the process (``BASELINE_BYTES``).

    python tests/benchmarks/bench_memory.py [--models mlp cnn cnn-148]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("pocketfed"))
CLASSES, SAMPLES, REPORTS, EPOCHS = 10, 100, 2, 5
TIERS = (("low_end", 512), ("mid_range", 2048), ("high_end", 8192))
REFERENCE_MIB, FACTOR = 120, 1.6
# Exported, downloaded and trained as usual, but for the batch sizes.
SIZES = "8,32,64"


@dataclass(frozen=True)
class Model:
    """What to export."""

    name: str
    side: int


MODELS = {"mlp": Model("mlp", 28), "cnn": Model("cnn", 28), "cnn-148": Model("cnn", 148)}

# The planner's answer, in a process of its own: a child is charged with the memory that its parent had.
PLAN = """
import json, sys
from client_sdk.footprint import BASELINE_BYTES
from client_sdk.planner import plan_work
from client_sdk.protocol.profile import DeviceProfile
from client_sdk.protocol.training import TrainingPlan
from client_sdk.runtime import read_manifest
from pathlib import Path
manifest = read_manifest(Path(sys.argv[1]))
profile = DeviceProfile("phone", sys.argv[2], available_memory_mb=int(sys.argv[3]))
plan = TrainingPlan(local_epochs=int(sys.argv[4]), batch_size=64, learning_rate=0.01, adaptive=True)
samples, side = int(sys.argv[5]), int(sys.argv[6])
data = samples * (4 * side * side + 8)  # the device holds its examples in memory
baseline = BASELINE_BYTES["native"] + data
work = plan_work(manifest, profile, plan, num_samples=samples, baseline_bytes=baseline)
print(json.dumps({
    "batch_size": work.plan.batch_size, "local_epochs": work.plan.local_epochs, "parameters": manifest.num_parameters,
    "estimate": work.estimate.total_bytes, "items": {i.name: i.num_bytes for i in work.estimate.items},
    "budget": work.budget_bytes, "baseline": baseline, "data": data,
}))
"""

# A device until the moment before it opens a program: everything imported, enrolled, checked in, runtime loaded.
BASELINE = """
import sys
from pathlib import Path
from client_sdk import device
from client_sdk.client import MobileClient
from client_sdk.data import load_examples
from client_sdk.memory_budget import peak_resident_bytes
from client_sdk.native.adapter import load_shim
from client_sdk.programs import DownloadedPrograms
from client_sdk.protocol.profile import DeviceProfile
from client_sdk.store import FileDeviceStore
from client_sdk.transport import HttpTransport
import client_sdk.runtime
store = FileDeviceStore(Path(sys.argv[3]))
client = MobileClient(
    None, DeviceProfile("phone"), data=load_examples(Path(sys.argv[2])), store=store,
    transport=HttpTransport(sys.argv[1], store.identity),
    programs=DownloadedPrograms(store.folder / "programs", "native"),
)
client.check_in()
load_shim()
print(peak_resident_bytes())
"""


def main() -> int:
    """Run all; exit status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), help="which to run")
    args = parser.parse_args()
    missed = False
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models:
            folder = Path(scratch, name)
            folder.mkdir()
            missed |= _run_model(name, MODELS[name], folder)
    return int(missed)


def _run_model(name: str, model: Model, folder: Path) -> bool:
    """One model over all tiers; whether a bar was missed."""
    shape = f"{model.side}x{model.side}"
    _output(COMMAND, "export", model.name, "--feature-shape", shape, "--classes", str(CLASSES),
            "--batch-sizes", f"train={SIZES}", "evaluate=32", "--out", str(folder / "bundle"))  # fmt: skip
    _output(
        sys.executable, "-c",
        "import sys, numpy as np; rng = np.random.default_rng(0); side, n = int(sys.argv[2]), int(sys.argv[3]); "
        "np.savez(sys.argv[1], x=rng.random((n, side, side), np.float32), y=rng.integers(0, 10, n))",
        str(folder / "data.npz"), str(model.side), str(SAMPLES),
    )  # fmt: skip
    missed = False
    for tier, memory in TIERS:
        work = json.loads(
            _output(
                sys.executable,
                "-c",
                PLAN,
                str(folder / "bundle"),
                tier,
                str(memory),
                str(EPOCHS),
                str(SAMPLES),
                str(model.side),
            )
        )
        with _Server(folder, tier, work) as url:
            device = subprocess.Popen(
                [COMMAND, "device", "--server", url, "--data", str(folder / "data.npz"), "--state-dir",
                 str(folder / f"device-{tier}"), "--max-reports", str(REPORTS), "--runtime", "native"],
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            _, status, usage = os.wait4(device.pid, 0)
            baseline = int(
                _output(sys.executable, "-c", BASELINE, url, str(folder / "data.npz"), str(folder / f"base-{tier}"))
            )
        peak, estimate = usage.ru_maxrss * 1024, work["estimate"]
        ok = (
            status == 0
            and peak <= estimate <= FACTOR * peak
            and baseline <= work["baseline"]
            and (name != "cnn" or peak <= REFERENCE_MIB * 2**20)
        )
        missed |= not ok
        line = {
            "bench": "memory", "model": name, "parameters": work["parameters"], "tier": tier, "ram_mib": memory,
            "batch_size": work["batch_size"], "local_epochs": work["local_epochs"], "samples": SAMPLES,
            "exit_status": os.waitstatus_to_exitcode(status), "peak_rss_mib": _mib(peak),
            "estimate_mib": _mib(estimate), "estimate_per_peak": round(estimate / peak, 2),
            "budget_mib": _mib(work["budget"]), "before_program_mib": _mib(baseline - work["data"]),
            "process_mib": _mib(peak - (estimate - work["baseline"]) - work["data"]),
            "assumed_process_mib": _mib(work["baseline"] - work["data"]),
            "ok": ok,
            "items_mib": {item: _mib(size) for item, size in work["items"].items()},
        }  # fmt: skip
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
    return missed


class _Server:
    """``pocketfed serve`` with the work's plan, for as long as it is needed."""

    def __init__(self, folder: Path, tier: str, work: dict) -> None:
        config = folder / f"{tier}.toml"
        config.write_text(
            f'data_dir = "state-{tier}"\nport = 0\nexit_with_stdin = true\n'
            f'[task]\nbundle = "bundle"\nrounds = {REPORTS + 1}\nbuffer_size = 1\n'
            "retry_min_s = 0.0\nretry_max_s = 0.1\n"
            f"[task.plan]\nbatch_size = {work['batch_size']}\nlocal_epochs = {work['local_epochs']}\n"
            "learning_rate = 0.01\n"
        )
        self._command = [COMMAND, "serve", "--config", str(config)]

    def __enter__(self) -> str:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        return json.loads(self._process.stdout.readline())["url"]

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _mib(num_bytes: int) -> float:
    return round(num_bytes / 2**20, 1)


if __name__ == "__main__":
    sys.exit(main())
