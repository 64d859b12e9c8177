"""Outputs of the authors' code, for tests/explain/test_mds.py.

Repository https://github.com/ecker-lab/most-discriminative-stimuli, commit f7cc392, torch 2.14.1, numpy 2.4.6. Call:
``python make_mds_reference.py <checkout>``. Its imports of a database, of a model zoo and of plotting are replaced by
empty modules: nothing of them takes part.
"""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

for name, members in {
    "datajoint": {},
    "IPython": {"get_ipython": None},
    "mei": {},
    "mei.legacy": {},
    "mei.legacy.utils": {"varargin": lambda function: function},
    "nnfabrik": {},
    "nnfabrik.utility": {},
    "nnfabrik.utility.nn_helpers": {"set_random_seed": torch.manual_seed},
    "controversialstimuli.utility.model_utils": {"translate_model": None},
}.items():
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__dict__.update(members)
sys.path.insert(0, sys.argv[1])

from controversialstimuli.optimization.controversial_objectives import ContrastiveNeuronUnif
from controversialstimuli.optimization.pre_and_post_processing_ops import ChangeNormAndClip
from controversialstimuli.optimization.stoppers import EMALossStopper, ImgPxIntensityChangeStopper
from controversialstimuli.optimization.torch_transform_image import ActMaxTorchTransfBaseUni
from controversialstimuli.regularizers import LaplaceLoss

N, K, SIDE, STEPS = 12, 4, 8, 20
SETTINGS = {"temperature": 1.6, "lr": 2.0, "norm": 3.0, "low": -0.8, "high": 0.7, "smoothness": 0.05}

rng = np.random.default_rng(0)
weights = rng.normal(size=(N, SIDE * SIDE)).astype(np.float32)
assignment = rng.permutation(np.arange(N) % K)
responses = rng.normal(size=(K, N)).astype(np.float32)
mean, std = rng.normal(size=N).astype(np.float32), rng.uniform(0.01, 2, N).astype(np.float32)
start = rng.normal(size=(K, 1, SIDE, SIDE)).astype(np.float32)


class Model(nn.Module):
    def forward(self, x):
        return nn.functional.softplus(x.flatten(1) @ torch.from_numpy(weights).T)


def objective(c, off=None, **normalization):
    off = [k for k in range(K) if k != c] if off is None else off
    return ContrastiveNeuronUnif(c, off, assignment, SETTINGS["temperature"], device="cpu", **normalization)


def values(make):
    return np.array([float(make(c)(torch.from_numpy(responses[c : c + 1]))) for c in range(K)])


postprocessing = ChangeNormAndClip(SETTINGS["norm"], SETTINGS["low"], SETTINGS["high"])
stimuli, losses = [], []
for c in range(K):
    optimizer = ActMaxTorchTransfBaseUni(
        Model(),
        (SIDE, SIDE),
        lambda parameters: torch.optim.SGD(parameters, lr=SETTINGS["lr"]),
        stopper=None,
        objective_fct=objective(c),
        smoothness=SETTINGS["smoothness"],
        max_iter=STEPS,
        device="cpu",
        postprocessing=postprocessing,
    )
    optimizer.reset(postprocessing(torch.from_numpy(start[c : c + 1])))
    optimizer.maximize()
    stimuli.append(optimizer.img.detach().numpy()[0])
    losses.append(optimizer.get_loss().item())

curve = np.concatenate([np.linspace(0, 1, 30), np.linspace(1, 0, 30)]).astype(np.float32)
plateau, still = EMALossStopper(patience=10, ema_weight=0.9), ImgPxIntensityChangeStopper(0.0, 1.0, patience=10)
stops = []
for stopper, inputs in ((plateau, -curve), (still, torch.from_numpy(curve).square().view(-1, 1, 1, 1, 1) / 20)):
    for step, value in enumerate(inputs):
        stopper.update(value)
        if stopper.criterion_hit:
            stops.append(step)
            break

np.savez_compressed(
    Path(__file__).with_name("mds_reference.npz"),
    weights=weights,
    assignment=assignment,
    responses=responses,
    mean=mean,
    std=std,
    start=start,
    objective=values(objective),
    objective_normalized=values(lambda c: objective(c, subt_pred=mean, div_pred=std)),
    objective_among=values(lambda c: objective(c, off=[k for k in (1, 3) if k != c])),
    laplacian=np.array([LaplaceLoss()(torch.from_numpy(start[c : c + 1])).item() for c in range(K)]),
    clipped=postprocessing(torch.from_numpy(start)).numpy(),
    stimuli=np.stack(stimuli),
    losses=np.array(losses),
    curve=curve,
    stops=np.array(stops),
    **{name: np.array(value) for name, value in SETTINGS.items()},
)
