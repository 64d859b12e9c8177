"""What learnable attention does to a transformer: loss surface and path, spectra, distributions of weights, maps.

The analyses of Maity, Hitsman, Li, Dutta, 2025, https://arxiv.org/abs/2503.10632, section 5. Each takes a model (or
snapshots of its parameters) and returns a frozen report with ``table()``, ``plot()`` and ``save(path)``; models are
left as they were. The spectra and maps work on softmax attention of timm as well, for comparison.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from classact.nn.karat.attention import attention_matrices

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Snapshot = Mapping[str, Tensor]
SMALL = 0.05


class _Report:
    """Shared by the reports: their files."""

    def table(self) -> "pd.DataFrame":
        raise NotImplementedError

    def plot(self) -> "Figure":
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        """Write the figure as ``<path>.png`` and the table as ``<path>.csv``; return the former."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.table().to_csv(path.with_suffix(".csv"), index=False)
        self.plot().savefig(path.with_suffix(".png"))
        return path.with_suffix(".png")


@dataclass(frozen=True)
class LossLandscape(_Report):
    """Loss on a plane through the final parameters, and the way there.

    Attributes
    ----------
    x, y : (S,) array
        Coordinates along the first two principal components of the path; the final parameters are at (0, 0).
    losses : (S, S) array
        Mean loss; rows are y, columns x.
    path : (T, 2) array
        Coordinates of the snapshots.
    explained : (2,) array
        Part of the path's variance along each component.
    """

    x: np.ndarray
    y: np.ndarray
    losses: np.ndarray
    path: np.ndarray
    explained: np.ndarray

    @property
    def roughness(self) -> float:
        """Mean absolute second difference along all rows and columns of the grid, divided by the range of the loss."""
        second = np.concatenate([np.abs(np.diff(self.losses, 2, axis=axis)).ravel() for axis in (0, 1)])
        return float(second.mean() / max(np.ptp(self.losses), np.finfo(float).tiny))

    def table(self) -> "pd.DataFrame":
        """One row per point of the grid."""
        import pandas as pd

        x, y = np.meshgrid(self.x, self.y)
        return pd.DataFrame({"x": x.ravel(), "y": y.ravel(), "loss": self.losses.ravel()})

    def plot(self) -> "Figure":
        """Contours of the loss, and the path with its end marked."""
        figure = _figure(5, 4)
        axes = figure.subplots()
        filled = axes.contourf(self.x, self.y, self.losses, levels=25, cmap="viridis")
        figure.colorbar(filled, ax=axes, label="loss")
        axes.plot(*self.path.T, color="white", marker="o", markersize=3, linewidth=1)
        axes.plot(0, 0, "*", color="red", markersize=10)
        first, second = 100 * self.explained
        axes.set(xlabel=f"component 1 ({first:.0f} % of the path)", ylabel=f"component 2 ({second:.0f} %)")
        return figure


def loss_landscape(
    model: nn.Module,
    snapshots: Sequence[Snapshot],
    loader: Iterable[tuple[Tensor, Tensor]],
    span: float = 1.5,
    steps: int = 15,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> LossLandscape:
    """Loss on the plane of the first two principal components of the path of training.

    Parameters
    ----------
    model : Module
        Left as it is; runs in evaluation mode. Only its parameters move, not its buffers.
    snapshots : sequence of mappings
        Parameters during training, from first to last, at least three, as ``model.state_dict()`` gives them (copied).
        The differences to the last one are analysed.
    loader : iterable of (x, target)
        Where the loss is measured; gone through ``steps ** 2`` times, so no generator.
    span : float
        The grid is the rectangle that holds the path, stretched about its middle by this factor.
    steps : int
        Points along each side, at least 3.
    loss : callable
        Mean loss of outputs and targets.

    Raises
    ------
    ValueError
        For fewer than three snapshots, snapshots that lack a parameter, too few steps, or an empty loader.
    """
    if len(snapshots) < 3:
        raise ValueError(f"snapshots: expected at least 3, got {len(snapshots)}")
    if steps < 3 or span <= 0:
        raise ValueError(f"steps, span: expected at least 3 and a positive number, got {steps} and {span}")
    parameters = dict(model.named_parameters())
    if missing := {name for name in parameters for one in snapshots if name not in one}:
        raise ValueError(f"snapshots: expected every parameter of the model, there is no {', '.join(sorted(missing))}")
    flat = torch.stack([torch.cat([one[name].detach().flatten().double() for name in parameters]) for one in snapshots])
    differences = flat - flat[-1]
    _, spread, directions = torch.linalg.svd(differences - differences.mean(0), full_matrices=False)
    directions = directions[:2]
    path = (differences @ directions.T).cpu().numpy()
    axes = []
    for low, high in zip(path.min(0), path.max(0), strict=True):
        middle, half = (low + high) / 2, span * max(high - low, 1e-12) / 2
        axes.append(np.linspace(middle - half, middle + half, steps))
    losses = np.empty((steps, steps))
    with _evaluated(model), torch.no_grad():
        for row, b in enumerate(axes[1]):
            for column, a in enumerate(axes[0]):
                moved = flat[-1] + a * directions[0] + b * directions[1]
                parts = moved.split([p.numel() for p in parameters.values()])
                point = {
                    name: part.view_as(p).to(p.dtype) for (name, p), part in zip(parameters.items(), parts, strict=True)
                }
                losses[row, column] = _mean_loss(model, point, loader, loss)
    return LossLandscape(axes[0], axes[1], losses, path, (spread**2 / (spread**2).sum()).cpu().numpy()[:2])


def _mean_loss(model: nn.Module, point: Snapshot, loader: Iterable[Any], loss: Callable[..., Tensor]) -> float:
    total, n = 0.0, 0
    for x, target in loader:
        total += float(loss(torch.func.functional_call(model, dict(point), (x,)), target)) * len(x)
        n += len(x)
    if not n:
        raise ValueError("loader: expected batches in every pass, got none; a generator is empty after one")
    return total / n


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class AttentionSpectrum(_Report):
    """Singular values of attention, largest first, before (scores) and after the activation (weights).

    Attributes
    ----------
    names : tuple of str
        The L attentions.
    before, after : (B, h, L, N) array
    """

    names: tuple[str, ...]
    before: np.ndarray
    after: np.ndarray

    def significant(self, threshold: float = 0.01) -> dict[str, np.ndarray]:
        """How many singular values exceed `threshold` times the largest: ``before`` and ``after``, (B, h, L) each."""
        return {
            name: (values > threshold * values[..., :1]).sum(-1)
            for name, values in (("before", self.before), ("after", self.after))
        }

    def table(self) -> "pd.DataFrame":
        """One row per attention and head: the means of the largest value and of the number of significant ones."""
        import pandas as pd

        counts = self.significant()
        rows = []
        for layer, name in enumerate(self.names):
            for head in range(self.before.shape[1]):
                row: dict[str, Any] = {"attention": name, "head": head}
                for stage, values in (("before", self.before), ("after", self.after)):
                    row[f"largest_{stage}"] = float(values[:, head, layer, 0].mean())
                    row[f"significant_{stage}"] = float(counts[stage][:, head, layer].mean())
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self) -> "Figure":
        """Least, mean and largest ``ln sigma_i`` over heads and images against i, in the last attention."""
        figure = _figure(7, 3.2)
        for axes, stage, values in zip(
            figure.subplots(1, 2), ("before", "after"), (self.before, self.after), strict=True
        ):
            draw_spectrum(axes, values[:, :, -1].reshape(-1, values.shape[-1]), color="C0")
            axes.set_title(f"{stage} the activation", fontsize=10)
        return figure


def draw_spectrum(axes: Any, values: np.ndarray, **style: Any) -> None:
    """Draw the mean of ``ln sigma_i`` of (M, N) spectra against i, and the band from least to largest.

    Values below a millionth of the largest are rounding errors of single precision and left out.
    """
    logs = np.ma.log(np.ma.masked_less(values, values.max() * 1e-6))
    i = np.arange(1, values.shape[-1] + 1)
    axes.plot(i, logs.mean(0), **style)
    axes.fill_between(i, logs.min(0), logs.max(0), alpha=0.2, linewidth=0, color=style.get("color"))
    axes.set(xlabel="i", ylabel="ln of the i-th singular value")
    axes.spines[["top", "right"]].set_visible(False)


def attention_spectrum(model: nn.Module, x: Float[Tensor, "b c h w"]) -> AttentionSpectrum:
    """Singular values of all attention matrices for a few images (the paper takes 5).

    Parameters
    ----------
    model : Module
        With softmax attention of timm or [`KArAttention`][classact.nn.KArAttention]; equal heads and tokens in all.
    x : (B, C, H, W)
        Images.
    """
    with _evaluated(model), torch.no_grad():
        found = attention_matrices(model, x)
    if len({one.scores.shape for one in found}) > 1:
        raise ValueError("model: expected equal numbers of heads and tokens in all attentions")
    before, after = (
        torch.stack([torch.linalg.svdvals(getattr(one, field).double()) for one in found], 2).cpu().numpy()
        for field in ("scores", "attention")
    )
    return AttentionSpectrum(tuple(one.name for one in found), before, after)


@dataclass(frozen=True)
class WeightDistributions(_Report):
    """Histograms of the parameters at several moments of training.

    Attributes
    ----------
    labels : tuple of str
        The T moments.
    edges : (K + 1,) array
        Ends of the bins, the same for all.
    densities : (T, K) array
    statistics : (T, 3) array
        Mean, standard deviation, and part of the parameters within 0.05 of zero.
    """

    labels: tuple[str, ...]
    edges: np.ndarray
    densities: np.ndarray
    statistics: np.ndarray

    def drift(self) -> float:
        """Total variation distance between first and last histogram, from 0 (the same) to 1."""
        return float(0.5 * (np.abs(self.densities[-1] - self.densities[0]) * np.diff(self.edges)).sum())

    def table(self) -> "pd.DataFrame":
        """One row per moment."""
        import pandas as pd

        return pd.DataFrame({
            "moment": self.labels,
            **dict(zip(("mean", "std", "near_zero"), self.statistics.T, strict=True)),
        })  # fmt: skip

    def plot(self) -> "Figure":
        """Densities over the values, one line per moment."""
        figure = _figure(5, 3.2)
        axes = figure.subplots()
        for label, density in zip(self.labels, self.densities, strict=True):
            axes.stairs(density, self.edges, label=label)
        axes.set(xlabel="parameter", ylabel="density", yscale="log")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        return figure


def weight_distributions(
    snapshots: Mapping[str, Snapshot], names: Callable[[str], bool] | None = None, bins: int = 101
) -> WeightDistributions:
    """Histograms of the weights at several moments (the paper: epochs 0, 50 and 100).

    Parameters
    ----------
    snapshots : mapping
        Label -> ``state_dict`` (copied); only its floating tensors count.
    names : callable, optional
        Which of them to take, by name, as ``lambda name: "operator" in name``.
    bins : int
        Number of bins, over the range of all values.

    Raises
    ------
    ValueError
        If no tensor is left.

    Examples
    --------
    >>> found = weight_distributions({"epoch 0": {"w": torch.zeros(10)}, "epoch 9": {"w": torch.ones(10)}}, bins=4)
    >>> found.drift()
    1.0
    """
    values = []
    for label, snapshot in snapshots.items():
        chosen = [
            t.detach().flatten()
            for name, t in snapshot.items()
            if t.is_floating_point() and (names is None or names(name))
        ]
        if not chosen:
            raise ValueError(f"names: no floating tensor is taken of snapshot {label!r}")
        values.append(torch.cat(chosen).double().cpu().numpy())
    if not values:
        raise ValueError("snapshots: expected at least one")
    edges = np.linspace(min(v.min() for v in values), max(v.max() for v in values), bins + 1)
    densities = np.array([np.histogram(v, edges, density=True)[0] for v in values])
    statistics = np.array([(v.mean(), v.std(), (np.abs(v) < SMALL).mean()) for v in values])
    return WeightDistributions(tuple(snapshots), edges, densities, statistics)


@dataclass(frozen=True)
class AttentionMaps(_Report):
    """Where the class token looks: its scores before the activation, negative ones cut to 0, as in the paper.

    Attributes
    ----------
    names : tuple of str
        The L attentions.
    images : (B, H, W, C) array
        The images, stretched to [0, 1].
    maps : (B, L, h, H', W') array
        Scores of the patches.
    """

    names: tuple[str, ...]
    images: np.ndarray
    maps: np.ndarray

    def table(self) -> "pd.DataFrame":
        """One row per image, attention and head: the largest score and the part of the map that is above 0."""
        import pandas as pd

        b, layers, heads = self.maps.shape[:3]
        index = np.indices((b, layers, heads)).reshape(3, -1)
        flat = self.maps.reshape(b * layers * heads, -1)
        return pd.DataFrame({
            "image": index[0],
            "attention": np.array(self.names)[index[1]],
            "head": index[2],
            "largest": flat.max(1),
            "positive": (flat > 0).mean(1),
        })  # fmt: skip

    def plot(self) -> "Figure":
        """Each image beside the maps of the heads of the last attention."""
        b, _, heads = self.maps.shape[:3]
        figure = _figure(1.5 * (heads + 1), 1.6 * b)
        for row, panels in enumerate(figure.subplots(b, heads + 1, squeeze=False)):
            panels[0].imshow(self.images[row].squeeze(), cmap="gray")
            for head in range(heads):
                panels[head + 1].imshow(self.maps[row, -1, head], cmap="magma")
                if row == 0:
                    panels[head + 1].set_title(f"head {head + 1}", fontsize=9)
            for panel in panels:
                panel.set_axis_off()
        return figure


def attention_maps(model: nn.Module, x: Float[Tensor, "b c h w"]) -> AttentionMaps:
    """Scores of the class token before the activation, negative ones cut to 0, as maps over the patches.

    Parameters
    ----------
    model : Module
        A vision transformer of timm, plain or through [`karat_vit`][classact.nn.karat_vit], with a class token first.
    x : (B, C, H, W)
        Images.

    Raises
    ------
    ValueError
        If the model has no class token or no grid of patches.
    """
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or getattr(model, "cls_token", None) is None:
        raise ValueError("model: expected a vision transformer with a class token and a grid of patches")
    with _evaluated(model), torch.no_grad():
        found = attention_matrices(model, x)
    patches = grid[0] * grid[1]
    rows = torch.stack([one.scores[:, :, 0, -patches:] for one in found], 1).relu()
    pictures = x.detach().movedim(1, -1).float().cpu().numpy()
    low, high = (end(pictures, axis=(1, 2, 3), keepdims=True) for end in (np.min, np.max))
    images = (pictures - low) / np.maximum(high - low, 1e-12)
    return AttentionMaps(tuple(one.name for one in found), images, rows.unflatten(-1, grid).float().cpu().numpy())


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")
