"""Outputs of the authors' code, for test_anomalyncd.py; run as: python make_anomalyncd_reference.py CLONE.

https://github.com/HUST-SLOW/AnomalyNCD, commit cbecce76ccc8a922a0b9ff42228607ff69afa3c4, with NumPy 2.4.6, OpenCV
5.0.0, PyTorch 2.14.1. Changed at run time only: ``.cuda()`` does nothing, and the range of thresholds is turned into
Python integers, since the formula of the threshold overflows with 8-bit ones.
"""

import functools
import sys
import types
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent


def maps():
    """Smooth random maps of two shapes, 8 bits, jointly scaled."""
    import cv2

    rng, found = np.random.default_rng(0), []
    for i in range(12):
        shape = (96, 128) if i % 2 else (112, 112)
        one = sum(cv2.GaussianBlur(rng.normal(size=shape), (0, 0), s) * s for s in (4, 8))
        spots = cv2.GaussianBlur((rng.uniform(size=shape) < 0.0007).astype(float), (0, 0), 3 + i % 3) * 60
        found.append(0.15 * one * (i % 4) + spots * (1 if i < 10 else 0.2))
    low, high = min(one.min() for one in found), max(one.max() for one in found)
    return [((one - low) / (high - low) * 255).astype(np.uint8) for one in found]


def masks():
    """Masks whose regions are close, nested, at the border or large."""
    rng, found = np.random.default_rng(1), []
    for i in range(20):
        mask = np.zeros((150, 200) if i % 2 else (180, 180), np.uint8)
        for _ in range(int(rng.integers(1, 7))):
            y, x, h, w = rng.integers([0, 0, 2, 2], [mask.shape[0], mask.shape[1], 60, 60])
            mask[y : y + h, x : x + w] = 255
            if rng.uniform() < 0.3:
                mask[y + 3 : y + h - 3, x + 3 : x + w - 3] = 0
        found.append(mask)
    return found


def weights(shapes):
    """Weights for a state dict, equal wherever they are drawn."""
    rng = np.random.default_rng(2)
    return {
        name: torch.from_numpy(rng.normal(0, 0.15, shapes[name]).astype(np.float32)) + ("norm" in name)
        for name in sorted(shapes)
    }


def batch():
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.normal(size=(4, 3, 24, 24)).astype(np.float32))
    mask = torch.from_numpy((rng.uniform(size=(4, 1, 24, 24)) < rng.uniform(size=(4, 1, 1, 1))).astype(np.float32))
    logits = torch.from_numpy(rng.uniform(-1, 1, size=(12, 7)).astype(np.float32))
    scores = torch.from_numpy(rng.uniform(size=6).astype(np.float32))
    z = torch.from_numpy(rng.normal(size=(12, 5)).astype(np.float32))
    return x, mask, logits, scores, z, torch.tensor([0, 1, 1, 2, 0, 0])


def main(clone):
    sys.path.insert(0, clone)
    torch.Tensor.cuda = lambda self, *_, **__: self
    from models.loss._contrastive_loss import SupConLoss, info_nce_logits
    from models.loss._distill_loss import DistillLoss
    from models.modules._MEBin import MEBin
    from models.modules._MGViT import MaskedGuidedVisionTransformer

    found = {}
    mebin = MEBin()
    mebin.args = types.SimpleNamespace(sample_rate=4, min_interval_len=4, erode=True)
    mebin.anomaly_map_list = maps()
    mebin.max_th, mebin.min_th = (int(end) for end in mebin.get_search_range())
    thresholds, original = [], mebin.get_threshold
    mebin.get_threshold = lambda *a: thresholds.append(original(*a)) or thresholds[-1]
    binarized, numbers = mebin.binarize_anomaly_maps()
    found["range"] = np.array([mebin.min_th, mebin.max_th])
    found["numbers"] = np.array(numbers)
    found["thresholds"] = np.array([threshold for threshold, _ in thresholds])
    found["sequences"] = np.array(mebin.anomaly_num_sequence_list)[:, :-1]
    for i, mask in enumerate(binarized):
        found[f"mask_{i}"] = np.packbits(mask > 0)

    boxes, merge = [], mebin.merge_crop_boxes
    mebin.merge_crop_boxes = lambda *a: boxes.append(merge(*a)) or boxes[-1]
    for i, mask in enumerate(masks()):
        image = np.zeros((*mask.shape, 3), np.uint8)
        _, parts = mebin.crop_sub_image_mask(image, mask, est_anomaly_num=2)
        rounded = [[round(end) for end in box] for box in boxes[-1][:3]]
        found[f"boxes_{i}"] = np.array(rounded)
        found[f"areas_{i}"] = np.array([(np.asarray(part) == 255).sum() for part in parts])

    x, mask, logits, scores, z, label = batch()
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    vit = MaskedGuidedVisionTransformer(
        [24], 6, active_depth=2, embed_dim=24, depth=3, num_heads=3, qkv_bias=True, norm_layer=norm
    )
    vit.load_state_dict(weights({name: tuple(p.shape) for name, p in vit.state_dict().items()}))
    with torch.no_grad():
        found["embedding"] = vit.eval()(x, mask).numpy()
        loss = DistillLoss(40, 50, 3, 4, repeat_times=4)
        omega = (0.5 - scores).clamp(min=0).repeat(2)
        found["distill"] = np.array([loss(logits, logits.clone(), e, omega).item() for e in (0, 20, 45)])
        p = (logits / 0.1).softmax(1).mean(0)
        found["entropy"] = np.array((-torch.log(p ** (-p)).sum() + np.log(len(p))).item())
        found["info_nce"] = np.array(torch.nn.CrossEntropyLoss()(*info_nce_logits(z, device="cpu")).item())
        unit = torch.nn.functional.normalize(z, dim=-1)
        found["supcon"] = np.array(SupConLoss()(torch.stack(unit.chunk(2), 1), label).item())
    np.savez_compressed(HERE / "anomalyncd_reference.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1])
