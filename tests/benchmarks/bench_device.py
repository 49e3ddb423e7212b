"""Peak memory of one device process that trains the reference CNN, measured from outside.

A real server hands the exported 28x28 CNN to ``pocketfed device``, which trains on 300 images in batches of 32 and
reports; the kernel's own account of the finished process (``ru_maxrss``) is what counts. Bar: <= 120 MiB.

    python tests/benchmarks/bench_device.py [--reports 2] [--runtime native|pybindings]

The official bindings load torch into the process; the bar is for the native shim.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

COMMAND = str(Path(sys.executable).with_name("pocketfed"))
SHAPE, CLASSES, SAMPLES, BAR_MIB = (28, 28), 10, 300, 120


def main() -> int:
    """Run once; exit status 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reports", type=int, default=2, metavar="N", help="rounds the device takes part in")
    parser.add_argument("--runtime", choices=("native", "pybindings"), default="native", help="ExecuTorch adapter")
    args = parser.parse_args()
    reports, runtime = args.reports, args.runtime
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # In a process of its own: a child is charged with the memory its parent had when it started.
        subprocess.run(
            [COMMAND, "export", "cnn", "--feature-shape", ",".join(map(str, SHAPE)), "--classes", str(CLASSES),
             "--out", str(folder / "bundle")],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        rng = np.random.default_rng(0)
        np.savez(
            folder / "data.npz",
            x=rng.random((SAMPLES, *SHAPE), np.float32),
            y=rng.integers(0, CLASSES, SAMPLES),
        )
        config = folder / "server.toml"
        config.write_text(
            f'data_dir = "state"\nport = 0\nexit_with_stdin = true\n'
            f'[task]\nbundle = "bundle"\nrounds = {reports}\nbuffer_size = 1\nretry_min_s = 0.0\nretry_max_s = 0.1\n'
        )
        server = subprocess.Popen(
            [COMMAND, "serve", "--config", str(config)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            url = json.loads(server.stdout.readline())["url"]
            device = subprocess.Popen(
                [COMMAND, "device", "--server", url, "--data", str(folder / "data.npz"),
                 "--state-dir", str(folder / "device"), "--max-reports", str(reports), "--runtime", runtime],
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            _, status, usage = os.wait4(device.pid, 0)
        finally:
            server.kill()
            server.wait()
    peak = usage.ru_maxrss / 1024
    sys.stdout.write(
        json.dumps(
            {
                "bench": "device", "runtime": runtime, "model": "cnn 28x28", "samples": SAMPLES, "batch_size": 32,
                "reports": reports,
                "exit_status": os.waitstatus_to_exitcode(status), "peak_rss_mib": round(peak, 1),
                "cpu_s": round(usage.ru_utime + usage.ru_stime, 2), "bar_mib": BAR_MIB,
            }
        )
        + "\n"
    )  # fmt: skip
    return 0 if status == 0 and (peak <= BAR_MIB or runtime != "native") else 1


if __name__ == "__main__":
    sys.exit(main())
