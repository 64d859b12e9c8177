"""Make mambamil.npz: python make_mambamil.py PATH_TO_A_CHECKOUT_OF_isyangshu/MambaMIL.

The authors' modules run as they are, at widths of 8 and 4 in place of 512 and 128, with their two CUDA kernels replaced
by plain float64 PyTorch.
"""

import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F


def convolve(x, weight, bias, _, silu):
    y = F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight.unsqueeze(1), bias, groups=len(weight))
    return F.silu(y) if silu else y


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """The layout of the kernel: u, delta, z (N, D, L), B, C (N, 1, S, L)."""
    delta = delta + delta_bias.unsqueeze(1)
    delta = F.softplus(delta) if delta_softplus else delta
    h, y = 0, []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * B[:, :, :, t] * u[:, :, t, None]
        y.append((h * C[:, :, :, t]).sum(2))
    y = torch.stack(y, 2) + D.unsqueeze(1) * u
    return y, y, y * F.silu(z)


def authors(checkout):
    """Their MambaMIL class, made smaller; packages that load other things first are replaced by empty ones."""
    for name, members in {
        "causal_conv1d": {"causal_conv1d_fn": None, "causal_conv1d_update": None},
        "causal_conv1d_cuda": {"causal_conv1d_fwd": convolve},
        "selective_scan_cuda": {"fwd": scan},
    }.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(members)
    for name in ("mamba", "mamba.mamba_ssm", "mamba.mamba_ssm.modules", "mamba.mamba_ssm.ops"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(Path(checkout, *name.split(".")))]
    from mamba.mamba_ssm.modules.bimamba import BiMamba
    from mamba.mamba_ssm.modules.srmamba import SRMamba

    sys.modules["mamba.mamba_ssm"].__dict__.update(SRMamba=SRMamba, BiMamba=BiMamba, Mamba=None)
    source = Path(checkout, "models", "MambaMIL.py").read_text()
    module = types.ModuleType("authors")
    exec(source.replace("512", "8").replace("128", "4"), module.__dict__)
    return module.MambaMIL


def main(checkout):
    model_class = authors(checkout)
    torch.manual_seed(0)
    torch.Tensor.float = torch.Tensor.double  # they ask for single precision in places
    arrays = {"x": torch.randn(1, 23, 20).double()}
    for kind in ("SRMamba", "BiMamba"):
        model = model_class(20, 3, 0.0, "relu", layer=2, rate=5, type=kind).double().eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():  # they begin with zero biases, and the two scans with equal A
                if not name.endswith("weight"):
                    weight += 0.3 * torch.randn_like(weight)
            arrays[f"{kind}:logits"] = model(arrays["x"])[0]
            hazards, survival, *_ = (setattr(model, "survival", True), model(arrays["x"]))[1]
        arrays |= {f"{kind}:hazards": hazards, f"{kind}:survival": survival}
        arrays |= {f"{kind}:weight:{name}": value for name, value in model.state_dict().items()}
    arrays = {name: value.numpy() for name, value in arrays.items()}
    np.savez_compressed(Path(__file__).parent / "mambamil.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
