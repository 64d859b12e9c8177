"""Chains of the authors' sampler on small networks, for test_ppgn.py: github.com/Evolving-AI-Lab/ppgn, f0dbbad.

Run with Python 3.12 or earlier, ``python make_ppgn_reference.py <clone>``. Their ``sampler.py``, ``sampling_class.py``
and ``util.py`` are translated from Python 2; Caffe's networks are replaced by functions in float64. Made with Python
3.11.7, numpy 2.4.6 and torch 2.14.1.
"""

import re
import sys
import types
from lib2to3.refactor import RefactoringTool, get_fixers_from_package
from pathlib import Path

import numpy as np
import torch

CODE, FULL, SIZE, CLASSES, STEPS = 6, 8, 6, 4, 12


def load(clone):
    """The class-conditional sampler, with the modules it imports."""
    sys.modules["caffe"] = types.SimpleNamespace(set_mode_gpu=lambda: None)
    sys.modules["scipy.misc"] = types.ModuleType("scipy.misc")
    sys.modules["settings"] = types.SimpleNamespace(caffe_root="", gpu=False)
    tool = RefactoringTool(get_fixers_from_package("lib2to3.fixes"))
    for name in ("util", "sampler", "sampling_class"):
        source = (Path(clone) / f"{name}.py").read_text().replace("sys.maxint", "sys.maxsize")
        source = re.sub(r"\)/2", ")//2", source)  # Python 2 divides integers so
        module = types.ModuleType(name)
        sys.modules[name] = module
        exec(compile(str(tool.refactor_string(source + "\n", name)), name, "exec"), module.__dict__)
    made = object.__new__(module.ClassConditionalSampler)
    made.fc_layers, made.conv_layers, made.class_names = ["fc8"], [], [str(c) for c in range(CLASSES)]
    return made


class Blob:
    def __init__(self, *shape):
        self.data, self.diff = np.zeros(shape), np.zeros(shape)

    @property
    def shape(self):
        return self.data.shape


class Net:
    """A function with Caffe's calls."""

    def __init__(self, function, start, end, in_shape, out_shape):
        self.function, self.start, self.end = function, start, end
        self.blobs = {start: Blob(*in_shape), end: Blob(*out_shape)}

    def forward(self, end=None, **inputs):
        for value in inputs.values():
            self.blobs[self.start].data = np.array(value, dtype=float)
        self.input = torch.from_numpy(self.blobs[self.start].data.copy()).requires_grad_()
        self.output = self.function(self.input)
        self.blobs[self.end].data = self.output.detach().numpy().copy()
        return {self.end: self.blobs[self.end].data}

    def backward(self, start=None, diffs=None):
        diff = torch.from_numpy(self.blobs[self.end].diff.copy())
        (gradient,) = torch.autograd.grad(self.output, self.input, diff, retain_graph=True)
        self.blobs[self.start].diff = gradient.numpy().copy()
        return {self.start: self.blobs[self.start].diff}


def main(clone):
    rng = np.random.default_rng(0)
    weights = {
        "A": rng.normal(size=(3 * FULL * FULL, CODE)),
        "B": rng.normal(size=(CODE, 3 * SIZE * SIZE)) / 5,
        "W1": rng.normal(size=(10, 3 * SIZE * SIZE)) / 5,
        "W2": rng.normal(size=(CLASSES, 10)),
    }
    A, B, W1, W2 = map(torch.from_numpy, weights.values())
    image = (1, 3, SIZE, SIZE)
    generator = Net(
        lambda h: torch.tanh(h @ A.T / 4).view(1, 3, FULL, FULL), "feat", "deconv0", (1, CODE), (1, 3, FULL, FULL)
    )
    encoder = Net(lambda x: torch.relu(x.flatten(1) @ B.T), "data", "fc6", image, (1, CODE))
    condition = Net(lambda x: torch.tanh(x.flatten(1) @ W1.T) @ W2.T, "data", "fc8", image, (1, CLASSES))
    start = rng.normal(size=(1, CODE))
    mask = np.zeros((3, SIZE, SIZE))
    mask[:, 1:4, 2:5] = 1
    known = rng.normal(size=image) * (1 - mask)
    sampler = load(clone)
    arrays = {**weights, "start": start, "mask": mask, "known": known}
    settings = {
        "class": {"lr": 1.0, "lr_end": 1.0, "epsilon1": 0.1},
        "decay": {"lr": 1.0, "lr_end": 1e-10, "epsilon1": 1e-3},
        "inpaint": {
            "lr": 1.0,
            "lr_end": 1e-32,
            "epsilon1": 0.1,
            "inpainting": {"mask": mask, "mask_neg": 1 - mask, "image": known, "epsilon4": 0.05},
        },
    }
    for name, options in settings.items():
        _, chain = sampler.sampling(
            condition_net=condition, image_encoder=encoder, image_generator=generator,
            gen_in_layer="feat", gen_out_layer="deconv0", start_code=start, n_iters=STEPS, threshold=-1.0, layer="fc8",
            conditions=[{"unit": 2, "xy": 0}], epsilon2=1.0, epsilon3=0.0, output_dir="", save_every=1, **options,
        )  # fmt: skip
        arrays[name] = np.concatenate([found for found, *_ in chain])
    np.savez_compressed(Path(__file__).with_name("ppgn_reference.npz"), **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
