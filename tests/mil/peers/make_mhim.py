"""Make mhim.npz: python make_mhim.py PATH_TO_A_CHECKOUT_OF_DearCaat/MHIM-MIL (branch v1)."""

import sys
import types
from pathlib import Path

import numpy as np
import torch


def main(checkout):
    sys.path.insert(0, checkout)
    package = types.ModuleType("modules")  # its own __init__ loads every model of the repository
    package.__path__ = [str(Path(checkout) / "modules")]
    sys.modules["modules"] = package
    from modules.mhim import MHIM

    torch.manual_seed(0)
    settings = {"mlp_dim": 16, "dropout": 0.0, "da_act": "relu", "baseline": "attn", "temp_t": 0.1}
    student, teacher = (
        MHIM(**settings, mask_ratio_h=0.07, mask_ratio_hr=1.0, mask_ratio_l=0.3).train() for _ in range(2)
    )
    for model in (student, teacher):  # in place of 1,024 x 512
        model.patch_to_emb = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.ReLU())
    x = torch.randn(1, 40, 24)
    pooled, attention = teacher.forward_teacher(x)
    logits, consistency, _, kept = student(x, attention, pooled, i=0)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([1])) + 0.1 * consistency
    loss.backward()
    _, order = student.get_mask(40, 0, attention)
    heads = torch.randn(1, 4, 40).softmax(-1)
    arrays = {
        "x": x,
        "keep": order[0, :kept].sort().values,
        "logits": logits,
        "consistency": consistency,
        "loss": loss,
        "gradient": student.online_encoder.attention.attention[0].weight.grad,
        "heads": heads,
    }
    for fusion in ("vote", "mean"):
        voter = MHIM(**settings, mask_ratio_h=0.2, mask_ratio_hr=1.0, msa_fusion=fusion)
        kept, order = voter.get_mask(40, 0, heads)
        arrays[f"keep_{fusion}"] = order[0, :kept].sort().values
    for who, model in (("student", student), ("teacher", teacher)):
        arrays |= {f"{who}:{name}": value for name, value in model.state_dict().items()}
    np.savez_compressed(Path(__file__).parent / "mhim.npz", **{k: v.detach().numpy() for k, v in arrays.items()})


if __name__ == "__main__":
    main(sys.argv[1])
