"""Writes promptcam_reference.npz: the authors' own network and their ranking of heads, on a small random transformer.

Authors' code: https://github.com/Imageomics/Prompt_CAM, commit 7722fc2ec3b66fe6c8ba445537a6c05c649e73b2, run with timm
1.0.31 and torch 2.14. Call with the folder that holds a checkout:

    python make_promptcam_reference.py PATH_TO_CHECKOUT
"""

import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, sys.argv[1])
sys.modules["utils.setup_logging"] = logs = ModuleType("utils.setup_logging")  # theirs writes files
logs.get_logger = logging.getLogger
from model.vision_transformer import VisionTransformerPETL

CLASSES, IMAGES = 4, 3
SIZES = {"img_size": 24, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 3, "init_values": 0.5}

params = SimpleNamespace(
    train_type="prompt_cam", vpt_mode=None, vpt_layer=None, vpt_num=CLASSES, vpt_dropout=0.0, vis_attn=True
)
torch.manual_seed(0)
network = VisionTransformerPETL(**SIZES, params=params).eval()
with torch.no_grad():
    for parameter in network.parameters():  # a fresh network hardly tells classes apart
        parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(IMAGES, 3, 24, 24)
    scores, attention = network(x)
    order, probabilities = [], []
    for image in x:
        blurred, found, remaining = [], [], list(range(network.num_heads))
        target = int(network(image[None])[0].argmax())
        while remaining:
            trials = [
                float(network(image[None], [*blurred, head], target)[0].squeeze(-1).softmax(-1)[0, target])
                for head in remaining
            ]
            found.append(max(trials))
            blurred.append(remaining.pop(int(np.argmax(trials))))
        order.append(blurred[::-1])
        probabilities.append(found[::-1])
    one_blurred = network(x, [0, 2], 1)

prefix = CLASSES + 1
np.savez_compressed(
    Path(__file__).with_name("promptcam_reference.npz"),
    x=x.numpy(),
    scores=scores.squeeze(-1).numpy(),
    attention=attention[:, :, :CLASSES, prefix:].numpy(),
    blurred_scores=one_blurred[0].squeeze(-1).numpy(),
    blurred_attention=one_blurred[1][:, :, :CLASSES, prefix:].numpy(),
    order=np.array(order),
    probabilities=np.array(probabilities, dtype=np.float32),
    **{f"weight:{name}": tensor.numpy() for name, tensor in network.state_dict().items()},
)
