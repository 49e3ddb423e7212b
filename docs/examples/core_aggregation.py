"""Federated averaging in a dozen lines: three workers, one exact mean, one step; PyTorch in, PyTorch out.

python docs/examples/core_aggregation.py
"""  # noqa: INP001 - a script, not a package

from __future__ import annotations

import torch
from torch import nn

from server_ref import GradientAggregator, WorkerGradient, apply_update

torch.manual_seed(0)
x = torch.randn(90, 2)
y = (x[:, 0] * x[:, 1] > 0).long()
model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
loss_of = nn.CrossEntropyLoss()


def compute_worker_gradient(data_shard: int) -> WorkerGradient:
    """What one worker sends: the gradient on its own thirty examples."""
    rows = slice(30 * data_shard, 30 * data_shard + 30)
    gradients = torch.autograd.grad(loss_of(model(x[rows]), y[rows]), list(model.parameters()))
    named = dict(zip(model.state_dict(), gradients, strict=True))
    return WorkerGradient(f"worker-{data_shard}", named, num_samples=30, timestamp=0.0)


aggregator = GradientAggregator(clip_norm=1.0)
before = loss_of(model(x), y).item()
for _ in range(40):
    workers = [compute_worker_gradient(shard) for shard in range(3)]
    aggregated = aggregator.aggregate(workers, model.state_dict())
    model.load_state_dict(apply_update(model.state_dict(), aggregated, learning_rate=2.0))
after = loss_of(model(x), y).item()
print(f"loss {before:.2f} -> {after:.2f}")  # noqa: T201
assert after < before / 2  # noqa: S101

# The same updates in any order give the same bits, and one that is broken is left out by name.
broken = WorkerGradient("broken", {name: t * float("nan") for name, t in model.state_dict().items()}, 30, 0.0)
again = aggregator.aggregate([broken, *reversed(workers)], model.state_dict())
assert all(torch.equal(again[name], aggregated[name]) for name in aggregated)  # noqa: S101
print([(refused.worker_id, refused.error.__name__) for refused in aggregator.rejections])  # noqa: T201
