"""Writes crkd_reference.npz: the authors' own network, losses and scores, on a small random problem.

Authors' code: https://github.com/kleinzcy/Cr-KD-NCD, commit 0f55beaba9528684ed3f93044dc82f678add3084, run with torch
2.14. Call with the folder that holds a checkout:

    python make_crkd_reference.py PATH_TO_CHECKOUT

Its imports of optimisers' schedules, logging, plotting and data sets are replaced by empty modules: nothing of them
takes part.
"""

import copy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import nn

for name, members in {
    "pl_bolts": {},
    "pl_bolts.optimizers": {},
    "pl_bolts.optimizers.lr_scheduler": {"LinearWarmupCosineAnnealingLR": None},
    "wandb": {},
    "seaborn": {},
    "tensorboard": {},
    "torch.utils.tensorboard": {"SummaryWriter": None},
    "model.get_model": {"get_backbone": None},
    "data": {},
    "data.augmentations": {"get_transform": None},
    "data.get_datasets": {"get_datasets": None, "get_class_splits": None},
    "utils.parse": {"get_args": None},
    "utils.dataset_info": {},
    "ipdb": {},
}.items():
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__dict__.update(members)
sys.path.insert(0, sys.argv[1])
from model.losses import KD, SinkhornKnopp
from rKD import Net, swapped_prediction
from utils.eval_utils import split_cluster_acc_v2, split_cluster_acc_v3

K, U, HEADS, BATCH, VIEWS, LARGE = 3, 4, 2, 24, 3, 2
args = SimpleNamespace(num_labeled_classes=K, temperature=0.1, num_large_crops=LARGE, num_crops=VIEWS)
torch.manual_seed(0)
sizes = {"feat_dim": 12, "hidden_dim": 16, "proj_dim": 5, "num_hidden_layers": 2}
net = Net(nn.Linear(6, 12), K, U, num_heads=HEADS, **sizes)
old = Net(copy.deepcopy(net.encoder), K, U, num_heads=None, feat_dim=12).eval()
with torch.no_grad():
    old.encoder.weight.add_(0.2 * torch.randn(12, 6))
net.normalize_prototypes()
old.normalize_prototypes()
weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
views = [torch.randn(BATCH, 6) for _ in range(VIEWS)]
labels = torch.arange(BATCH) % K
known = torch.arange(BATCH) % 5 < 2

outputs = net(views)
lab = outputs["logits_lab"].unsqueeze(1).expand(-1, HEADS, -1, -1)
logits = torch.cat([lab, outputs["logits_unlab"]], dim=-1)
with torch.no_grad():
    old_logits = old(views)["logits_lab"].unsqueeze(1).expand(-1, HEADS, -1, -1)
targets, sinkhorn = torch.zeros_like(logits), SinkhornKnopp()
for v in range(LARGE):
    for h in range(HEADS):
        targets[v, h, known, :K] = nn.functional.one_hot(labels[known], K).float()
        targets[v, h, ~known, K:] = sinkhorn(outputs["logits_unlab"][v, h, ~known])
swapped = swapped_prediction(args, logits, targets)
distilled = KD(args, old_logits[:LARGE], logits[:LARGE], known, T=4)
(swapped.mean() + 0.1 * distilled.mean()).backward()

rng = np.random.default_rng(0)
true, pred = rng.integers(0, K + U, (2, 200))
pred = np.where(rng.random(200) < 0.6, (true + 1) % (K + U), pred)
scores = {}
for name, function in (("all", split_cluster_acc_v2), ("novel", split_cluster_acc_v3)):
    found = function(true, pred, K)
    scores[f"accuracy:{name}"] = np.array([found["all"], found["seen"], found["novel"]])

np.savez_compressed(
    Path(__file__).with_name("crkd_reference.npz"),
    views=torch.stack(views).numpy(),
    target=torch.where(known, labels, -1).numpy(),
    logits=logits.detach().transpose(0, 1).numpy(),
    targets=targets[:LARGE].transpose(0, 1).numpy(),
    swapped=swapped.detach().numpy(),
    distilled=distilled.detach().numpy(),
    true=true,
    pred=pred,
    **scores,
    **{f"weight:{name}": tensor.numpy() for name, tensor in weights.items()},
    **{f"teacher:{name}": tensor.numpy() for name, tensor in old.state_dict().items()},
    **{f"grad:{name}": p.grad.numpy() for name, p in net.named_parameters()},
)
