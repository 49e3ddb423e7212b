"""An ordinary backward pass, split into shares: five aggregators add up what says nothing to any two of them.

python docs/examples/secret_shared_gradients.py
"""  # noqa: INP001 - a script, not a package

from __future__ import annotations

import torch
from torch import nn

from server_ref import SecureAggregator, WorkerGradient

WORKERS = 4

torch.manual_seed(0)
x = torch.randn(30 * WORKERS, 2)
y = (x[:, 0] * x[:, 1] > 0).long()
model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
secure = SecureAggregator(num_aggregators=5, threshold=3, clip_norm=1.0)


def gradient_of(worker: int) -> WorkerGradient:
    """What ``loss.backward()`` leaves in the parameters, for one worker's thirty examples."""
    rows = slice(30 * worker, 30 * worker + 30)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
    loss.backward()
    named = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return WorkerGradient(f"worker-{worker}", named, num_samples=30, timestamp=0.0)


# Each worker clips its gradient, rounds it to a grid, and splits it: one share for each aggregator.
gradients = [gradient_of(worker) for worker in range(WORKERS)]
split = [secure.worker_split_gradient(gradient) for gradient in gradients]
print("a gradient   ", gradients[0].gradients["2.bias"].tolist())  # noqa: T201
print("is shared as ", [share["2.bias"].dtype for share in split[0]][:1], "in", len(split[0]), "parts")  # noqa: T201

# Each aggregator adds up the shares that it received, and sees nothing but numbers without meaning.
sums = [secure.aggregator_sum_shares(received) for received in zip(*split, strict=True)]

# Any three of them open the sum.
opened = secure.aggregator_combine_shares([sums[0], sums[2], sums[4]], [1, 3, 5])
print("they open    ", opened["2.bias"].tolist())  # noqa: T201

# It is the sum of the gradients on the grid, to the bit, whoever opens it.
plain = [secure.encode(gradient) for gradient in gradients]
for three in ([1, 2, 3], [1, 3, 5], [2, 4, 5]):
    codes = secure.combine_codes([sums[i - 1] for i in three], three)
    for name in codes:
        assert torch.equal(codes[name], sum(each[name] for each in plain))  # noqa: S101
print("equal to the sum on the grid: yes")  # noqa: T201

# Rounding to the grid is the only error.
error = max(
    (opened[name] - sum(gradient.gradients[name].double() for gradient in gradients)).abs().max() for name in opened
)
assert error < 1e-6  # noqa: S101
print(f"largest error against the plain sum: below {1e-6:.0e}")  # noqa: T201
