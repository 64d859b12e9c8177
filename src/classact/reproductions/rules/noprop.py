"""Experiments of NoProp: beside back-propagation and other local rules, on many classes, and in continuous time.

- ``garments``: Fashion-MNIST at 14 x 14 pixels. NoProp-DT with four blocks, and the same four blocks trained by
  back-propagation through the chain. Four other rules train one stack of the same layers for four times as many
  epochs: back-propagation, local greedy learning (a classifier after each layer), Forward-Forward, and forward
  gradients. What a step keeps for its backward pass, and how many operations it takes, are counted, not timed.
- ``clusters``: ten classes of three Gaussian clusters each, with the best possible accuracy known.
- ``many-classes``: fifty classes of one Gaussian each; one-hot, learned and prototype embeddings, one-hot ones as long
  as the prototypes (which stand out from the noise by their length alone), and learned ones without the weights of the
  likelihood.
- ``continuous-time``: Fashion-MNIST again. NoProp-CT and -FM, and the same block trained as a neural ODE by adjoint
  sensitivity for as many operations.

Chosen in pilots (seeds below 100): of every arm on garments and clusters the learning rate out of 0.001, 0.003, 0.01
and 0.03 with the best accuracy; one of 0.003 for many classes, where NoProp-FM was worse at 0.001 and 0.01 with either
embedding; blocks wider than the embedding there; and AdamW for NoProp-CT and -FM too, as for the baselines, because
with Adam the decay kept NoProp-CT at chance on many classes. Difference target propagation and feedback alignment are
not among the rules.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classact.evidence.experiment import Cells, Experiment, Values
from classact.reproductions.nn.small_images import Garments, garments
from classact.rules.noprop import (
    DenoiseBlock,
    EndToEndTwin,
    InputEncoder,
    Kind,
    LabelEmbedding,
    NoPropCT,
    NoPropDT,
    NoPropFM,
    block_reliance,
    class_prototypes,
    fit_noprop,
    integrate,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rule = Literal["backprop", "greedy", "forward_forward", "forward_gradient"]
BATCH, CLASSES, T, ODE_STEPS = 128, 10, 4, 10
STEPS = (1, 2, 4, 8, 16, 30)
RATES = {
    "dt": 3e-3,
    "dt_uniform": 3e-3,
    "twin": 3e-3,
    "backprop": 1e-2,
    "greedy": 1e-2,
    "forward_forward": 3e-3,
    "forward_gradient": 3e-3,
    "ct": 1e-3,
    "ct_uniform": 1e-2,
    "fm": 3e-3,
    "adjoint": 1e-2,
}
RATES_CLUSTERS = {"dt": 3e-3, "dt_uniform": 3e-3, "twin": 1e-2, "backprop": 3e-3}
RATE_MANY = 3e-3


class Scale(NamedTuple):
    """How large the experiments on garments are; the numbers of steps of Heun's method that are tried."""

    n_train: int
    n_test: int
    pool: int
    blocks: int
    channels: tuple[int, ...]
    hidden: int
    dropout: float
    epochs: int
    steps: tuple[int, ...] = STEPS


SCALES = {
    "smoke": Scale(256, 200, 2, 2, (4, 4), 8, 0.0, 1, STEPS[:2]),
    "cpu": Scale(2560, 1500, 2, T, (8, 16), 32, 0.0, 6),
    "gpu": Scale(60_000, 10_000, 1, 10, (32, 64, 128), 256, 0.2, 10),
}


def _device(scale: str) -> torch.device:
    return torch.device("cuda" if scale == "gpu" and torch.cuda.is_available() else "cpu")


class Rival(nn.Module):
    """The layers of a block's path of x, one after the other, trained as a whole or each by itself."""

    def __init__(self, shape: tuple[int, ...], channels: tuple[int, ...], hidden: int, rule: Rule) -> None:
        super().__init__()
        self.rule, self.layers = rule, nn.ModuleList()
        x, outputs = torch.zeros(2, *shape), []
        for inputs, width in pairwise([shape[0], *channels]):
            if len(shape) == 1:
                layer: list[nn.Module] = [nn.Linear(inputs, width), nn.ReLU()]
            else:
                layer = [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
                layer += [nn.MaxPool2d(2)] if x.shape[-1] > 1 else []
            self.layers.append(nn.Sequential(*layer))
            x = self.layers[-1](x)
            outputs.append(x[0].numel())
        self.layers.append(nn.Sequential(nn.Flatten(), nn.Linear(outputs[-1], hidden), nn.ReLU()))
        self.heads = nn.ModuleList(nn.Linear(width, CLASSES) for width in [*outputs, hidden])
        if rule != "greedy":
            self.heads = self.heads[-1:]

    def _logits(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.heads[-1](x)
        return logits

    def _goodness(self, x: Tensor, y: Tensor, pixel: float = 2.0) -> Iterator[Tensor]:
        """Mean square of every layer's output, for images whose first pixels say the class."""
        x = x.clone()
        x[:, 0, 0, :CLASSES] = x.min()
        x[range(len(x)), 0, 0, y] = pixel
        for layer in self.layers:
            x = layer(x.detach())
            goodness = x.flatten(1).square().mean(1)
            yield goodness
            x = x / (goodness.reshape(-1, *[1] * (x.ndim - 1)) + 1e-6).sqrt()

    def losses(self, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        """Losses of one step; each has been back-propagated before the next one is computed."""
        if self.rule == "backprop":
            yield F.cross_entropy(self._logits(x), y)
        elif self.rule == "greedy":
            for layer, head in zip(self.layers, self.heads, strict=True):
                x = layer(x.detach())
                yield F.cross_entropy(head(x.flatten(1)), y)
        elif self.rule == "forward_forward":
            wrong = (y + torch.randint(1, CLASSES, y.shape, device=y.device)) % CLASSES
            for right, other in zip(self._goodness(x, y), self._goodness(x, wrong), strict=True):
                yield F.softplus(1 - right).mean() + F.softplus(other - 1).mean()
        else:
            weights = dict(self.named_parameters())
            drawn = {name: torch.randn_like(p) for name, p in weights.items()}

            def loss(weights: dict[str, Tensor]) -> Tensor:
                return F.cross_entropy(torch.func.functional_call(self, weights, (x,)), y)

            slope = torch.func.jvp(loss, ({n: p.detach() for n, p in weights.items()},), (drawn,))[1]
            yield torch.stack([(p * drawn[name] * slope).sum() for name, p in weights.items()]).sum()

    def forward(self, x: Tensor) -> Tensor:
        """Logits; for Forward-Forward the goodness of all layers under every label."""
        if self.rule != "forward_forward":
            return self._logits(x)
        labels = [torch.full((len(x),), label, device=x.device) for label in range(CLASSES)]
        return torch.stack([torch.stack(list(self._goodness(x, label))).sum(0) for label in labels], 1)


class NeuralODE(nn.Module):
    """The block of NoProp-FM, trained on the class of z_1 by adjoint sensitivity; Euler's method, both ways."""

    def __init__(self, block: DenoiseBlock) -> None:
        super().__init__()
        self.block, self.head = block, nn.Linear(block.d, CLASSES)

    def losses(self, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        """Cross-entropy, with gradients by the adjoint method."""
        features, z = self.block.encode(x), torch.randn(len(x), self.block.d, device=x.device)
        own = [p for name, p in self.block.named_parameters() if not name.startswith(("encoder", "x_path"))]
        last = _Adjoint.apply(z, features, self.block, *own)
        yield F.cross_entropy(self.head(last), y)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        features, z = self.block.encode(x), torch.randn(len(x), self.block.d, device=x.device)
        logits: Tensor = self.head(integrate(lambda z, t: self.block.denoise(features, z, t), z, ODE_STEPS))
        return logits


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, features: Tensor, block: DenoiseBlock, *weights: Tensor) -> Tensor:
        last = integrate(lambda z, t: block.denoise(features, z, t), z, ODE_STEPS)
        ctx.block, ctx.weights = block, weights
        ctx.save_for_backward(last, features)
        return last

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        z, features = ctx.saved_tensors
        total = [torch.zeros_like(part) for part in (features, *ctx.weights)]
        for i in range(ODE_STEPS, 0, -1):
            with torch.enable_grad():
                inputs = (z.detach().requires_grad_(), features.detach().requires_grad_(), *ctx.weights)
                v = ctx.block.denoise(inputs[1], inputs[0].clone(), i / ODE_STEPS)  # hooks want no leaf
                of_z, *others = torch.autograd.grad(v, inputs, grad)
            z, grad = z - v.detach() / ODE_STEPS, grad + of_z / ODE_STEPS
            total = [whole + part / ODE_STEPS for whole, part in zip(total, others, strict=True)]
        return None, total[0], None, *total[1:]


def _train(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float, seed: int) -> None:
    """As many steps of AdamW on batches in random order, with the paper's weight decay."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-3)
    model.train()
    for rows in _batches(len(x), steps):
        optimizer.zero_grad()
        for loss in model.losses(x[rows], y[rows]):  # type: ignore[operator]
            loss.backward()
        optimizer.step()
    model.eval()


def _batches(n: int, steps: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(n).split(BATCH):
            if len(rows) > 1:
                if not steps:
                    return
                steps -= 1
                yield rows


def _cost(losses: Callable[[], Iterator[Tensor]], model: nn.Module) -> dict[str, float]:
    """Megabytes that a step keeps for its backward pass at most, without weights, and its billions of operations."""
    from torch.utils.flop_counter import FlopCounterMode

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    most = 0

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for loss in losses():
            most = max(most, sum(kept.values()))
            loss.backward()
            kept.clear()
    with FlopCounterMode(display=False) as counter:
        for loss in losses():
            loss.backward()
    model.zero_grad()
    return {"megabytes": most / 2**20, "gflops": counter.get_total_flops() / 1e9}


def _accuracy(probabilities: Tensor, y: Tensor) -> float:
    return float((probabilities.argmax(1) == y.to(probabilities.device)).float().mean())


def _load(seed: int, scale: str) -> tuple[Garments, Scale, tuple[int, ...], torch.device]:
    size, device = SCALES[scale], _device(scale)
    data = Garments(*(part.to(device) for part in garments(seed, size.n_train, size.n_test, size.pool)))
    return data, size, tuple(data.train.shape[1:]), device


def run_garments(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """NoProp-DT, its twin, and other rules on one stack of the same layers."""
    data, size, shape, device = _load(seed, scale)
    x, y, x_test, y_test = data
    layers: dict[str, Any] = {"channels": size.channels, "hidden": size.hidden, "dropout": size.dropout}
    options: dict[str, Any] = {"epochs": size.epochs, "batch_size": BATCH, "seed": seed, "device": device}
    values: Values = {}
    arrays = {}
    first = (x[:BATCH], y[:BATCH])
    for arm in ("dt", "dt_uniform", "twin"):
        torch.manual_seed(seed)
        weight = "uniform" if arm == "dt_uniform" else "snr"
        network = NoPropDT.for_data(shape, CLASSES, T=size.blocks, weight=weight, **layers).to(device)
        if arm == "twin":
            model: Any = EndToEndTwin(network)
            cost = _cost(lambda model=model: iter([model.loss(*first)]), network)  # type: ignore[misc]
        else:
            model = network
            cost = _cost(lambda model=model: iter([model.loss(*first, t=1)]), network)  # type: ignore[misc]
        fit_noprop(model, x, y, lr=RATES[arm], **options)
        own = block_reliance(network, x_test, y_test, seed)
        values[arm] = {
            "accuracy": _accuracy(model.predict_proba(x_test, seed, deterministic=True), y_test),
            "accuracy_sampled": _accuracy(model.predict_proba(x_test, seed), y_test),
            **own._asdict(),
            **cost,
        }
        arrays[arm] = _accuracy_after_each_block(network, x_test, y_test, seed)
    rules: tuple[Rule, ...] = ("backprop", "greedy", "forward_forward", "forward_gradient")
    for rule in rules:
        torch.manual_seed(seed)
        rival = Rival(shape, size.channels, size.hidden, rule).to(device)
        cost = _cost(lambda rival=rival: rival.losses(*first), rival)  # type: ignore[misc]
        steps = size.epochs * size.blocks * -(-len(x) // BATCH)
        _train(rival, x, y, steps, RATES[rule], seed)
        with torch.inference_mode():
            answers = torch.cat([rival(part) for part in x_test.split(1000)])
        values[rule] = {"accuracy": _accuracy(answers, y_test), **cost}
    return values, arrays


@torch.inference_mode()
def _accuracy_after_each_block(network: NoPropDT, x: Tensor, y: Tensor, seed: int) -> np.ndarray:
    """Accuracy of p(y|z_t) for t = 0, ..., T, without noise between blocks."""
    torch.manual_seed(seed)
    z = torch.randn(len(x), network.embedding.d).to(x.device)
    states = [z, *(after for _, after in network.chain(x, z, deterministic=True))]
    return np.array([_accuracy(network.head(state), y) for state in states], dtype=np.float32)


class Clusters(NamedTuple):
    """Rows (n, 16), classes, and the best possible accuracy on the test part."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    best: float


def make_clusters(seed: int, classes: int, per_class: int, spread: float, n_train: int, n_test: int) -> Clusters:
    """Gaussian clusters of variance 1 around centres from N(0, spread^2); Bayes' rule knows the centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = spread * torch.randn(classes * per_class, 16, generator=generator)
    parts, labels = [], []
    for n in (n_train, n_test):
        cluster = torch.randperm(n, generator=generator) % len(centres)
        parts.append(centres[cluster] + torch.randn(n, 16, generator=generator))
        labels.append(cluster // per_class)
    likelihood = (-0.5 * torch.cdist(parts[1], centres).square()).unflatten(1, (classes, per_class)).logsumexp(2)
    return Clusters(parts[0], labels[0], parts[1], labels[1], _accuracy(likelihood, labels[1]))


def run_clusters(seed: int, scale: str) -> Values:
    """NoProp-DT, its twin and a plain network where the best possible accuracy is known."""
    n, epochs = (300, 1) if scale == "smoke" else (3000, 15)
    data = make_clusters(seed, CLASSES, 3, 0.8, n, n)
    x, y = data.train, data.train_labels
    values: Values = {"bayes": {"accuracy": data.best}}
    for arm in ("dt", "dt_uniform", "twin"):
        torch.manual_seed(seed)
        weight = "uniform" if arm == "dt_uniform" else "snr"
        network = NoPropDT.for_data((16,), CLASSES, T=T, weight=weight, channels=(32,), hidden=32, dropout=0.0)
        model: Any = EndToEndTwin(network) if arm == "twin" else network
        fit_noprop(model, x, y, epochs=epochs, lr=RATES_CLUSTERS[arm], batch_size=BATCH, seed=seed)
        values[arm] = {
            "accuracy": _accuracy(model.predict_proba(data.test, seed, deterministic=True), data.test_labels),
            "accuracy_sampled": _accuracy(model.predict_proba(data.test, seed), data.test_labels),
            **block_reliance(network, data.test, data.test_labels, seed)._asdict(),
        }
    torch.manual_seed(seed)
    rival = Rival((16,), (32,), 32, "backprop")
    _train(rival, x, y, epochs * T * -(-n // BATCH), RATES_CLUSTERS["backprop"], seed)
    with torch.inference_mode():
        values["backprop"] = {"accuracy": _accuracy(rival(data.test), data.test_labels)}
    return values


def run_many_classes(seed: int, scale: str) -> Values:
    """Three embeddings of fifty classes, in equally many steps of a block."""
    small, classes = scale == "smoke", 50
    solver = {"steps": 4 if small else STEPS[-1], "solver": "heun"}
    data = make_clusters(seed, classes, 1, 1.0, 300 if small else 2304, 300 if small else 1500)
    prototypes = class_prototypes(data.train, data.train_labels, classes)
    values: Values = {"bayes": {"accuracy": data.best}}
    kinds: tuple[Kind, ...] = ("onehot", "learned", "prototype")
    arms: list[tuple[str, Any, Kind, dict[str, Any]]] = [(f"dt_{kind}", NoPropDT, kind, {"T": T}) for kind in kinds]
    arms += [("dt_onehot_long", NoPropDT, "onehot", {"T": T})]
    arms += [("dt_learned_uniform", NoPropDT, "learned", {"T": T, "weight": "uniform"})]
    arms += [("ct_onehot_uniform", NoPropCT, "onehot", {"weight": "uniform"})]
    arms += [(f"fm_{kind}", NoPropFM, kind, {}) for kind in kinds]
    for name, network, kind, settings in arms:
        torch.manual_seed(seed)
        shown = prototypes if kind == "prototype" else None
        model = network.for_data(
            (16,), classes, embedding=kind, prototypes=shown, channels=(128,), hidden=128, dropout=0.0, **settings
        )
        if name == "dt_onehot_long":
            long = prototypes.norm(dim=1).mean() * torch.eye(classes)
            block, labels = model.blocks[0], LabelEmbedding(classes, classes, "prototype", long)
            model = NoPropDT(block, labels, **settings)
        discrete = network is NoPropDT
        epochs = 1 if small else 8 if discrete else 8 * T
        fit_noprop(model, data.train, data.train_labels, epochs=epochs, lr=RATE_MANY, batch_size=BATCH, seed=seed)
        found = model.predict_proba(data.test, seed, **({"deterministic": True} if discrete else solver))
        values[name] = {"accuracy": _accuracy(found, data.test_labels)}
    return values


def run_continuous(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """NoProp-CT with both weights, NoProp-FM, and a neural ODE trained for as many operations, and as many steps."""
    data, size, shape, device = _load(seed, scale)
    x, y, x_test, y_test = data
    layers: dict[str, Any] = {"channels": size.channels, "hidden": size.hidden, "dropout": size.dropout}
    epochs = size.epochs * size.blocks
    values: Values = {}
    arrays = {}
    first = (x[:BATCH], y[:BATCH])
    networks: dict[str, Callable[[], Any]] = {
        "ct": lambda: NoPropCT.for_data(shape, CLASSES, **layers),
        "ct_uniform": lambda: NoPropCT.for_data(shape, CLASSES, weight="uniform", **layers),
        "fm": lambda: NoPropFM.for_data(shape, CLASSES, **layers),
    }
    for arm, make in networks.items():
        torch.manual_seed(seed)
        model = make().to(device)
        gflops = _cost(lambda model=model: iter([model.loss(*first)]), model)["gflops"]  # type: ignore[misc]
        fit_noprop(model, x, y, epochs=epochs, lr=RATES[arm], batch_size=BATCH, seed=seed, device=device)
        found = [
            _accuracy(model.predict_proba(x_test, seed, steps=steps, solver="heun"), y_test) for steps in size.steps
        ]
        values[arm] = {"accuracy": found[-1], "gflops": gflops}
        arrays[arm] = np.array(found, dtype=np.float32)
    steps = epochs * -(-len(x) // BATCH)
    for arm in ("adjoint", "adjoint_same_steps"):
        torch.manual_seed(seed)
        encoder = InputEncoder(shape, size.channels, size.dropout)
        ode = NeuralODE(DenoiseBlock(encoder, CLASSES, CLASSES, size.hidden, time_dim=64)).to(device)
        gflops = _cost(lambda ode=ode: ode.losses(*first), ode)["gflops"]  # type: ignore[misc]
        allowed = steps if arm == "adjoint_same_steps" else round(steps * values["ct"]["gflops"] / gflops)
        _train(ode, x, y, allowed, RATES["adjoint"], seed)
        torch.manual_seed(seed)
        with torch.inference_mode():
            values[arm] = {"accuracy": _accuracy(ode(x_test), y_test), "steps": float(allowed), "gflops": gflops}
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


def _band(axes: Any, x: Any, curves: np.ndarray, **style: Any) -> None:
    mean, deviation = curves.mean(0), curves.std(0)
    axes.plot(x, mean, marker="o", ms=3.5, **style)
    axes.fill_between(x, mean - deviation, mean + deviation, color=style["color"], alpha=0.15, lw=0)


RELIANCE = {
    "chain": "all blocks",
    "chain_shuffled": "all blocks, x of another image",
    "first_block": "block 1 alone, z noise",
    "last_block": "last block, true z",
    "last_block_noise": "last block, z noise",
    "last_block_shuffled": "last block, true z, x of another image",
}


def draw_garments(cells: Cells) -> "Figure":
    """Accuracy of every rule, after every block, of single blocks, and beside the memory of a step."""
    from matplotlib.figure import Figure

    figure = Figure((11, 7.2), layout="constrained")
    (strips, blocks), (single, memory) = figure.subplots(2, 2)
    _strips(strips, {arm: cells.metric(arm, "accuracy") for arm in cells.arms}, "test accuracy")
    for number, arm in enumerate(("dt", "dt_uniform", "twin")):
        curves = np.stack([arrays[arm] for arrays in cells.arrays.values()])
        _band(blocks, range(curves.shape[1]), curves, color=f"C{number}", label=arm.replace("_", " "))
    blocks.axhline(1 / CLASSES, color="0.6", ls=":", lw=1)
    blocks.set(xlabel="blocks that have denoised", ylabel="accuracy of p(y|z)")
    blocks.xaxis.get_major_locator().set_params(integer=True)
    blocks.legend(frameon=False, fontsize=8)
    rows = {label: cells.metric("dt", metric) for metric, label in RELIANCE.items()}
    _strips(single, rows, "test accuracy of NoProp-DT (dotted: chance)")
    single.axvline(1 / CLASSES, color="0.6", ls=":", lw=1)
    for number, arm in enumerate(cells.arms):
        x, y = cells.metric(arm, "megabytes").mean(), cells.metric(arm, "accuracy").mean()
        memory.scatter(x, y, s=30, color=f"C{number}")
        memory.annotate(arm.replace("_", " "), (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
    memory.set(xlabel="MB kept for the backward pass of a step", ylabel="test accuracy")
    memory.margins(0.18)
    for axes in (blocks, memory):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_clusters(cells: Cells) -> "Figure":
    """Accuracy of the rules, and of single blocks."""
    from matplotlib.figure import Figure

    figure = Figure((9.5, 3), layout="constrained")
    strips, single = figure.subplots(1, 2)
    _strips(strips, {arm: cells.metric(arm, "accuracy") for arm in cells.arms}, "test accuracy")
    rows = {label: cells.metric("dt", metric) for metric, label in RELIANCE.items()}
    _strips(single, rows, "test accuracy of NoProp-DT (dotted: chance)")
    single.axvline(1 / CLASSES, color="0.6", ls=":", lw=1)
    return figure


def draw_many_classes(cells: Cells) -> "Figure":
    """Accuracy of every variant and embedding."""
    from matplotlib.figure import Figure

    figure = Figure((6, 3.4), layout="constrained")
    _strips(figure.subplots(), {arm: cells.metric(arm, "accuracy") for arm in cells.arms}, "test accuracy, 50 classes")
    return figure


def draw_continuous(cells: Cells) -> "Figure":
    """Accuracy of every variant, and against the number of solver steps."""
    from matplotlib.figure import Figure

    figure = Figure((9.5, 3.4), layout="constrained")
    strips, solver = figure.subplots(1, 2)
    _strips(strips, {arm: cells.metric(arm, "accuracy") for arm in cells.arms}, "test accuracy")
    for number, arm in enumerate(("ct", "ct_uniform", "fm")):
        curves = np.stack([arrays[arm] for arrays in cells.arrays.values()])
        _band(solver, STEPS[: curves.shape[1]], curves, color=f"C{number}", label=arm.replace("_", " "))
    solver.set_xscale("log", base=2)
    solver.set_xticks(STEPS, [str(step) for step in STEPS])
    solver.set(xlabel="steps of Heun's method", ylabel="test accuracy")
    solver.legend(frameon=False, fontsize=8)
    solver.spines[["top", "right"]].set_visible(False)
    return figure


SEEDS = {"smoke": (0, 1), "cpu": range(100, 110)}
EXPERIMENTS = {
    "garments": Experiment(run_garments, {**SEEDS, "gpu": range(100, 105)}, draw_garments),
    "clusters": Experiment(run_clusters, SEEDS, draw_clusters),
    "many-classes": Experiment(run_many_classes, SEEDS, draw_many_classes),
    "continuous-time": Experiment(run_continuous, {**SEEDS, "gpu": range(100, 105)}, draw_continuous),
}
