"""Selections and loci of the authors' code on random trees, for ``test_loki.py``.

Needs a checkout of https://github.com/SprocketLab/loki (commit 7b010d8e91061a9b6f0febc785b515487387bcaa) as its only
argument, and networkx 3.6.1, numpy 2.4.6, torch 2.14.1. Their tree is not drawn but set, since `networkx.random_tree`
is gone; ``.cuda()`` is taken out of their prediction, which is otherwise run as it is.
"""

import re
import sys
import types
from pathlib import Path

import networkx as nx
import numpy as np
import torch

CHECKOUT = Path(sys.argv[1])
sys.path.insert(0, str(CHECKOUT / "active_learning"))
from libs.ActiveSelection import ActiveSelection
from libs.TreeWithLocus import TreeWithLocus

found = {}
for seed, n in enumerate((8, 15, 30, 50)):
    graph = nx.random_labeled_tree(n, seed=seed)
    start = sorted(np.random.default_rng(seed).choice(n, 3, replace=False).tolist())
    tree = TreeWithLocus.__new__(TreeWithLocus)
    tree.tree = graph
    tree.set_lambda(list(start))
    loci, picks = [sorted(tree.update_locus().nodes)], []
    while len(loci[-1]) < n and len(picks) < 8:
        picks.append(int(ActiveSelection().select(tree)))
        tree.add_node_to_lambda(picks[-1])
        loci.append(sorted(tree.update_locus().nodes))
    found[f"edges{seed}"] = np.array(graph.edges)
    found[f"start{seed}"] = np.array(start)
    found[f"picks{seed}"] = np.array(picks)
    found[f"loci{seed}"] = np.array([np.isin(np.arange(n), locus) for locus in loci])

code = (CHECKOUT / "simclr_exps" / "loki.py").read_text()
module = types.ModuleType("loki")
exec(re.sub(r"\.cuda\(\)", "", code), module.__dict__)
generator = torch.Generator().manual_seed(0)
probs = torch.rand(40, 12, generator=generator).softmax(1) ** 3
probs = probs / probs.sum(1, keepdim=True)
points = torch.rand(12, 3, generator=generator)
dists = torch.cdist(points, points)
found |= {"probs": probs.numpy(), "dists": dists.numpy()}
found["one_hot"] = module.loki_ste_predict(probs, dists).detach().numpy()
np.savez_compressed(Path(__file__).with_name("loki_reference.npz"), **found)
