"""Write aufer_reference.npz: heatmaps and losses of the authors' code on faces and features made here.

Their code: https://github.com/sbelharbi/interpretable-fer-aus, commit 66e2bde97a465ced93be20554eaa420a9a490c19, of
which `dlib/face_landmarks/action_units.py` and `dlib/losses/align_to_heatmap.py` are run, without the modules that they
import for other purposes. Of the maps every fourth row and column is kept. Written with opencv-python-headless 5.0.0,
torch 2.14.1 and numpy 2.4:

    python make_aufer_reference.py path/to/interpretable-fer-aus
"""

import sys
import types
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

from classact.data.faces import EXPRESSIONS, SyntheticFaces

KINDS = ("cosine", "std_cosine", "l1", "l2", "kl")


def stand_in(name, **attributes):
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    module.__path__ = []
    sys.modules[name] = module
    return module


def theirs(root, path, **names):
    module = stand_in(path.replace("/", ".").removesuffix(".py"), __file__=str(root / path), **names)
    exec(compile((root / path).read_text(), path, "exec"), module.__dict__)
    return module


def main(root):
    mpl.use = lambda _: None  # theirs asks for a notebook
    for package in ("dlib", "dlib.losses", "dlib.configure", "dlib.utils", "dlib.face_landmarks"):
        stand_in(package)
    constants = theirs(root, "dlib/configure/constants.py")
    sys.modules["dlib.configure"].constants = constants
    shared = ("reformat_id", "configure_metadata", "get_image_ids", "get_class_labels", "get_landmarks")
    stand_in("dlib.utils.shared", **dict.fromkeys(shared))
    stand_in("dlib.utils.tools", get_root_wsol_dataset=None)
    stand_in("dlib.losses.elb", ELB=type("ELB", (torch.nn.Module,), {}))
    stand_in("dlib.losses.elementary", ElementaryLoss=torch.nn.Module)
    draw = theirs(root, "dlib/face_landmarks/action_units.py").build_all_action_units
    losses = theirs(root, "dlib/losses/align_to_heatmap.py")

    faces = SyntheticFaces(35, size=256, seed=5)
    landmarks = np.rint(faces.landmarks).astype(np.int16)
    landmarks[-1] += 400  # outside
    maps = []
    for points, label in zip(landmarks, faces.labels, strict=True):
        points = [(int(x), int(y)) for x, y in points]
        units = draw(points, 256, 256, EXPRESSIONS[label].capitalize(), constants.HEATMAP_AUNITS_LNMKS)
        drawn = units.max(0)
        finite = np.isfinite(drawn).all()
        maps.append((drawn - drawn.min()) / (drawn.max() - drawn.min()) if finite else drawn)
    maps = np.stack(maps).astype(np.float32)

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 6, 9, 7, generator=generator)
    prior = torch.rand(8, 1, 24, 20, generator=generator)
    values = {}
    for kind in KINDS:
        for resize, scale in (("to_attention", constants.SCALE_TO_ATTEN), ("to_prior", constants.SCALE_TO_HEATM)):
            loss = losses.AlignToHeatMap.__new__(losses.AlignToHeatMap)
            torch.nn.Module.__init__(loss)
            loss.scale_to = scale
            loss.loss = losses._AlignLoss(kind, constants.NORM_NONE, use_elb=False)
            attention = losses.BuildAttention(constants.ALIGN_AVG, 1.0, 1.0)(features)
            values[f"{kind}-{resize}"] = float(loss.process_one_att(attention, prior.clone()))
    half = losses.BuildAttention(constants.ALIGN_AVG_FIXED_Q, 1.0, 0.4)(features)
    np.savez_compressed(
        Path(__file__).parent / "aufer_reference.npz",
        landmarks=landmarks,
        labels=faces.labels.astype(np.int8),
        maps=np.where(np.isfinite(maps), np.rint(maps * 255), 0)[:, 2::4, 2::4].astype(np.uint8),
        valid=np.isfinite(maps).all((1, 2)),
        features=features.numpy(),
        prior=prior.numpy(),
        first_part=half.numpy(),
        kinds=np.array(list(values)),
        losses=np.array(list(values.values()), np.float32),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
