"""How well the attention and the class maps of a trained classifier agree with a spatial prior."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classact.explain.aufer.loss import attention_map, map_cosine
from classact.explain.frozen import frozen
from classact.explain.layers import find_layout, find_module, patch_grid, recorded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ClassMap = Callable[[Tensor, Tensor], Tensor]
MEASURES = ("accuracy", "att_cos", "cam_cos", "uniform_cos")


@dataclass(frozen=True)
class AlignmentReport:
    """Accuracy and agreement with the prior, per class.

    Attributes
    ----------
    classes : tuple of str
        Names of the C classes.
    samples : (C,) int
        Test samples of each class.
    accuracy : (C,)
        Share of them that is classified correctly.
    att_cos, cam_cos : (C,)
        Mean cosine of attention and of the true class's map with the prior; NaN for a class without a prior.
    uniform_cos : (C,)
        The same of a uniform map, which is far above 0: what the others have to be compared with.
    """

    classes: tuple[str, ...]
    samples: np.ndarray
    accuracy: np.ndarray
    att_cos: np.ndarray
    cam_cos: np.ndarray
    uniform_cos: np.ndarray

    @property
    def mean(self) -> dict[str, float]:
        """Accuracy over all samples, and each cosine over the classes that have a prior."""
        known = self.samples > 0
        accuracy = float(np.average(self.accuracy[known], weights=self.samples[known]))
        cosines = {name: getattr(self, name) for name in MEASURES[1:]}
        return {"accuracy": accuracy} | {
            name: float(np.nanmean(of_class)) if np.isfinite(of_class).any() else float("nan")
            for name, of_class in cosines.items()
        }

    def table(self) -> Any:
        """One row per class and their mean, as a DataFrame."""
        import pandas as pd

        rows = pd.DataFrame({name: getattr(self, name) for name in ("samples", *MEASURES)}, index=list(self.classes))
        rows.loc["mean"] = {"samples": self.samples.sum(), **self.mean}
        return rows.astype({"samples": int})

    def plot(self) -> "Figure":
        """Cosines of each class."""
        from matplotlib.figure import Figure

        figure = Figure((1.5 + len(self.classes), 3.5), layout="constrained")
        axes = figure.subplots()
        at = np.arange(len(self.classes))
        for shift, name, label in ((-0.2, "att_cos", "attention"), (0.2, "cam_cos", "class map")):
            axes.bar(at + shift, getattr(self, name), 0.38, label=label)
        axes.plot(at, self.uniform_cos, "k_", markersize=22, label="uniform map")
        axes.set_xticks(at, self.classes)
        axes.set_ylabel("cosine with the prior")
        axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.15))
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON; NaN becomes null."""
        path = Path(path)
        content: dict[str, Any] = {"classes": list(self.classes), "samples": self.samples.tolist(), "mean": self.mean}
        content |= {name: getattr(self, name).tolist() for name in MEASURES}
        content = {key: _without_nan(value) for key, value in content.items()}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return path


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def class_activation_map(features: Tensor, gradient: Tensor) -> Tensor:
    """Weights of the channels, the mean gradient of the class score, times the channels, summed: (N, h, w).

    Where the score is linear in the mean over positions (global average pooling, or the mean of patch tokens, and a
    linear layer) this is the class activation map of Zhou et al. 2016 divided by the number of positions; for other
    networks it is Grad-CAM without its ReLU.
    """
    return (gradient.mean((2, 3), keepdim=True) * features).sum(1)


def evaluate_alignment(
    model: nn.Module,
    loader: Iterable[Any],
    layer: str,
    *,
    class_map: ClassMap = class_activation_map,
    classes: Sequence[str] | None = None,
) -> AlignmentReport:
    """Measure accuracy, and how attention and class maps agree with a prior (ATT-COS and CAM-COS of the paper).

    The prior is used as a yardstick only. The attention is the mean of the layer's channels, resized to the prior and
    shifted by its minimum if that is negative. The class map is that of the true class, stretched to [0, 1] and
    resized. Each cosine is averaged over the samples of a class, then over the classes that have a prior.

    Parameters
    ----------
    model : Module
        Returns logits (N, C). It is left as it was.
    loader : iterable of (x, y, prior)
        With a prior (N, 1, H, W), +inf for samples without one, which count for the accuracy alone.
    layer : str
        Name of the layer as in ``model.named_modules()``; it puts out (N, C, h, w) or tokens.
    class_map : callable
        ``class_map(features, gradient) -> (N, h, w)``, given the layer's features and the gradient of the true class's
        logit with respect to them.
    classes : sequence of str, optional
        Names of the classes; their numbers by default.

    Raises
    ------
    ValueError
        If the loader is empty, or there is no such layer.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    labels, correct, cosines = [], [], []
    n_classes = 0
    with frozen(model), torch.enable_grad():
        for x, y, prior in loader:
            x, y, prior = x.to(device), y.to(device), prior.to(device)
            features, gradient, logits = features_and_gradient(model, x, y, layer)
            n_classes = logits.shape[1]
            size = (prior.shape[2], prior.shape[3])
            stretched = _stretched(class_map(features, gradient))
            maps = F.interpolate(stretched.unsqueeze(1), size, mode="bilinear").squeeze(1)
            found = [attention_map(features, size), maps, torch.ones_like(maps)]
            cosines.append(torch.stack([map_cosine(part, prior) for part in found], 1).cpu())
            labels.append(y.cpu())
            correct.append((logits.argmax(1) == y).cpu())
    if not labels:
        raise ValueError("loader: expected at least one batch, got none")
    target, right = torch.cat(labels).numpy(), torch.cat(correct).numpy()
    values = torch.cat(cosines).numpy()
    members = [target == c for c in range(n_classes)]
    of_class = np.array([_mean(values[member]) for member in members])
    names = tuple(classes) if classes is not None else tuple(map(str, range(n_classes)))
    if len(names) != n_classes:
        raise ValueError(f"classes: expected {n_classes} names, as many as the model has logits, got {len(names)}")
    return AlignmentReport(
        names,
        np.array([member.sum() for member in members]),
        np.array([_mean(right[member, None].astype(float))[0] for member in members]),
        *of_class.T,
    )


def features_and_gradient(model: nn.Module, x: Tensor, y: Tensor, layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """Features of the layer, gradient of the logits of the classes y with respect to them, and the logits."""
    _, module = find_module(model, layer)
    with recorded([module], gradients=True) as outputs:
        logits = model(x)
    output = outputs[0]
    if output is None:
        raise ValueError(f"layer: {layer!r} did not run, or puts out no tensor")
    (gradient,) = torch.autograd.grad(logits.gather(1, y.unsqueeze(1)).sum(), output)
    grid = find_layout(output, x.shape[2:], layer=module, patches=patch_grid(model, x.shape[2:]))
    return grid(output.detach()), grid(gradient), logits.detach()


def _stretched(maps: Tensor) -> Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)


def _mean(rows: np.ndarray) -> np.ndarray:
    """Mean over the rows that are numbers; NaN without any."""
    rows = rows[np.isfinite(rows).all(1)]
    return rows.mean(0) if len(rows) else np.full(rows.shape[1], np.nan)
