"""Write ``ftwt_reference.npz``: masks, heads, losses, gradients and MAC counts by the authors' code.

Usage: ``python make_ftwt_reference.py FOLDER``, where FOLDER is a checkout of https://github.com/selkerdawy/FTWT at
commit fc9e27fe9aeb9c646d38c1a4702e7855398a9075. Of ``thop``, which it imports, nothing is needed. Made with PyTorch
2.14.1.
"""

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, sys.argv[1])
sys.modules["utils"] = types.ModuleType("utils")
sys.modules["utils"].__path__ = [str(Path(sys.argv[1]) / "utils")]
for name in ("models", "models.cifar"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(Path(sys.argv[1]) / name.replace(".", "/"))]
for name in ("thop", "thop.vision", "thop.vision.basic_hooks"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["thop"].profile = sys.modules["thop.vision.basic_hooks"].zero_ops = None
layers, utils = importlib.import_module("utils.layers"), importlib.import_module("utils.utils")
vgg, resnet = importlib.import_module("models.cifar.vgg"), importlib.import_module("models.cifar.resnet")
mobilenet = importlib.import_module("models.cifar.mobilenet")

arrays = {}
torch.manual_seed(0)
o = torch.relu(torch.randn(40, 17, 3, 3) - 1.2) * torch.rand(17, 1, 1).square()
arrays["o"] = o
for r in (0.3, 0.5, 0.8, 0.9, 0.97, 1.0):
    arrays[f"mass.{r}"] = layers.get_gt_mask_ratio(o, r).flatten(1)
    arrays[f"uniform.{r}"] = layers.get_gt_mask_pratio(o, r).flatten(1)

for softmax in (0, 1):
    head = layers.MaskPredictorNN(17, 9, -1, 10, 0.9, softmax)
    linear = head.model[-1]
    arrays |= {f"head.{softmax}.weight": linear.weight.flatten(1), f"head.{softmax}.bias": linear.bias}
    arrays[f"head.{softmax}.logits"] = head(o).flatten(1)


def numbers(state, seed):
    """Weights that need not be stored: the test draws the same ones."""
    rng = np.random.default_rng(seed)
    for name, tensor in state.items():
        drawn = rng.normal(size=tensor.shape)
        if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
            drawn = 0.5 + np.abs(drawn)
        elif tensor.ndim > 1:
            drawn *= (2 / tensor[0].numel()) ** 0.5
        tensor.copy_(torch.from_numpy(np.asarray(drawn)))


def reference(name, model, fuse, size, mode):
    """Outputs in evaluation mode and gradients in training mode."""
    numbers(model.state_dict(), 0)
    wrapped = types.SimpleNamespace(module=model)
    args = types.SimpleNamespace(
        use_cuda=False, embedding=-1, gt_type="mass", nclass=10, mthresh=0.9, softmax=1, mode=mode, gtafterblock="False"
    )
    x = torch.randn(6, 3, size, size)
    masked = fuse(wrapped, x, args)
    for k, layer in enumerate(masked):
        linear = layer.mask.model[-1]
        rng = np.random.default_rng(k)
        linear.weight.data = torch.from_numpy(8 * rng.normal(size=linear.weight.shape)).float()
        linear.bias.data = torch.from_numpy(rng.normal(size=linear.bias.shape)).float()
    arrays[f"{name}.x"] = x
    model.eval()
    out, logits, truth, flops = model(x.clone().requires_grad_())  # which their joint mode asks for
    labels = torch.arange(6) % 10
    loss, accuracy, _ = utils.compute_mask_loss_per_input(truth, logits, labels, 1)
    arrays.update({f"{name}.out": out, f"{name}.flops": flops, f"{name}.loss": loss, f"{name}.accuracy": accuracy})
    arrays[f"{name}.truth"] = torch.cat([t.flatten(1) for t in truth], 1)
    model.train()
    x = x.clone().requires_grad_(True)
    out, logits, truth, _ = model(x)
    loss = F.cross_entropy(out, labels) + utils.compute_mask_loss_per_input(truth, logits, labels, 1)[0]
    loss.backward()
    arrays[f"{name}.total"] = loss
    for k, layer in enumerate(masked):
        arrays[f"{name}.grad.{k:02d}"] = layer.conv.weight.grad.flatten()[:50]
        arrays[f"{name}.head_grad.{k:02d}"] = layer.mask.model[-1].weight.grad.flatten()[:50]


for mode in ("decoupled", "joint"):
    torch.manual_seed(1)
    features = vgg.make_layers([6, "M", 8, 10, "M"], batch_norm=True) + torch.nn.Sequential()
    features.append(torch.nn.AdaptiveAvgPool2d(1))
    model = vgg.VGG.__new__(vgg.VGG)
    torch.nn.Module.__init__(model)
    model.features, model.classifier, model.baseline = features, torch.nn.Linear(10, 10), True
    reference(f"vgg.{mode}", model, utils.fuse_masking_vgg, 12, mode)
torch.manual_seed(2)
model = resnet.ResNet(8, num_classes=10)
model.avgpool = torch.nn.AvgPool2d(3)
reference("resnet", model, utils.fuse_masking_resnet, 12, "decoupled")
torch.manual_seed(3)
mobilenet.cfg["cifar"] = [(8, 1), 12, (16, 2), (20, 2)]
model = mobilenet.MobileNet(10)
model.fc = torch.nn.Linear(20, 10)
reference("mobilenet", model, utils.fuse_masking_mbnet, 8, "decoupled")

plain = {k: v.detach().numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for k, v in arrays.items()}
np.savez_compressed(Path(__file__).with_name("ftwt_reference.npz"), **plain)
