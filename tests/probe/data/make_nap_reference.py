"""Write ``nap_reference.npz``: patterns by the authors' code, and verdicts of the paper's solver.

Usage: ``python make_nap_reference.py FOLDER``, where FOLDER is a checkout of
https://github.com/allengeng123/reliable-neural-specifications at commit 47c650bbe56dc18ad6123be734a3b2c37fa9a560
(``src/neural_specs/patterns.py``). The solver is maraboupy 2.0.0 from PyPI, asked through the backend ``"marabou"``.
Made with PyTorch 2.14.1.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from classact.probe.nap import NAP, preactivations
from classact.probe.nap_verify import verify_nap

spec = importlib.util.spec_from_file_location("patterns", Path(sys.argv[1]) / "src/neural_specs/patterns.py")
assert spec is not None
assert spec.loader is not None
theirs = importlib.util.module_from_spec(spec)
sys.modules["patterns"] = theirs
spec.loader.exec_module(theirs)

rng = np.random.default_rng(0)
z = rng.normal(rng.normal(size=23), 1.0, size=(400, 23)).astype(np.float32)
z[rng.random(z.shape) < 0.05] = 0
labels = rng.integers(0, 3, 400)
arrays = {"z": z, "labels": labels}
for delta in (0.55, 0.7, 0.9, 0.95, 1.0):
    states = np.zeros((3, 23), np.int8)
    for found in theirs.mine(z, labels, 3, delta):
        states[found.label, list(found.indices)] = np.where(found.states, 1, -1)
        arrays[f"follows.{delta}.{found.label}"] = found.matches(z)
    arrays[f"states.{delta}"] = states

weights, settings, verdicts = [], [], []
for seed in range(60):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    states = torch.zeros(11)
    on = preactivations(model, torch.rand(1, 3) * 2 - 1).z[0] > 0
    fixed = torch.rand(11) < 0.3
    states[fixed] = torch.where(on[fixed], 1.0, -1.0)
    target, radius = seed % 2, (0.2, 0.5, 1.0)[seed % 3]
    nap = NAP(states > 0, states < 0, (("1", 6), ("3", 5)))
    weights.append(nn.utils.parameters_to_vector(model.parameters()).detach().numpy())
    settings.append([*states.tolist(), target, radius])
    verdicts.append(verify_nap(model, nap, target, (-radius, radius), backend="marabou").status)
arrays |= {"weights": np.stack(weights), "settings": np.array(settings, np.float32), "verdicts": np.array(verdicts)}
np.savez_compressed(Path(__file__).with_name("nap_reference.npz"), **arrays)
