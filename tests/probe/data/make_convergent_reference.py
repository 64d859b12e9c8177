"""Outputs of the authors' functions on small inputs, for test_convergent.py.

Takes the folder ``experiments`` of https://github.com/YixuanLi/convergent_learning (estimate_mi.py at commit
8b86cb507158bb3fe09fce84d03f865a1c8933a5, match_unit.py at c3a1adb659ab174877d95f35a0eba95e10dd5682), which is for
Python 2 with names of pylab; made with Python 3.11, numpy 2, networkx 3.6 (whose matchings are sets of pairs).

    python make_convergent_reference.py path/to/experiments
"""

import sys
from pathlib import Path

import networkx as nx
import numpy as np

folder = Path(sys.argv[1])
names = {
    "log": np.log,
    "prod": np.prod,
    "linspace": np.linspace,
    "np": np,
    "array": np.array,
    "xrange": range,
    "nx": nx,
}


def functions(file, *wanted):
    """Run the definitions of a file alone, without its imports."""
    text = (folder / file).read_text()
    blocks = ("\ndef " + block for block in text.split("\ndef ")[1:])
    for block in blocks:
        if block[5:].split("(")[0] in wanted:
            exec(block.split("\n@")[0], names)


functions("estimate_mi.py", "estimate_mi", "percentile_bins")
functions("match_unit.py", "_max_match_order", "follow_loops")
matching = nx.max_weight_matching


def as_dict(graph, maxcardinality):
    found = matching(graph, maxcardinality=maxcardinality)
    return {**dict(found), **{j: i for i, j in found}}


nx.max_weight_matching = as_dict
rng = np.random.default_rng(0)
x = np.maximum(rng.normal(size=(2000, 5)), 0)
y = np.maximum(x @ rng.normal(size=(5, 5)) + rng.normal(size=(2000, 5)), 0)
plain, corrected = np.empty((5, 5)), np.empty((5, 5))
for i in range(5):
    for j in range(5):
        xy = np.stack([x[:, i], y[:, j]], 1)
        counts = np.histogram2d(*xy.T, bins=names["percentile_bins"](xy))[0]
        plain[i, j], corrected[i, j] = names["estimate_mi"](counts)
C = rng.uniform(-1, 1, size=(12, 12))
order = names["_max_match_order"](C)
loops, lengths = names["follow_loops"](order)
np.savez_compressed(
    Path(__file__).with_name("convergent_reference.npz"),
    x=x, y=y, information=plain, corrected=corrected, C=C, order=order, loops=loops, lengths=lengths,
)  # fmt: skip
