"""Write ``pbn_reference.npz``: outputs of the authors' functions, for fixed weights and inputs.

Usage: ``python make_pbn_reference.py FOLDER``, where FOLDER is a checkout of https://github.com/ColinTr/PracticalNCD at
commit 41e3bfd3582542d6a74553cbd795e30d4c1de72f. Made with PyTorch 2.14.1, SciPy 1.17.1 and scikit-learn 1.9.1; packages
for plots and logs are replaced by empty ones.
"""

import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch

for name in ("tqdm", "wandb", "plotly", "plotly.graph_objects", "plotly.express", "seaborn"):
    sys.modules[name] = MagicMock()
sys.path.insert(0, sys.argv[1])
from models.NCD_Kmeans import k_means_pp
from models.NCD_Spectral_Clustering import batch_outer_difference_normed, estimate_sigma, get_spectral_embedding
from models.PBN_model import PBNModel

torch.manual_seed(0)
rng = np.random.default_rng(0)
arrays = {}

model = PBNModel(
    {
        "input_size": 9,
        "hidden_layers_dims": [6, 4],
        "latent_dim": 3,
        "activation_fct": "relu",
        "use_batchnorm": True,
        "p_dropout": 0.25,
        "use_norm": "l2",
        "clustering_model": "kmeans",
        "n_classes": 3,
    }
)
for parameter in model.parameters():
    parameter.data.add_(0.2 * torch.randn_like(parameter))
x, y = torch.randn(12, 9), torch.tensor([0, 1, 2, 3] * 3)  # 3 is novel
model.train()
for layer in model.modules():
    if isinstance(layer, torch.nn.Dropout):
        layer.eval()
z = model.encoder_forward(x)
reconstruction, logits = model.decoder_forward(z), model.classifier_forward(z)
mse = torch.nn.MSELoss(reduction="sum")(reconstruction, x) / len(x)
loss = 0.3 * torch.nn.CrossEntropyLoss()(logits[y != 3], y[y != 3]) + 0.7 * mse
arrays |= {"pbn.x": x, "pbn.y": y, "pbn.z": z, "pbn.reconstruction": reconstruction, "pbn.logits": logits}
arrays |= {"pbn.loss": loss, **{f"pbn.weights.{key}": value for key, value in model.state_dict().items()}}

points = torch.from_numpy(rng.normal(size=(40, 4)) + 2 * np.eye(4)[np.arange(40) % 4])
arrays["points"] = points
arrays["embedding"] = get_spectral_embedding(points, 5, 0.4)
for min_dist in (0.1, 0.5, 0.9):
    arrays[f"sigma.{min_dist}"] = torch.tensor(estimate_sigma(batch_outer_difference_normed(points), min_dist))

blobs = torch.from_numpy(rng.normal(size=(90, 3)) + 12 * rng.normal(size=(6, 3))[np.arange(90) % 6])
labels = np.arange(90) % 6  # 0, 1 and 2 are known
known = torch.stack([blobs[labels == c].mean(0) for c in range(3)])
arrays |= {"blobs": blobs, "labels": torch.from_numpy(labels)}
for update in ("unlab_only", "unlab_and_lab"):
    np.random.seed(0)
    kmeans = k_means_pp(known.clone(), 3)
    kmeans.fit(blobs[labels >= 3], update_centroids=update)
    arrays |= {f"{update}.novel": kmeans.new_centroids, f"{update}.known": kmeans.pre_centroids}
    arrays[f"{update}.inertia"] = torch.as_tensor(kmeans.inertia)
np.savez_compressed(
    Path(__file__).with_name("pbn_reference.npz"), **{key: value.detach().numpy() for key, value in arrays.items()}
)
