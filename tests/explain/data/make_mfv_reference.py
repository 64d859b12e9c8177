"""Run the authors' scripts on a made-up network and keep what they compute, as mfv_reference.npz.

Usage: python make_mfv_reference.py <clone of https://github.com/Evolving-AI-Lab/mfv at commit b270b26>
Written with Python 3.11, NumPy 2.4, SciPy 1.17, scikit-image 0.26, torch 2.14. The scripts are for Python 2 and Caffe:
their prints are taken out, and a stand-in takes the place of Caffe and its network.
"""

import re
import sys
import types
from pathlib import Path

import numpy as np
import skimage.restoration
import torch

SIZE, UNITS, MEAN = 16, 5, np.float32([104.0, 117.0, 123.0])
OCTAVES = [
    {"margin": 0, "window": 0.3, "layer": "fc8", "iter_n": 5, "steps": (1.0, 2.0), "weights": (0.4, 0.4)},
    {
        "margin": 0,
        "window": 0.3,
        "layer": "prob",
        "scale": 1.2,
        "iter_n": 4,
        "steps": (6.0, 6.0),
        "weights": (0.01, 2.0),
    },
    {"margin": 3, "window": 0.2, "layer": "fc8", "scale": 1.2, "iter_n": 3, "steps": (2.0, 3.0), "weights": (0.1, 2.0)},
]


def weights():
    first = torch.arange(12 * 3 * SIZE * SIZE, dtype=torch.float64).pow(1.5).sin().view(12, -1) / 2000
    return first, torch.arange(UNITS * 12, dtype=torch.float64).pow(1.5).sin().view(UNITS, 12)


class Blob:
    def __init__(self, shape):
        self.data, self.diff = np.zeros(shape), np.zeros(shape)
        self.height, self.width = shape[-2:] if len(shape) == 4 else (1, 1)

    def reshape(self, *shape):
        assert shape == self.data.shape


class Network:
    """What the scripts use of a Caffe network, in float64: images in BGR without their mean, two layers, softmax."""

    def __init__(self, *_, **__):
        self.blobs = {"data": Blob((1, 3, SIZE, SIZE)), "fc8": Blob((1, UNITS)), "prob": Blob((1, UNITS))}
        self.transformer = types.SimpleNamespace(mean={"data": MEAN[:, None, None]})

    def _output(self, x, end):
        first, second = weights()
        logits = torch.tanh(x.flatten(1) @ first.T) @ second.T
        return logits if end == "fc8" else logits.softmax(1)

    def forward(self, end):
        self.blobs[end].data = self._output(torch.from_numpy(self.blobs["data"].data), end).numpy()
        return {end: self.blobs[end].data}

    def backward(self, start):
        x = torch.from_numpy(self.blobs["data"].data).requires_grad_()
        self._output(x, start).backward(torch.from_numpy(self.blobs[start].diff))
        self.blobs["data"].diff = x.grad.numpy()


def load(file):
    """The functions of a script."""
    text = re.sub(r"^( *)print .*?(?=\n)", r"\1pass", file.read_text(), flags=re.MULTILINE).replace("xrange", "range")
    text = re.sub(r"^from (cStringIO|IPython\.display|scipy\.misc) import .*$", "", text, flags=re.MULTILINE)
    settings = types.SimpleNamespace(caffe_root=".", model_path="", model_definition="", gpu=False)
    sys.modules |= {"settings": settings, "caffe": types.SimpleNamespace(Classifier=Network)}
    space = {"__name__": file.stem}
    exec(compile(text, str(file), "exec"), space)

    def denoise(image, weight, max_iter, eps):
        return skimage.restoration.denoise_tv_bregman(image, weight, max_num_iter=max_iter, eps=eps)

    space["denoise_tv_bregman"] = denoise
    return space


def octave_table(space):
    """The octaves of a script's main function, as they are and as (iterations, scale, softmax, margin, window)."""
    found = {}
    original = space["max_activation"]
    space |= {"max_activation": lambda *args, **_: found.update(octaves=args[4]), "save_image": lambda *_: ""}
    arguments, sys.argv = sys.argv, ["script", "0", "name", "fc8", "0", "0"]
    space["main"]()
    sys.argv, space["max_activation"] = arguments, original
    rows = [
        (o["iter_n"], o.get("scale", 1.0), o.get("layer", "fc8") == "prob", o["margin"], o["window"])
        for o in found["octaves"]
    ]
    return np.array(rows, float), found["octaves"]


def main():
    clone = Path(sys.argv[1])
    drawn, normal = [], np.random.normal

    def recorded(mean, deviation, _):
        drawn.append(float(normal(mean, deviation)))
        return drawn[-1]

    found = {}
    for name in ("mean", "center"):  # the last is kept: only it has softmax
        space = load(clone / f"act_max.tvd.{name}.py")
        climb, step, seen = space["max_activation"], space["make_step"], []
        found[f"{name}_octaves"], octaves = octave_table(space)

        def watch(*_, **options):
            seen.append((options["step_size"], options["denoise_weight"]))  # noqa: B023
            return 0, 0.0, 0.0

        np.random.normal, space["make_step"] = recorded, watch
        climb(space["net"], "fc8", 0, np.zeros((SIZE, SIZE, 3)), octaves, debug=False, unit=0)
        found[f"{name}_steps"] = np.array(seen)
        np.random.normal, space["make_step"] = normal, step

    start = np.random.default_rng(1).uniform(0, 255, (SIZE, SIZE, 3))
    octaves = [
        {
            **octave,
            **dict(zip(("start_step_size", "end_step_size"), octave["steps"], strict=True)),
            **dict(zip(("start_denoise_weight", "end_denoise_weight"), octave["weights"], strict=True)),
        }
        for octave in OCTAVES
    ]
    drawn.clear()
    np.random.seed(0)
    np.random.normal = recorded
    image = climb(space["net"], "fc8", 0, start, octaves, debug=False, unit=2)
    np.savez_compressed(
        Path(__file__).with_name("mfv_reference.npz"),
        **found,
        start=start.transpose(2, 0, 1),
        corners=np.array(drawn).reshape(-1, 2),
        image=image.transpose(2, 0, 1),
    )


if __name__ == "__main__":
    main()
