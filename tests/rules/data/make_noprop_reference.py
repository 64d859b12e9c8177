"""Makes noprop_reference.npz: points and velocities of torchcfm 1.0.7, and solutions of torchdiffeq 0.2.5.

Run by hand: ``pip install torchcfm==1.0.7 torchdiffeq==0.2.5``, then ``python make_noprop_reference.py``.
"""

from pathlib import Path

import numpy as np
import torch
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
from torchdiffeq import odeint

torch.manual_seed(0)
y = torch.tensor([0, 3, 1, 2, 2, 0])
x1 = torch.eye(4)[y]
x0, t = torch.randn_like(x1), torch.rand(6)
_, z, velocity = ConditionalFlowMatcher(sigma=0.0).sample_location_and_conditional_flow(x0, x1, t=t)

start = torch.randn(5, 3, dtype=torch.float64)
times = torch.tensor([0.0, 1.0], dtype=torch.float64)
solved = {
    ours: odeint(
        lambda t, z: torch.sin(3 * z) + t * z.flip(1) - t**2,
        start,
        times,
        method=theirs,
        options={"step_size": 1 / 20},
    )[-1]
    for ours, theirs in (("euler", "euler"), ("heun", "heun2"))
}
np.savez(
    Path(__file__).with_name("noprop_reference.npz"),
    **{name: part.numpy() for name, part in {"y": y, "z": z, "velocity": velocity, "start": start, **solved}.items()},
)
