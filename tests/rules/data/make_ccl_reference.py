"""Makes ccl_reference.npz: losses, gradients and training steps of the authors' code.

https://github.com/IandRover/CCL-NeurIPS24 at commit 789a8e4, run with torch 2.14.1 on a CPU. Run by hand from a
checkout of it: ``python make_ccl_reference.py``. Weights are not stored: both sides fill them with the same sines.
"""

import math
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path.cwd()))
from models.layers import C2Conv, C2Linear, C2View
from models.models_cnn import C2ConvStride1, C2Pool
from models.models_cnn_ae_legacy import C2Conv as AEConv
from models.models_cnn_ae_legacy import C2ConvTrans, compute_SCL_loss_AE
from utils.loss import C2Loss_Classification, C2Loss_Classification_CNN_Test, gradient_centralization

FLAGS = {"act_F": "elu", "act_B": "elu", "fw_bn": 0, "bw_bn": 0, "bias_init": "zero", "bn_affine": 1, "method": "CCL"}
saved = {}


def sines(shape, phase):
    """The same numbers everywhere."""
    n = math.prod(shape)
    return (torch.sin(torch.arange(n, dtype=torch.float64) * 0.7 + phase) / math.sqrt(n / shape[0])).float().view(shape)


def fill(layers):
    for i, layer in enumerate(layers):
        layer.forward_layer.weight.data = sines(layer.forward_layer.weight.shape, i)
        layer.backward_layer.weight.data = sines(layer.backward_layer.weight.shape, i + 0.5)
        for part in (layer.forward_layer, layer.backward_layer):
            if part.bias is not None:
                part.bias.data.zero_()


def up(steps, x):
    states = [x]
    for i, step in enumerate(steps):
        a = states[-1]
        for layer in step:
            last = i == len(steps) - 1 and isinstance(layer, C2Linear | C2ConvTrans)
            a = layer(a, True, act=False) if last else layer(a, True)
        states.append(a)
    return states


def down(steps, target):
    states = [target]
    for i, step in reversed(list(enumerate(steps))):
        c = states[-1]
        for layer in reversed(step):
            first = i == 0 and hasattr(layer, "backward_layer")
            c = layer.reverse(c, True, act=False) if first else layer.reverse(c, True)
        states.append(c)
    return states[::-1]


def train(name, steps, x, target, loss, lr, momentum, decay, clip, centralise, n=3):
    layers = [layer for step in steps for layer in step if hasattr(layer, "backward_layer")]
    fill(layers)
    model = torch.nn.ModuleList(layers).train()
    groups = [[p for layer in layers for p in layer.get_parameters()[k]] for k in (0, 1)]
    optimizers = [torch.optim.SGD(group, lr=lr, momentum=momentum, weight_decay=decay) for group in groups]
    values = []
    for number in range(n):
        total = loss(up(steps, x), down(steps, target))
        for optimizer in optimizers:
            optimizer.zero_grad()
        total.backward()
        values.append(total.item())
        if number == 0:
            for k, group in enumerate(groups):
                for i, p in enumerate(group):
                    saved[f"{name}_grad_{k}_{i}"] = p.grad.numpy().copy()
        if centralise:
            gradient_centralization(model)
        for group, optimizer in zip(groups, optimizers, strict=True):
            if clip:
                torch.nn.utils.clip_grad_norm_(group, clip)
            optimizer.step()
    saved[f"{name}_losses"] = np.array(values)
    for k, group in enumerate(groups):
        for i, p in enumerate(group):
            saved[f"{name}_weight_{k}_{i}"] = p.detach().numpy().copy()


y = torch.tensor([0, 2, 1, 1, 3, 0, 2, 3])

args = Namespace(**FLAGS, filter_target=0, loss_scale_C=0.5, T10=torch.arange(4))
criterion = C2Loss_Classification(args)
mlp = [[C2Linear(args, 6, 5)], [C2Linear(args, 5, 5)], [C2Linear(args, 5, 4)]]
train("mlp", mlp, sines((8, 6), 9) * 2, torch.eye(4), lambda a, c: criterion(a, c, y, "local")[0], 1, 0, 0, 1, False)

args = Namespace(**FLAGS, filter_target=0.2, loss_scale_C=1, loss_scale_ssl=0.5, T10=torch.arange(4))
cosine = C2Loss_Classification_CNN_Test(args)
cnn = [[C2Conv(args, 2, 3, 3)], [C2Conv(args, 3, 4, 3), C2View((4, 2, 2), 16)], [C2Linear(args, 16, 4)]]
train("cnn", cnn, sines((8, 2, 8, 8), 9) * 9, torch.eye(4), lambda a, c: cosine(a, c, y, "local")[0], 1, 0, 0, 1, False)
pool = [
    [C2ConvStride1(args, 2, 3, 3), C2Pool(args, 2, 2, 0)],
    [C2ConvStride1(args, 3, 4, 3), C2Pool(args, 2, 2, 0), C2View((4, 2, 2), 16)],
    [C2Linear(args, 16, 4)],
]


def sure(a, c):
    """Larger logits, so that some rows are filtered."""
    return cosine([*a[:-1], 40 * a[-1]], c, y, "local")[0]


train("pool", pool, sines((8, 2, 8, 8), 9) * 9, torch.eye(4), sure, 1, 0.8, 1e-6, 0.3, True)

args = Namespace(**{**FLAGS, "act_F": "relu", "act_B": "relu"}, loss_scale_C=1, loss_scale_D=1)
autoencoder = [
    [AEConv(args, 2, 3, 3, 2, 1)],
    [AEConv(args, 3, 4, 3, 2, 1)],
    [C2ConvTrans(args, 4, 3, 3, 2, 1)],
    [C2ConvTrans(args, 3, 2, 3, 2, 1)],
]


def pairs(a, c):
    ends = [compute_SCL_loss_AE(args, a[i], c[i], layer="end") for i in (0, -1)]
    return sum([compute_SCL_loss_AE(args, one, other) for one, other in zip(a[1:-1], c[1:-1], strict=True)] + ends)


image = sines((8, 2, 8, 8), 9) * 9
train("ae", autoencoder, image, image, pairs, 0.01, 0.9, 1e-4, 0.2, True)

np.savez(Path(__file__).with_name("ccl_reference.npz"), **saved)
