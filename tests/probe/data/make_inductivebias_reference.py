"""Outputs of the authors' functions and of a peer on small inputs, for test_inductivebias.py.

Takes https://github.com/FieteLab/Exact-Inductive-Bias at commit 8afae31 (utils.py; rbf_kernel and loss_distribution of
kernel_inductive_bias.py, which does not run as published, given the exact solution of its linear systems) and
momentchi2 0.1.8 from PyPI; made with Python 3.11, numpy 2.4, scipy 1.17, torch 2.14.

    python make_inductivebias_reference.py path/to/Exact-Inductive-Bias
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from momentchi2 import lpb4
from scipy.linalg import sqrtm
from scipy.stats import ncx2

np.math = math  # momentchi2 is for older versions of numpy
folder = Path(sys.argv[1])
utils: dict = {}
exec((folder / "utils.py").read_text(), utils)
kernel: dict = {"torch": torch, "np": np, "sqrtm": sqrtm, "device": torch.device("cpu")}
text = (folder / "kernel_inductive_bias.py").read_text()
for block in ("\ndef " + part for part in text.split("\ndef ")[1:]):
    if block.startswith(("\ndef rbf_kernel", "\ndef loss_distribution")):
        exec(block, kernel)

# the tail: errors near to unit scale, where the authors' fit works
errors = ncx2.rvs(8, 3, scale=0.1, size=3000, random_state=0)
targets = np.array([0.1, 0.2, 0.4, 0.8, 1.2])
theta = np.array(ncx2.fit(errors, floc=0))
fitted = np.array([utils["compute_inductive_bias"](errors, eps) for eps in targets])
settings = np.array([
    (0.3, 10, 5, 0.1), (0.5, 10, 5, 0.1), (0.05, 50, 20, 0.01), (0.02, 200, 50, 0.004), (1e-4, 200, 50, 0.004),
    (1e-3, 500, 20, 0.004), (1e-6, 90, 3, 1.0),
])  # fmt: skip
value = np.array([utils["inductive_bias"](e, df, nc, 0, s) for e, df, nc, s in settings])
sankaran = np.array([utils["inductive_bias_alt"](e, df, nc, 0, s) for e, df, nc, s in settings])

# the kernel space
rng = torch.Generator().manual_seed(0)
x, x_test = torch.rand(15, 2, generator=rng).double() * 3, torch.rand(12, 2, generator=rng).double() * 3
y, y_test = (torch.stack([torch.sin(p[:, 0]), p[:, 1].cos()], 1) for p in (x, x_test))
K = kernel["rbf_kernel"](x, x) + 1e-6 * torch.eye(15).double()
alpha, a_x = torch.linalg.solve(K, y), torch.linalg.solve(K, kernel["rbf_kernel"](x, x_test))
torch.manual_seed(0)
drawn = kernel["loss_distribution"]([(x, None, torch.arange(15))], x_test, y_test, 2, alpha, a_x, 20_000, "")

# weighted sums of central chi-squares, by four moments
lam, at = np.array([0.5, 0.3, 0.2, 0.15, 0.1]), np.array([0.3, 0.6, 1.0, 2.0, 4.0])
central = np.asarray(lpb4(coeff=lam.tolist(), x=at.tolist()))
np.savez_compressed(
    Path(__file__).with_name("inductivebias_reference.npz"),
    errors=errors.astype(np.float32), targets=targets, fitted=fitted, theta=theta, settings=settings,
    value=value, sankaran=sankaran,
    x=x, y=y, x_test=x_test, y_test=y_test, drawn=np.sort(np.real(drawn))[::10].astype(np.float32),
    lam=lam, at=at, central=central,
)  # fmt: skip
