"""Write ``afkan_reference.npz``: outputs of the authors' layer, for fixed weights and inputs.

Usage: ``python make_afkan_reference.py FOLDER``, where FOLDER is a checkout of https://github.com/hoangthangta/All-KAN
at commit 825c8fb0c0713e228dbb1e88eb0c53d72dab01d5 (``models/af_kan.py`` and ``models/relu_kan.py``). Made with
PyTorch 2.14.1. Self-attention is missing, because it fails there; in ``relu_kan.py`` the undefined name ``gs`` is read
as ``g``.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

models = Path(sys.argv[1]) / "models"
sys.path.insert(0, str(models))
from af_kan import AF_KANLayer

repaired: dict[str, Any] = {}
exec((models / "relu_kan.py").read_text().replace("/ gs", "/ g"), repaired)
ReLUKANLayer = repaired["ReLUKANLayer"]

INPUTS, OUTPUTS, G, K = 5, 3, 3, 3
torch.manual_seed(0)
x = torch.randn(4, INPUTS)
layer = AF_KANLayer(INPUTS, G, K, OUTPUTS)
with torch.no_grad():
    for parameter in layer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
arrays = {"x": x} | {f"af.{name}": value for name, value in layer.state_dict().items()}


def output(**settings: object) -> torch.Tensor:
    for name, value in {"base_activation": "silu", "func": "quad1", "func_norm": True, **settings}.items():
        setattr(layer, name, value)
    with torch.no_grad():
        return layer(x.unsqueeze(0))[0]


with torch.no_grad():
    for func in ("quad1", "quad2", "sum", "prod", "sum_prod", "cubic1", "cubic2"):
        for activation in ("silu", "relu", "leaky_relu", "elu", "gelu", "selu", "softplus", "sigmoid", "tanh"):
            layer.func, layer.base_activation, layer.func_norm = func, activation, False
            arrays[f"basis.{func}.{activation}"] = layer.extract_features(x)
for method in ("global_attn", "spatial_attn", "multistep", "local_attn", "multihead_attn"):
    for normalised in (False, True):
        arrays[f"output.{method}.{int(normalised)}"] = output(methods=[method], func_norm=normalised)
batch = torch.nn.BatchNorm1d(INPUTS)
plain, layer.norm = layer.norm, batch
arrays["output.batch"] = output(methods=["global_attn"], func_norm=False)
layer.norm = plain

relu = ReLUKANLayer(INPUTS, G, K, OUTPUTS)
with torch.no_grad():
    relu.phase_low = torch.nn.Parameter(relu.phase_low + 0.1 * torch.randn(INPUTS, G + K))
    relu.phase_high = torch.nn.Parameter(relu.phase_high + 0.1 * torch.randn(INPUTS, G + K))
    arrays["relu.output"] = relu(x)
arrays |= {f"relu.{name}": value for name, value in relu.state_dict().items()}
np.savez_compressed(
    Path(__file__).with_name("afkan_reference.npz"), **{key: value.numpy() for key, value in arrays.items()}
)
