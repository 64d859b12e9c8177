"""Experiments of counter-current learning: beside other local rules, as an autoencoder, and how its networks align.

- ``hidden-signal``: classes of several Gaussian clusters in 6 of 40 directions, turned at random; noise in the others.
  The best possible accuracy is known, and so is where a first layer should look: its share of weight in the signal's
  directions is measured (0.15 by chance).
- ``garments``: Fashion-MNIST at 14 x 14 pixels, networks of linear layers. Accuracy, similarity of the two networks
  (beside that of a network trained by back-propagation with a downward network that never learns), spectra of the
  first layer's filters, operations of a step.
- ``convolutions``: Fashion-MNIST at 16 x 16 pixels, convolutional networks.
- ``autoencoder``: the same images, two convolutions down and two up; mean squared error per pixel.

All rules start from the same forward weights and take the same batches, by plain SGD with gradients clipped to a norm
of 1, as the paper's linear networks do. The control that a local rule must beat trains the last layer only, on hidden
layers that stay random.

Chosen in pilots (seed 0, some with seed 1): of every rule and experiment the learning rate, out of 10, 3, 1, 0.3,
0.1 and 0.03 (RATES), though not every rate was tried for every rule: not 10 for the readout on garments, nor less than
0.1 for direct feedback alignment there and on hidden-signal; of the autoencoder's out of 0.3, 0.1, 0.03 and 0.01. In
these pilots the autoencoder came out at twice back-propagation's error, the kernels no smoother than
back-propagation's, and the states of a downward network that never learns grew as similar to the upward one as those of
counter-current learning did.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from classact.evidence.experiment import Cells, Experiment, Values
from classact.reproductions.nn.small_images import Garments, garments
from classact.rules.ccl import CCLNetwork, DualAutoencoder, alignment, ccl_losses, default_loss, fit_ccl
from classact.rules.feedback_alignment import (
    DirectFeedbackAlignment,
    FeedbackAlignment,
    LayeredNetwork,
    backprop_losses,
    fit_backprop,
    fit_dfa,
    fit_fa,
    fit_readout,
    readout_losses,
)
from classact.rules.target_propagation import DifferenceTargetPropagation, fit_dtp

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = 10
RULES: dict[str, tuple[Any, Any]] = {
    "ccl": (CCLNetwork, fit_ccl),
    "fa": (FeedbackAlignment, fit_fa),
    "dfa": (DirectFeedbackAlignment, fit_dfa),
    "dtp": (DifferenceTargetPropagation, fit_dtp),
    "backprop": (CCLNetwork, fit_backprop),
    "readout": (LayeredNetwork, fit_readout),
}
RATES: dict[str, dict[str, float]] = {
    "hidden-signal": {"ccl": 3.0, "fa": 1.0, "dfa": 0.1, "dtp": 0.3, "backprop": 0.3, "readout": 10.0},
    "garments": {"ccl": 1.0, "fa": 0.3, "dfa": 0.1, "dtp": 0.3, "backprop": 0.3, "readout": 3.0},
    "convolutions": {"ccl": 3.0, "fa": 0.3, "dfa": 0.1, "dtp": 0.3, "backprop": 1.0, "readout": 10.0},
    "autoencoder": {"ccl": 0.1, "backprop": 0.3, "readout": 0.3},
}


class Scale(NamedTuple):
    """How large the experiments on garments are; `epochs` in rounds, after each of which is measured."""

    n_train: int
    n_test: int
    pool: int
    hidden: tuple[int, ...]
    batch: int
    epochs: tuple[int, ...]
    channels: tuple[int, ...]
    conv_batch: int
    conv_epochs: int
    widths: tuple[int, ...]
    ae_epochs: int


SCALES = {
    "smoke": Scale(256, 200, 2, (16, 16), 128, (1, 1), (4, 4), 128, 1, (4, 4), 1),
    "cpu": Scale(5120, 2000, 2, (128, 128, 128, 128), 256, (1, 4, 10, 15), (8, 16, 32), 128, 10, (16, 32), 4),
    "gpu": Scale(60_000, 10_000, 1, (256,) * 5, 256, (1, 4, 10, 15), (128, 128, 256), 128, 10, (128, 256), 4),
}


def _device(scale: str) -> torch.device:
    return torch.device("cuda" if scale == "gpu" and torch.cuda.is_available() else "cpu")


def _start(rule: str, shape: tuple[int, ...], seed: int, **settings: Any) -> Any:
    """The network of a rule, with the forward weights that all rules start from."""
    model = RULES[rule][0].for_data(shape, CLASSES, seed=seed, **settings)
    first = CCLNetwork.for_data(shape, CLASSES, seed=seed, **settings)
    with torch.no_grad():
        for own, common in zip(model.forward_parameters(), first.forward_parameters(), strict=True):
            own.copy_(common)
    return model


def _accuracy(model: Any, x: Tensor, y: Tensor) -> float:
    return float((model.predict_proba(x).argmax(1) == y.to(x.device)).float().mean())


def _gflops(rule: str, model: Any, x: Tensor, y: Tensor) -> float:
    """Billions of operations of a step, without the optimiser."""
    from torch.utils.flop_counter import FlopCounterMode

    def losses() -> Iterator[Tensor]:
        if rule == "ccl":
            return ccl_losses(model, default_loss(model), x, y)
        if rule in ("dfa", "dtp"):
            own: Iterator[Tensor] = model.losses(x, y)
            return own
        return readout_losses(model, x, y) if rule == "readout" else backprop_losses(model, x, y)

    with FlopCounterMode(display=False) as counter:
        for loss in losses():
            loss.backward()
    model.zero_grad()
    return float(counter.get_total_flops() / 1e9)


class Clusters(NamedTuple):
    """Rows (n, 40), classes, directions of the signal (40, 6), and the best possible accuracy on the test part."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    signal: Tensor
    best: float


def make_clusters(seed: int, n: int, per_class: int = 3, signal: int = 6, dims: int = 40) -> Clusters:
    """Gaussian clusters of variance 1, centres from N(0, 4) in a few directions; Bayes' rule knows the centres."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(dims, dims, generator=generator))[0][:, :signal]
    centres = 2 * torch.randn(CLASSES * per_class, signal, generator=generator) @ turn.T
    parts, labels = [], []
    for _ in range(2):
        cluster = torch.randperm(n, generator=generator) % len(centres)
        parts.append(centres[cluster] + torch.randn(n, dims, generator=generator))
        labels.append(cluster // per_class)
    likelihood = (-0.5 * torch.cdist(parts[1], centres).square()).unflatten(1, (CLASSES, per_class)).logsumexp(2)
    best = float((likelihood.argmax(1) == labels[1]).float().mean())
    return Clusters(parts[0], labels[0], parts[1], labels[1], turn, best)


def run_hidden_signal(seed: int, scale: str, rates: dict[str, float] | None = None) -> Values:
    """All rules where the best accuracy and the signal are known."""
    n, epochs = (300, 1) if scale == "smoke" else (3000, 25)
    data = make_clusters(seed, n)
    values: Values = {"bayes": {"accuracy": data.best}}
    for rule, rate in (rates or RATES["hidden-signal"]).items():
        model = _start(rule, (40,), seed, hidden=(64, 64, 64))
        RULES[rule][1](model, data.train, data.train_labels, epochs=epochs, lr=rate, batch_size=128, seed=seed)
        weight = model.forward_parameters()[0].detach()
        values[rule] = {
            "accuracy": _accuracy(model, data.test, data.test_labels),
            "signal_share": float((weight @ data.signal).square().sum() / weight.square().sum()),
        }
    return values


def centroid(filters: Tensor) -> float:
    """Mean spatial frequency, in cycles per pixel, of filters (n, S, S), weighted by power."""
    power = torch.fft.fft2(filters.double()).abs().square().mean(0)
    frequency = torch.fft.fftfreq(filters.shape[-1], dtype=torch.float64, device=filters.device)
    radius = torch.hypot(frequency[:, None], frequency[None])
    return float((radius * power).sum() / power.sum())


def run_garments(seed: int, scale: str, rates: dict[str, float] | None = None) -> tuple[Values, dict[str, np.ndarray]]:
    """All rules on networks of linear layers."""
    size, device = SCALES[scale], _device(scale)
    x, y, x_test, y_test = (part.to(device) for part in garments(seed, size.n_train, size.n_test, size.pool))
    shape = tuple(x.shape[1:])
    values: Values = {}
    arrays = {}
    for rule, rate in (rates or RATES["garments"]).items():
        model = _start(rule, shape, seed, hidden=size.hidden).to(device)
        own = {"gflops": _gflops(rule, model, x[: size.batch], y[: size.batch])}
        start = model.forward_parameters()[0].detach().clone()
        found, curve = [alignment(model, [(x_test, y_test)])] if rule in ("ccl", "backprop") else [], []
        for number, epochs in enumerate(size.epochs):
            run: dict[str, Any] = {"epochs": epochs, "lr": rate, "batch_size": size.batch, "device": device}
            RULES[rule][1](model, x, y, seed=1000 * seed + number, **run)
            curve.append(_accuracy(model, x_test, y_test))
            if found:
                found.append(alignment(model, [(x_test, y_test)]))
        weight = model.forward_parameters()[0].detach()
        own |= {
            "accuracy": curve[-1],
            "centroid": centroid(weight.unflatten(1, shape[1:])),
        }
        if rule != "readout":
            own["centroid_learned"] = centroid((weight - start).unflatten(1, shape[1:]))
        if found:
            same = torch.stack([part.cka.diagonal() for part in found])
            cosine = torch.stack([part.cosine for part in found])
            own |= {
                "cka_gain": float((same[-1] - same[0]).mean()),
                "cka_gain_least": float((same[-1] - same[0]).min()),
                "cka_early_top": float(same[1, -1] - same[0, -1]),
                "cka_early_bottom": float(same[1, 0] - same[0, 0]),
                "cosine_gain": float((cosine[-1] - cosine[0]).mean()),
                "cosine_ends": float((cosine[-1, 0] + cosine[-1, -1]) / 2),
                "cosine_middle": float(cosine[-1, 1:-1].mean()),
            }
            arrays[f"{rule}_cka"] = torch.stack([part.cka for part in found]).numpy().astype(np.float32)
            arrays[f"{rule}_cosine"] = cosine.numpy().astype(np.float32)
        values[rule] = own
        arrays[f"{rule}_accuracy"] = np.array(curve, dtype=np.float32)
    return values, arrays


def _images(seed: int, size: Scale, device: torch.device) -> Garments:
    """Images of 16 x 16 pixels: two more on every side, then averages of 2 x 2; 32 x 32 without pooling."""
    data = garments(seed, size.n_train // 2, size.n_test // 2)
    train, test = (
        F.avg_pool2d(F.pad(part, (2, 2, 2, 2), value=float(data.train.min())), size.pool).to(device)
        for part in (data.train, data.test)
    )
    return Garments(train, data.train_labels.to(device), test, data.test_labels.to(device))


def run_convolutions(
    seed: int, scale: str, rates: dict[str, float] | None = None
) -> tuple[Values, dict[str, np.ndarray]]:
    """All rules on convolutional networks."""
    size, device = SCALES[scale], _device(scale)
    x, y, x_test, y_test = _images(seed, size, device)
    values: Values = {}
    arrays = {}
    settings: dict[str, Any] = {"hidden": size.channels, "kind": "cnn", "kernel": 5}
    for rule, rate in (rates or RATES["convolutions"]).items():
        model = _start(rule, tuple(x.shape[1:]), seed, **settings).to(device)
        run: dict[str, Any] = {"epochs": size.conv_epochs, "batch_size": size.conv_batch, "device": device}
        RULES[rule][1](model, x, y, lr=rate, seed=seed, **run)
        kernels = model.forward_parameters()[0].detach()
        values[rule] = {
            "accuracy": _accuracy(model, x_test, y_test),
            "centroid": centroid(kernels[:, 0]),
        }
        if rule in ("ccl", "backprop"):
            arrays[f"{rule}_kernels"] = kernels[:8, 0].cpu().numpy().astype(np.float32)
    return values, arrays


def run_autoencoder(
    seed: int, scale: str, rates: dict[str, float] | None = None
) -> tuple[Values, dict[str, np.ndarray]]:
    """Counter-current learning, back-propagation, the last layer alone, and the mean image."""
    size, device = SCALES[scale], _device(scale)
    x, _, x_test, _ = _images(seed, size, device)
    values: Values = {"mean": {"mse": float(F.mse_loss(x.mean(0).expand_as(x_test), x_test))}}
    arrays = {"images": x_test[:6, 0].cpu().numpy().astype(np.float32)}
    fits: dict[str, Any] = {"ccl": fit_ccl, "backprop": fit_backprop, "readout": fit_readout}
    run: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4, "clip": 0.2, "centralise": True, "cosine": True}
    run |= {"epochs": size.ae_epochs, "batch_size": 32, "seed": seed, "device": device}
    for rule, rate in (rates or RATES["autoencoder"]).items():
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = DualAutoencoder(1, size.widths)
        fits[rule](model, x, x, lr=rate, **run)
        with torch.inference_mode():
            answer = torch.cat([model(part) for part in x_test.split(500)])
        values[rule] = {"mse": float(F.mse_loss(answer, x_test))}
        arrays[rule] = answer[:6, 0].cpu().numpy().astype(np.float32)
    return values, arrays


def _strips(axes: Any, values: dict[str, np.ndarray], label: str) -> None:
    """One point per seed, and means, a row per arm."""
    for row, found in enumerate(values.values()):
        axes.scatter(found, row + np.linspace(-0.18, 0.18, len(found)), s=12, color=f"C{row % 10}", alpha=0.7, lw=0)
        axes.plot([found.mean()] * 2, [row - 0.32, row + 0.32], color="black", lw=1.5)
    axes.set_yticks(range(len(values)), [name.replace("_", " ") for name in values])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def draw_hidden_signal(cells: Cells) -> "Figure":
    """Accuracy, and weight in the signal's directions."""
    from matplotlib.figure import Figure

    figure = Figure((9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _strips(left, {arm: cells.metric(arm, "accuracy") for arm in cells.arms}, "test accuracy")
    rules = [arm for arm in cells.arms if arm != "bayes"]
    _strips(right, {arm: cells.metric(arm, "signal_share") for arm in rules}, "weight of layer 1 on the signal")
    right.axvline(6 / 40, color="0.6", ls=":", lw=1)
    right.set_xlim(0)
    return figure


def draw_garments(cells: Cells) -> "Figure":
    """Accuracy over epochs, similarity of the two networks, cosine of their weights, and operations of a step."""
    from matplotlib.figure import Figure

    figure = Figure((11, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 6)
    size = next((s for s in SCALES.values() if len(s.epochs) == len(_stack(cells, "ccl_accuracy")[0])), SCALES["cpu"])
    epochs = np.cumsum(size.epochs)
    accuracy, strips, weights = (figure.add_subplot(grid[0, i : i + 2]) for i in (0, 2, 4))
    for number, arm in enumerate(cells.arms):
        curves = _stack(cells, f"{arm}_accuracy")
        accuracy.plot(epochs, curves.mean(0), marker="o", ms=3, color=f"C{number}", label=arm)
    accuracy.set(xlabel="epochs", ylabel="test accuracy")
    accuracy.legend(frameon=False, fontsize=8)
    _strips(strips, {arm: cells.metric(arm, "accuracy") for arm in cells.arms}, "test accuracy at the end")
    cosine = _stack(cells, "ccl_cosine").mean(0)
    for i, values in enumerate(cosine.T, 1):
        weights.plot([0, *epochs], values, marker="o", ms=3, color=f"C{i - 1}", label=f"layer {i}")
    weights.set(xlabel="epochs", ylabel="cosine of $F_i$ and $B_i^T$ (ccl)")
    weights.legend(frameon=False, fontsize=8)
    for axes in (accuracy, weights):
        axes.spines[["top", "right"]].set_visible(False)
    cka = {arm: _stack(cells, f"{arm}_cka").mean(0) for arm in ("ccl", "backprop")}
    last = len(epochs)
    shown = [("ccl", i) for i in sorted({0, 1, 2, last}) if i <= last] + [("backprop", 0), ("backprop", last)]
    maps = [figure.add_subplot(grid[1, column]) for column in range(len(shown))]
    for column, (axes, (arm, i)) in enumerate(zip(maps, shown, strict=True)):
        image = axes.imshow(cka[arm][i], vmin=0, vmax=1, cmap="viridis", origin="lower")
        axes.set_title(f"{arm}, epoch {[0, *epochs][i]}", fontsize=9)
        ticks = range(cka[arm].shape[1])
        axes.set_xticks(ticks, [str(t + 1) for t in ticks])
        axes.set_yticks(ticks, [str(t + 1) for t in ticks])
        axes.set(xlabel="$c_j$", ylabel="$a_i$" if column == 0 else "")
    figure.colorbar(image, ax=maps, label="linear CKA", location="bottom", shrink=0.4)
    return figure


def _stack(cells: Cells, name: str) -> np.ndarray:
    return np.stack([arrays[name] for arrays in cells.arrays.values()])


def draw_convolutions(cells: Cells) -> "Figure":
    """Accuracy, spectra, and kernels of the first seed."""
    from matplotlib.figure import Figure

    figure = Figure((11, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _strips(left, {arm: cells.metric(arm, "accuracy") for arm in cells.arms}, "test accuracy")
    label = "mean frequency of kernels (cycles per pixel)"
    _strips(middle, {arm: cells.metric(arm, "centroid") for arm in cells.arms}, label)
    first = next(iter(cells.arrays.values()))
    rows = []
    for arm in ("ccl", "backprop"):
        kernels = first[f"{arm}_kernels"]
        scaled = kernels / np.abs(kernels).max((1, 2), keepdims=True)
        rows.append(np.concatenate([np.pad(k, 1, constant_values=np.nan) for k in scaled], 1))
    right.imshow(np.concatenate(rows), cmap="RdBu", vmin=-1, vmax=1)
    side = rows[0].shape[0]
    right.set_yticks([side / 2 - 0.5, 1.5 * side - 0.5], ["ccl", "backprop"])
    right.set_xticks([])
    right.spines[:].set_visible(False)
    right.set_title("first kernels, one seed", fontsize=9)
    return figure


def draw_autoencoder(cells: Cells) -> "Figure":
    """Errors, and images of the first seed."""
    from matplotlib.figure import Figure

    figure = Figure((9.5, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    _strips(left, {arm: cells.metric(arm, "mse") for arm in cells.arms}, "test error per pixel")
    left.set_xlim(0)
    first = next(iter(cells.arrays.values()))
    names = ["images", *(arm for arm in cells.arms if arm != "mean")]
    right.imshow(np.concatenate([np.concatenate(list(first[name]), 1) for name in names]), cmap="gray", vmin=-1, vmax=2)
    side = first["images"].shape[1]
    right.set_yticks([side * (i + 0.5) - 0.5 for i in range(len(names))], names)
    right.set_xticks([])
    right.spines[:].set_visible(False)
    return figure


SEEDS = {"smoke": (0, 1), "cpu": range(100, 110)}
EXPERIMENTS = {
    "hidden-signal": Experiment(run_hidden_signal, SEEDS, draw_hidden_signal),
    "garments": Experiment(run_garments, {**SEEDS, "gpu": range(100, 105)}, draw_garments),
    "convolutions": Experiment(run_convolutions, {**SEEDS, "gpu": range(100, 105)}, draw_convolutions),
    "autoencoder": Experiment(run_autoencoder, {**SEEDS, "gpu": range(100, 105)}, draw_autoencoder),
}
