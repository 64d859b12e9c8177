"""Experiments of PPGN: codes of known density; five variants, other conditions, sets and holes on garments.

Settings fixed before the evidence. *Known codes*: series of 64 values drawn by a known generator from codes of 8 values
whose density, a mixture of 12 Gaussians for 4 classes, is known too, so that samples are compared with the codes of
their class (energy distance), and classified by Bayes' rule. *Garments*: Fashion-MNIST, 10,000 training images for
encoder, condition and generator, 10,000 others for the judge, test images as the real ones; small networks.

Every arm has a grid of eight settings, written below, from which the one with the least distance (or error in the hole)
on seed 0 was taken. DGN-AM with noise shows what the noise of the chain does without a prior; the Gaussian prior, the
best linear autoencoder of the codes, what a learned prior adds to their mean and covariance; DGN-AM from codes of real
images, what a start near the data does. Chosen after pilots on seed 0 as well: the range of the grids, and autoencoders
of codes with two hidden layers of 256 and a noise of 0.6 standard deviations (with a bottleneck of three eighths of the
code and 0.3 standard deviations, R_h was worse than the linear one).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classact.data.images import fashion_mnist
from classact.evidence.experiment import Cells, Experiment, Values
from classact.explain.ascent import ascend, gradient_of
from classact.explain.image_priors import total_variation
from classact.explain.ppgn.networks import FeatureGenerator
from classact.explain.ppgn.sampler import (
    CaptionCondition,
    ClassCondition,
    Condition,
    DAEPrior,
    Eps,
    JointPrior,
    LatentPrior,
    NeuronCondition,
    PPGNSampler,
    ZeroPrior,
    noiseless_joint_ppgn_h,
    sample_neuron,
)
from classact.explain.ppgn.training import fit_generator, fit_latent_dae

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Setting = tuple[Eps, int]
Arrays = dict[str, np.ndarray]
SIGMA, HIDDEN = 0.6, (256, 256)
PRIOR_GRID: list[Setting] = [((e1, e2, e3), 80) for e1 in (0.1, 0.3) for e2 in (1.0, 5.0) for e3 in (0.5, 1.0)]
PIXEL_GRID: list[Setting] = [((e1, 0.05, e3), 80) for e1 in (0.03, 0.1, 0.3, 1.0) for e3 in (0.0, 0.1)]


def _plain_grid(*e2: float) -> list[Setting]:
    return [((0.0, e, 0.0), steps) for e in e2 for steps in (40, 80)]


def _noise_grid(*e2: float) -> list[Setting]:
    return [((0.0, e, e3), 80) for e in e2 for e3 in (0.1, 0.3)]


def _spread(f: Tensor) -> float:
    """Mean distance of two rows."""
    return float(torch.pdist(f).mean())


def _coverage(found: Tensor, real: Tensor, k: int = 5) -> float:
    """Share of real rows with one found nearer than their k-th real neighbour (Naeem et al. 2020)."""
    radius = torch.cdist(real, real).kthvalue(k + 1, dim=1).values
    return float((torch.cdist(real, found).amin(1) <= radius).float().mean())


def _descend(
    model: nn.Module, loss: Callable[[Tensor], Tensor], n: int, epochs: int, generator: torch.Generator
) -> nn.Module:
    """Adam on batches of 64 of n samples; the learning rate falls from 0.002 to 0 along half a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-n // 64))
    for _ in range(epochs):
        for chosen in torch.randperm(n, generator=generator).split(64):
            optimizer.zero_grad()
            loss(chosen).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _linear_autoencoder(h: Tensor, sigma: float) -> Callable[[Tensor], Tensor]:
    """The linear autoencoder with the least error at this noise: shrinkage to the mean along principal axes."""
    mean, covariance = h.mean(0), torch.cov(h.T)
    shrink = torch.linalg.solve(covariance + sigma**2 * torch.eye(len(mean)), covariance)
    return lambda s: mean + (s - mean) @ shrink


# ---------------------------------------------------------------------------------------------------------------------
# Codes whose distribution is known

KNOWN_CLASSES, MODES, KNOWN_CODE, LENGTH = 4, 3, 8, 64
KNOWN: dict[str, Setting] = {
    "dgn_am": ((0.0, 1.0, 0.0), 40),
    "dgn_am_noise": ((0.0, 0.3, 0.3), 80),
    "gaussian": ((0.3, 1.0, 0.5), 80),
    "ppgn_h": ((0.3, 1.0, 0.5), 80),
    "joint": ((0.1, 1.0, 0.5), 80),
    "noiseless": ((0.1, 1.0, 0.5), 80),
    "exact": ((0.1, 1.0, 0.5), 80),
}
KNOWN_GRIDS = {"dgn_am": _plain_grid(0.3, 1.0, 3.0, 10.0), "dgn_am_noise": _noise_grid(0.3, 1.0, 3.0, 10.0)}


@dataclass(frozen=True)
class KnownCodes:
    """A mixture p(h | c) of `MODES` Gaussians of one variance per class, and a generator of series.

    Attributes
    ----------
    means : (KNOWN_CLASSES, MODES, KNOWN_CODE)
        Of the Gaussians, drawn from N(0, 2^2).
    mix, waves : (KNOWN_CODE, 16), (16, LENGTH)
        ``G(h) = tanh(h mix / 3) waves``, sums of 16 sines.
    deviation : float
        Standard deviation of each Gaussian.
    """

    means: Tensor
    mix: Tensor
    waves: Tensor
    deviation: float = 0.4

    @classmethod
    def draw(cls, generator: torch.Generator) -> "KnownCodes":
        """Draw one."""
        means = 2 * torch.randn(KNOWN_CLASSES, MODES, KNOWN_CODE, generator=generator)
        time = torch.linspace(0, 2 * torch.pi, LENGTH)
        phase = 2 * torch.pi * torch.rand(16, 1, generator=generator)
        waves = torch.sin(torch.arange(1, 17).unsqueeze(1) * time + phase)
        return cls(means, torch.randn(KNOWN_CODE, 16, generator=generator), waves)

    def codes(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Codes of the classes `y`."""
        means = self.means[y, torch.randint(MODES, y.shape, generator=generator)]
        return means + self.deviation * torch.randn(means.shape, generator=generator)

    def series(self, h: Tensor) -> Tensor:
        """G(h)."""
        return (torch.tanh(h @ self.mix / 3) @ self.waves).unsqueeze(1)

    def classify(self, h: Tensor) -> Tensor:
        """Most probable class of each code."""
        return torch.cdist(h, self.means.flatten(0, 1)).unflatten(1, (KNOWN_CLASSES, MODES)).amin(2).argmin(1)

    def smoothed(self, h: Tensor, sigma: float) -> Tensor:
        """Posterior mean of a code seen with noise `sigma`: what a perfect autoencoder returns."""
        means, variance = self.means.flatten(0, 1), self.deviation**2
        weight = (-torch.cdist(h, means).square() / 2 / (variance + sigma**2)).softmax(1)
        return h + sigma**2 / (variance + sigma**2) * (weight @ means - h)


def _series_network(out: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(LENGTH, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, out)
    )


def run_known(seed: int, scale: str, grid: bool = False) -> tuple[Values, Arrays]:
    """Train condition, autoencoders and encoders on 4,000 codes and their series; sample each class with every prior.

    With `grid`, every setting of the grids is an arm.
    """
    n, epochs, chains = (400, 2, 20) if scale == "smoke" else (4000, 15, 100)
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    world = KnownCodes.draw(random)
    G = world.series
    y = torch.arange(n) % KNOWN_CLASSES
    h = world.codes(y, random)
    x, sigma = G(h), SIGMA * float(h.std())
    condition, encoder, denoiser = (_series_network(width) for width in (KNOWN_CLASSES, KNOWN_CODE, KNOWN_CODE))
    _descend(condition, lambda i: F.cross_entropy(condition(x[i]), y[i]), n, epochs, random)
    _descend(encoder, lambda i: F.mse_loss(encoder(x[i]), h[i]), n, epochs, random)
    _descend(
        denoiser,
        lambda i: F.mse_loss(denoiser(G(h[i] + sigma * torch.randn(h[i].shape, generator=random))), h[i]),
        n,
        epochs,
        random,
    )
    priors: dict[str, LatentPrior] = {
        "dgn_am": ZeroPrior(),
        "dgn_am_noise": ZeroPrior(),
        "gaussian": DAEPrior(_linear_autoencoder(h, sigma)),
        "ppgn_h": DAEPrior(fit_latent_dae(h, sigma, HIDDEN, seed=seed, epochs=epochs, lr=2e-3)),
        "joint": JointPrior(G, denoiser),
        "noiseless": JointPrior(G, encoder),
        "exact": DAEPrior(partial(world.smoothed, sigma=sigma)),
    }
    wanted = torch.arange(KNOWN_CLASSES).repeat_interleave(chains)
    of_class = [wanted == c for c in range(KNOWN_CLASSES)]
    true = world.codes(wanted, random)
    start = torch.randn(true.shape, generator=random)

    def measure(codes: Tensor) -> dict[str, float]:
        return {
            "distance": float(np.mean([_energy_distance(codes[c], true[c]) for c in of_class])),
            "diversity": float(np.mean([_spread(codes[c]) / _spread(true[c]) for c in of_class])),
            "coverage": float(np.mean([_coverage(codes[c], true[c]) for c in of_class])),
            "accuracy": float((world.classify(codes) == wanted).float().mean()),
        }

    values, arrays = {}, {"true": true[of_class[0]].numpy()}
    for name, prior in priors.items():
        for eps, steps in KNOWN_GRIDS.get(name, PRIOR_GRID) if grid else [KNOWN[name]]:
            sampler = PPGNSampler(G, ClassCondition(condition, wanted), prior, eps)
            found = sampler.sample(len(start), steps, start, torch.Generator().manual_seed(seed)).codes
            values[f"{name} {eps} {steps}" if grid else name] = measure(found)
            arrays[name] = found[of_class[0]].numpy()
    return {**values, "true": measure(world.codes(wanted, random))}, arrays


def _energy_distance(a: Tensor, b: Tensor) -> float:
    """``2 E|A - B| - E|A - A'| - E|B - B'|``, 0 for equal distributions."""
    return float(2 * torch.cdist(a, b).mean()) - _spread(a) - _spread(b)


# ---------------------------------------------------------------------------------------------------------------------
# Garments

CLASSES, CODE, SIDE = 10, 64, 28
Image = Tensor


class Classifier(nn.Module):
    """Convolutions E1, a layer of codes E2, and logits."""

    def __init__(self, *convolutions: nn.Module, code: int = CODE, classes: int = CLASSES) -> None:
        super().__init__()
        self.E1 = nn.Sequential(*convolutions)
        width = self.E1(torch.zeros(1, 1, SIDE, SIDE)).flatten(1).shape[1]
        self.E2 = nn.Sequential(nn.Flatten(), nn.Linear(width, code), nn.ReLU())
        self.head = nn.Linear(code, classes)

    def forward(self, x: Image) -> Tensor:
        """Logits."""
        return self.head(self.E2(self.E1(x)))


def _narrow() -> list[nn.Module]:
    return [nn.Conv2d(1, 32, 4, stride=4), nn.ReLU()]


def _middle() -> list[nn.Module]:
    return [*_narrow(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]


def _wide() -> list[nn.Module]:
    return [nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()]


class Garments:
    """Images of a seed, an encoder, and a judge that no sampler sees.

    Attributes
    ----------
    x, y : (10000, 1, 28, 28), (10000,)
        Training images of encoder, condition and generator.
    test, test_y
        5,000 test images, the real ones.
    encoder : Module
        E, the layers of a classifier up to its code.
    """

    def __init__(self, seed: int, scale: str) -> None:
        self.seed, self.smoke = seed, scale == "smoke"
        n, held_out = (600, 400) if self.smoke else (10_000, 5000)
        self.random = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        images, labels = self._draw("train", 2 * n)
        (self.x, other), (self.y, other_y) = images.split(n), labels.split(n)
        self.test, self.test_y = self._draw("test", held_out)
        self.judge = self.classifier(Classifier(*_wide(), code=48), other, other_y, 3)
        network = self.classifier(Classifier(*_narrow()), self.x, self.y, 2)
        self.E1, self.E2 = network.E1, network.E2
        self.encoder = nn.Sequential(self.E1, self.E2)
        with torch.no_grad():
            h1 = self.E1(self.x)
            self.codes = self.E2(h1)
            self.features = self.judge.E2(self.judge.E1(self.test))
        self.weights = (1 / _variance(self.x), 1 / _variance(h1), 0.5 / _variance(self.codes), 0.02)

    def _draw(self, part: Literal["train", "test"], n: int) -> tuple[Image, Tensor]:
        images, labels = fashion_mnist(part)
        chosen = torch.randperm(len(images), generator=self.random)[:n].numpy()
        x = torch.from_numpy(images[chosen, None] / np.float32(255))
        return x, torch.from_numpy(labels[chosen].astype(np.int64))

    def classifier(self, model: Any, x: Image, y: Tensor, epochs: int) -> Any:
        """Train a classifier on images."""
        return _descend(model, lambda i: F.cross_entropy(model(x[i]), y[i]), len(x), epochs, self.random)

    def generator(self, noise: float = 0.0) -> FeatureGenerator:
        """Train G with the weights of the losses set to their scales at the mean image."""
        torch.manual_seed(self.seed)
        G = FeatureGenerator(CODE, (128,), (8, 14, 14), (1,), (), crop=None, output="sigmoid")
        D = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
        options: dict[str, Any] = {
            "weights": self.weights,
            "noise": noise,
            "lr": 2e-3,
            "epochs": 1 if self.smoke else 3,
        }
        fit_generator(self.x, G, self.E1, self.E2, D, seed=self.seed, **options)
        return G

    @torch.no_grad()
    def judged(self, images: Image) -> tuple[Tensor, Tensor]:
        """Features and classes that the judge gives images."""
        features = self.judge.E2(self.judge.E1(images))
        return features, self.judge.head(features).argmax(1)

    def measure(self, images: Image, wanted: Tensor) -> dict[str, float]:
        """Frechet distance in features of the judge over their variance; diversity and coverage within the classes."""
        features, seen = self.judged(images)
        pairs = [(features[wanted == c], self.features[self.test_y == c][:50]) for c in wanted.unique()]
        return {
            "distance": frechet_distance(features, self.features) / _variance(self.features),
            "diversity": float(np.mean([_spread(found) / _spread(real) for found, real in pairs])),
            "coverage": float(np.mean([_coverage(found, real) for found, real in pairs])),
            "accuracy": float((seen == wanted).float().mean()),
        }


def _variance(x: Tensor) -> float:
    return float(x.flatten(1).var(0).sum())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared distance of means, plus ``tr(A + B - 2 (A B)^(1/2))`` of the covariances of rows (n, d)."""
    A, B = torch.cov(a.T.double()), torch.cov(b.T.double())
    root = torch.linalg.eigvals(A @ B).real.clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).double().square().sum() + A.trace() + B.trace() - 2 * root)


VARIANTS: dict[str, Setting] = {
    "ppgn_x": ((1.0, 0.05, 0.0), 80),
    "dgn_am": ((0.0, 10.0, 0.0), 40),
    "dgn_am_noise": ((0.0, 10.0, 0.1), 80),
    "dgn_am_codes": ((0.0, 3.0, 0.0), 80),
    "gaussian": ((0.3, 5.0, 1.0), 80),
    "ppgn_h": ((0.3, 5.0, 1.0), 80),
    "joint": ((0.3, 5.0, 1.0), 80),
    "noiseless": ((0.3, 5.0, 1.0), 80),
}
VARIANT_GRIDS = {
    "ppgn_x": PIXEL_GRID,
    "dgn_am": _plain_grid(1.0, 3.0, 10.0, 30.0),
    "dgn_am_noise": _noise_grid(1.0, 3.0, 10.0, 30.0),
    "dgn_am_codes": _plain_grid(0.3, 1.0, 3.0, 10.0),
}
CURVE = (0.1, 1.0)


def run_variants(seed: int, scale: str, grid: bool = False) -> tuple[Values, Arrays]:
    """Sample every class with every variant, 15 chains each, and draw the codes of real images."""
    garments = Garments(seed, scale)
    smoke = garments.smoke
    G, noisy = garments.generator(), garments.generator(0.1)
    condition = garments.classifier(Classifier(*_middle()), garments.x, garments.y, 2)
    sigma, epochs = SIGMA * float(garments.codes.std()), 1 if smoke else 12
    options: dict[str, Any] = {"seed": seed, "epochs": epochs, "batch_size": 128, "lr": 2e-3}
    parts: dict[str, tuple[nn.Module | None, LatentPrior]] = {
        "ppgn_x": (
            None,
            DAEPrior(fit_latent_dae(garments.x, 0.3, (256, 64, 256), **options | {"epochs": epochs // 2})),
        ),
        "dgn_am": (G, ZeroPrior()),
        "dgn_am_noise": (G, ZeroPrior()),
        "dgn_am_codes": (G, ZeroPrior()),
        "gaussian": (G, DAEPrior(_linear_autoencoder(garments.codes, sigma))),
        "ppgn_h": (G, DAEPrior(fit_latent_dae(garments.codes, sigma, HIDDEN, **options))),
        "joint": (noisy, JointPrior(noisy, garments.encoder)),
        "noiseless": (G, JointPrior(G, garments.encoder)),
    }
    chains = 6 if smoke else 15
    wanted = torch.arange(CLASSES).repeat_interleave(chains)
    real = torch.cat([(garments.y == c).nonzero()[:chains, 0] for c in range(CLASSES)])
    others = torch.randperm(len(garments.x), generator=garments.random)[: len(wanted)]
    values, arrays = {}, {}

    def sample(name: str, arm: str, eps: Eps, steps: int) -> None:
        generator, prior = parts[name]
        shape, clip = ((1, SIDE, SIDE), (0.0, 1.0)) if generator is None else ((CODE,), (0.0, 30.0))
        sampler = PPGNSampler(generator, ClassCondition(condition, wanted), prior, eps, clip=clip, shape=shape)
        start = garments.codes[others] if name == "dgn_am_codes" else None
        found = sampler.sample(len(wanted), 10 if smoke else steps, start, torch.Generator().manual_seed(seed))
        values[arm] = garments.measure(found.images, wanted)
        arrays[arm] = _bytes(found.images[::chains])

    for name in parts:
        for eps, steps in VARIANT_GRIDS.get(name, PRIOR_GRID) if grid else [VARIANTS[name]]:
            sample(name, f"{name} {eps} {steps}" if grid else name, eps, steps)
    for e1 in () if grid else CURVE:
        sample("noiseless", f"noiseless_{e1}", (e1, *VARIANTS["noiseless"][0][1:]), VARIANTS["noiseless"][1])
    with torch.no_grad():
        decoded = G(garments.codes[real])
    for arm, images in (("decoded", decoded), ("real", garments.x[real])):
        values[arm] = garments.measure(images, wanted)
        arrays[arm] = _bytes(images[::chains])
    return values, arrays


def _bytes(images: Image) -> np.ndarray:
    return (255 * images.clamp(0, 1)).byte().squeeze(1).numpy()


GROUPS = ((0, 2, 4, 6), (1,), (3,), (5, 7, 9), (8,))  # tops, trousers, dresses, shoes, bags
GROUP_OF = torch.tensor([0, 1, 0, 2, 0, 3, 0, 3, 4, 3])
WORDS, CHANNELS, PAIRS = 1 + CLASSES, 8, 12


class Captioner(nn.Module):
    """Names two garments side by side, from left to right: convolutions give the first state of a GRU over words."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Sequential(*_narrow(), nn.Flatten(), nn.Linear(32 * 7 * 14, 64), nn.Tanh())
        self.words, self.speak, self.choose = (
            nn.Embedding(WORDS, 16),
            nn.GRU(16, 64, batch_first=True),
            nn.Linear(64, WORDS),
        )

    def forward(self, x: Image, previous: Tensor) -> Tensor:
        """Logits (N, T, words) of the words after the `previous` ones."""
        return self.choose(self.speak(self.words(previous), self.look(x).unsqueeze(0))[0])


class SideBySide(nn.Module):
    """Apply a network to the two halves of codes or of images, and join what comes out."""

    def __init__(self, network: nn.Module, split: int) -> None:
        super().__init__()
        self.network, self.split = network, split

    def forward(self, x: Tensor) -> Tensor:
        """Both halves in one batch."""
        halves = self.network(torch.cat(x.chunk(2, self.split)))
        return torch.cat(halves.chunk(2), 3 if halves.ndim == 4 else 1)


def _captioner(garments: Garments) -> Captioner:
    """Train on pairs of training images; 0 begins and ends a sentence, garment c is word c + 1."""
    model = Captioner()
    n = len(garments.x)

    def loss(chosen: Tensor) -> Tensor:
        right = torch.randint(n, chosen.shape, generator=garments.random)
        x = torch.cat([garments.x[chosen], garments.x[right]], 3)
        words = torch.stack([garments.y[chosen] + 1, garments.y[right] + 1, torch.zeros_like(right)], 1)
        return F.cross_entropy(model(x, words.roll(1, 1)).transpose(1, 2), words)

    _descend(model, loss, n, 2, garments.random)
    return model


def run_conditions(seed: int, scale: str) -> tuple[Values, Arrays]:
    """Sample with one generator for groups of classes, for hidden channels and for captions, and without condition."""
    garments = Garments(seed, scale)
    smoke = garments.smoke
    G, E = garments.generator(), garments.encoder
    (e1, e2, e3), steps = VARIANTS["noiseless"]
    values, arrays = {}, {}

    def sample(condition: Condition, n: int, free: bool, pair: bool = False) -> Image:
        draw, encode = (SideBySide(G, 1), SideBySide(E, 3)) if pair else (G, E)
        shape = (2 * CODE,) if pair else (CODE,)
        eps = (e1, 0.0 if free else e2, e3)
        sampler = noiseless_joint_ppgn_h(draw, encode, condition, eps, shape=shape)
        return sampler.sample(n, 10 if smoke else steps, generator=torch.Generator().manual_seed(seed)).images

    merged = garments.classifier(Classifier(*_middle(), classes=len(GROUPS)), garments.x, GROUP_OF[garments.y], 2)
    groups = torch.arange(len(GROUPS)).repeat_interleave(4 if smoke else 25)
    network = garments.classifier(Classifier(*_middle()), garments.x, garments.y, 2)
    with torch.no_grad():
        excited = network.E1[:3](garments.test)[:, :, 3, 3].softmax(1)
    chosen = excited.var(0).topk(CHANNELS).indices
    channels = chosen.repeat_interleave(4 if smoke else 20)
    tops = [_histogram(garments.test_y[excited[:, c].topk(100).indices]) for c in chosen]
    captioner = _captioner(garments)
    pairs = torch.stack([torch.randperm(CLASSES, generator=garments.random)[:2] for _ in range(PAIRS)])
    sentences = F.pad(pairs + 1, (0, 1)).repeat_interleave(2 if smoke else 10, 0)
    for suffix, free in (("", False), ("_free", True)):
        images = sample(ClassCondition(merged, groups), len(groups), free)
        seen = GROUP_OF[garments.judged(images)[1]]
        values[f"merged{suffix}"] = {"right": float((seen == groups).float().mean())}
        arrays[f"merged{suffix}"] = _bytes(images[:: len(groups) // len(GROUPS)])
        images = sample(NeuronCondition(network, "E1.2", channels, (3, 3)), len(channels), free)
        found = garments.judged(images)[1].chunk(CHANNELS)
        match = [float(torch.minimum(_histogram(c), top).sum()) for c, top in zip(found, tops, strict=True)]
        values[f"channel{suffix}"] = {"right": float(np.mean(match))}
        arrays[f"channel{suffix}"] = _bytes(images[:: len(channels) // CHANNELS])
        images = sample(CaptionCondition(captioner, sentences), len(sentences), free, pair=True)
        seen = torch.stack([garments.judged(half.contiguous())[1] for half in images.chunk(2, 3)], 1)
        values[f"caption{suffix}"] = {"right": float((seen == sentences[:, :2] - 1).all(1).float().mean())}
        arrays[f"caption{suffix}"] = _bytes(images[:: len(sentences) // PAIRS])
    return values, {**arrays, "pairs": pairs.numpy()}


def _histogram(classes: Tensor) -> Tensor:
    return torch.bincount(classes, minlength=CLASSES) / len(classes)


FACETED, SET = (0, 3), 40  # neurons of tops and of shoes
FACETS = {"dgn_am": ((0.0, 10.0, 0.0), 80), "noiseless": ((0.3, 5.0, 1.0), 80)}
FACET_GRIDS = {"dgn_am": VARIANT_GRIDS["dgn_am"], "noiseless": PRIOR_GRID}
MFVSetting = tuple[int, float, float]
MFV: MFVSetting = (10, 0.02, 1.0)
MFV_GRID: list[MFVSetting] = [(steps, lr, tv) for steps in (10, 40) for lr in (0.02, 0.1) for tv in (1.0, 10.0)]


def run_facets(seed: int, scale: str, grid: bool = False) -> tuple[Values, Arrays]:
    """Show 40 images of a neuron that stands for several garments: from mean images of clusters, or from chains."""
    from sklearn.cluster import KMeans

    garments = Garments(seed, scale)
    smoke = garments.smoke
    G, n = garments.generator(), 6 if smoke else SET
    merged = garments.classifier(Classifier(*_middle(), classes=len(GROUPS)), garments.x, GROUP_OF[garments.y], 2)
    found: dict[str, list[Image]] = {}
    for group in FACETED:
        neuron = NeuronCondition(merged, "head", group)
        inside = GROUP_OF[garments.y] == group
        images, codes = garments.x[inside], garments.codes[inside]
        centres = torch.from_numpy(KMeans(n, n_init=1, random_state=seed).fit(codes.numpy()).cluster_centers_)
        starts = images[torch.cdist(centres, codes).topk(15, largest=False).indices].mean(1)
        found.setdefault("mean_images", []).append(starts)
        for steps, lr, tv in MFV_GRID if grid else [MFV]:
            objective = partial(_smooth_logit, merged, group, tv)
            ascended = ascend(gradient_of(objective), starts, steps, lr=lr, project=lambda x, _: x.clamp(0, 1))
            found.setdefault(f"mfv {steps} {lr} {tv}" if grid else "mfv", []).append(ascended)
        for arm, prior in (("dgn_am", ZeroPrior()), ("noiseless", JointPrior(G, garments.encoder))):
            for eps, steps in FACET_GRIDS[arm] if grid else [FACETS[arm]]:
                restart = 10 if smoke else steps
                sampler = PPGNSampler(G, neuron, prior, eps, clip=(0.0, 30.0))
                kept = sample_neuron(
                    sampler,
                    neuron,
                    n // 2,
                    steps=3 * restart,
                    reset_every=restart,
                    redraw=(0.5 * eps[0], 2 * eps[0]),
                    keep=0.0 if smoke else 0.9,
                    every=restart,
                    generator=torch.Generator().manual_seed(seed),
                )
                ended = kept.images[kept.step > 0]
                chosen = torch.randperm(len(ended), generator=torch.Generator().manual_seed(seed))[:n]
                found.setdefault(f"{arm} {eps} {steps}" if grid else arm, []).append(ended[chosen])
    values = {arm: _facets(garments, sets) for arm, sets in found.items()}
    real = [garments.x[GROUP_OF[garments.y] == group][:n] for group in FACETED]
    arrays = {arm: np.stack([_bytes(images[:6]) for images in sets]) for arm, sets in found.items()}
    return {**values, "real": _facets(garments, real)}, arrays


def _smooth_logit(model: nn.Module, index: int, tv: float, x: Image) -> Tensor:
    return model(x)[:, index] - tv * total_variation(x)


def _facets(garments: Garments, sets: list[Image]) -> dict[str, float]:
    """Mean over neurons of what sets have in common with test images of the same garments."""
    rows = []
    for group, images in zip(FACETED, sets, strict=True):
        features, seen = garments.judged(images)
        real = garments.features[GROUP_OF[garments.test_y] == group]
        share = _histogram(seen)[list(GROUPS[group])]
        entropy = -(share * share.clamp_min(1e-9).log()).sum() / np.log(len(share))
        rows.append(
            {
                "distance": frechet_distance(features, real) / _variance(real),
                "diversity": _spread(features) / _spread(real[:500]),
                "coverage": _coverage(features, real[:100]),
                "accuracy": float(share.sum()),
                "evenness": float(entropy),
                "size": float(len(images)),
            }
        )
    return {metric: float(np.mean([row[metric] for row in rows])) for metric in rows[0]}


HOLE = 10
HoleSetting = tuple[float, float, float]  # e1, e2, eps4
HOLES: dict[str, HoleSetting] = {"dgn_am": (0.0, 0.3, 0.3), "noiseless": (0.1, 1.0, 0.3)}
HOLE_GRIDS: dict[str, list[HoleSetting]] = {
    "dgn_am": [(0.0, e2, eps4) for e2 in (0.3, 1.0) for eps4 in (0.03, 0.1, 0.3, 1.0)],
    "noiseless": [(e1, 1.0, eps4) for e1 in (0.1, 0.3) for eps4 in (0.03, 0.1, 0.3, 1.0)],
}


def run_inpainting(seed: int, scale: str, grid: bool = False) -> tuple[Values, Arrays]:
    """Fill 10 x 10 pixels of test images whose class is known."""
    garments = Garments(seed, scale)
    G, E = garments.generator(), garments.encoder
    condition = garments.classifier(Classifier(*_middle()), garments.x, garments.y, 2)
    n = 20 if garments.smoke else 200
    x, y = garments.test[:n], garments.test_y[:n]
    corner = torch.randint(2, SIDE - HOLE - 1, (n, 2, 1), generator=garments.random)
    inside = (torch.arange(SIDE) >= corner) & (torch.arange(SIDE) < corner + HOLE)
    mask = (inside[:, 0].unsqueeze(2) & inside[:, 1].unsqueeze(1)).unsqueeze(1)
    holed = x.masked_fill(mask, 0)
    with torch.no_grad():
        drawn = G(E(holed))
    filled = {
        "mean_fill": torch.where(mask, garments.x.mean(0), x),
        "decoded": torch.where(mask, drawn, x),
    }
    priors: dict[str, LatentPrior] = {"dgn_am": ZeroPrior(), "noiseless": JointPrior(G, E)}
    settings = [(arm, s) for arm in priors for s in (HOLE_GRIDS[arm] if grid else [HOLES[arm]])]
    settings += [] if grid else [("no_class", (HOLES["noiseless"][0], 0.0, HOLES["noiseless"][2]))]
    with torch.no_grad():
        start = E(holed)
    for arm, (e1, e2, eps4) in settings:
        prior = priors.get(arm, priors["noiseless"])
        sampler = PPGNSampler(G, ClassCondition(condition, y), prior, (e1, e2, 0.0), eps4=eps4, clip=(0.0, 30.0))
        name = f"{arm} {e1} {e2} {eps4}" if grid else arm
        filled[name] = sampler.inpaint(holed, mask, 5 if garments.smoke else 40, start).images
    values, arrays = {}, {"image": _bytes(x[:8]), "hole": _bytes(torch.where(mask, 0.5, x)[:8])}
    for arm, images in filled.items():
        seen = garments.judged(images)[1]
        values[arm] = {
            "mse": float((images - x)[mask].square().mean()),
            "accuracy": float((seen == y).float().mean()),
        }
        arrays[arm] = _bytes(images[:8])
    return values, arrays


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def _strip(axes: Any, cells: Cells, arms: Sequence[str], metric: str, label: str) -> None:
    """One point per seed and arm, and means with 95 % intervals."""
    from classact.evidence.statistics import t_interval

    for place, arm in enumerate(arms):
        found = cells.metric(arm, metric)
        axes.scatter(np.full(len(found), place), found, s=10, color="C0", alpha=0.5, linewidth=0)
        interval = t_interval(found)
        ends = [[interval.effect - interval.low], [interval.high - interval.effect]]
        axes.errorbar(place, interval.effect, ends, color="black", marker="o", markersize=4, capsize=4)
    axes.set_xticks(range(len(arms)), [arm.replace("_", " ") for arm in arms], rotation=40, ha="right", fontsize=8)
    axes.set_ylabel(label, fontsize=9)
    found = np.concatenate([cells.metric(arm, metric) for arm in arms])
    axes.set_ylim(min(0, 1.1 * found.min()), 1.1 * found.max())
    axes.spines[["top", "right"]].set_visible(False)


def _row(axes: Any, images: np.ndarray, label: str) -> None:
    """Images side by side, in 12 shades: the file stays small."""
    shades = np.round(np.concatenate(list(images), 1) / 255 * 11)
    axes.imshow(shades, cmap="gray_r", vmin=0, vmax=11, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_ylabel(label.replace("_", " "), rotation=0, ha="right", va="center", fontsize=8)


def draw_known(cells: Cells) -> "Figure":
    """Distance, coverage and accuracy of every prior, and one class of codes seen along its two main axes."""
    from matplotlib.figure import Figure

    figure: Any = Figure((12, 6.2), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    arms = [arm for arm in cells.arms if arm != "true"]
    labels = {
        "distance": "energy distance to true codes",
        "coverage": "true codes covered",
        "accuracy": "accuracy (Bayes)",
    }
    for axes, (metric, label) in zip(upper.subplots(1, 3), labels.items(), strict=True):
        _strip(axes, cells, arms, metric, label)
    arrays = next(iter(cells.arrays.values()))
    true = arrays["true"]
    plane = np.linalg.svd(true - true.mean(0), full_matrices=False)[2][:2].T
    shown = ("dgn_am", "dgn_am_noise", "gaussian", "ppgn_h", "noiseless")
    for axes, arm in zip(lower.subplots(1, len(shown), sharex=True, sharey=True), shown, strict=True):
        for codes, style in ((true, {"color": "0.75"}), (arrays[arm], {"color": "C3"})):
            axes.scatter(*((codes - true.mean(0)) @ plane).T, s=8, linewidth=0, **style)
        axes.set_title(arm.replace("_", " "), fontsize=9)
        axes.set(xticks=[], yticks=[])
    lower.supxlabel("a class in the plane of its codes: true (grey) and sampled (red)", fontsize=9)
    return figure


def draw_variants(cells: Cells) -> "Figure":
    """One image per class and variant, the measures of all seeds, and how e1 trades accuracy for diversity."""
    from matplotlib.figure import Figure

    figure: Any = Figure((11, 7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.35))
    arms = [arm for arm in cells.arms if not arm.startswith("noiseless_")]
    arrays = next(iter(cells.arrays.values()))
    for axes, arm in zip(left.subplots(len(arms), 1), arms, strict=True):
        _row(axes, arrays[arm], arm)
    (distance, coverage), (accuracy, trade) = right.subplots(2, 2)
    _strip(distance, cells, arms, "distance", "Frechet distance / variance")
    _strip(coverage, cells, arms, "coverage", "real images covered")
    _strip(accuracy, cells, arms, "accuracy", "accuracy (judge)")
    curve = {VARIANTS["noiseless"][0][0]: "noiseless", **{e1: f"noiseless_{e1}" for e1 in CURVE}}
    points = np.array([[cells.metric(curve[e1], m).mean() for m in ("diversity", "accuracy")] for e1 in sorted(curve)])
    trade.plot(*points.T, marker="o", color="C0")
    for e1, point in zip(sorted(curve), points, strict=True):
        trade.annotate(f"e1 = {e1}", point, xytext=(6, 4), textcoords="offset points", fontsize=8)
    for arm, color in (("dgn_am", "C3"), ("ppgn_h", "C2"), ("real", "0.4")):
        point = [cells.metric(arm, m).mean() for m in ("diversity", "accuracy")]
        trade.scatter(*point, color=color, zorder=3)
        trade.annotate(
            arm.replace("_", " "), point, xytext=(5, -10), textcoords="offset points", fontsize=8, color=color
        )
    trade.set(xlabel="diversity within a class / real", ylabel="accuracy (judge)", title="noiseless joint PPGN-h")
    trade.title.set_fontsize(9)
    trade.margins(0.25)
    trade.spines[["top", "right"]].set_visible(False)
    return figure


def draw_conditions(cells: Cells) -> "Figure":
    """Images for each kind of condition, and how often the judge finds what was asked for."""
    from matplotlib.figure import Figure

    figure: Any = Figure((10.5, 3.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.9, 1))
    arrays = next(iter(cells.arrays.values()))
    rows = left.subplots(6, 1)
    for axes, name in zip(rows, cells.arms, strict=True):
        width = {"merged": len(GROUPS), "channel": CHANNELS, "caption": 5}[name.removesuffix("_free")]
        images = arrays[name][:width]
        _row(axes, np.pad(images, ((0, 0), (0, 0), (0, 6)), constant_values=0), name.replace("_free", " (none)"))
    garments = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
    said = ["tops", "trouser", "dress", "shoes", "bag"]
    names = {0: said, 2: [f"{garments[a]}, {garments[b]}" for a, b in arrays["pairs"][:5]]}
    for row, words in names.items():
        width = SIDE + 6 if row == 0 else 2 * SIDE + 6
        rows[row].set_xticks([width * k + (width - 6) / 2 for k in range(len(words))], words, fontsize=7)
        rows[row].xaxis.tick_top()
        rows[row].tick_params(length=0)
    axes = right.subplots()
    _strip(axes, cells, cells.arms, "right", "garments as asked for (judge)")
    axes.set_ylim(0, 1.03)
    return figure


def draw_facets(cells: Cells) -> "Figure":
    """Images of the two neurons, and how sets compare with real images of the same garments."""
    from matplotlib.figure import Figure

    figure: Any = Figure((11.5, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    arrays = next(iter(cells.arrays.values()))
    arms = [arm for arm in cells.arms if arm in arrays]
    for axes, arm in zip(left.subplots(len(arms), 1), arms, strict=True):
        _row(axes, np.concatenate(list(arrays[arm])), arm)
    left.supxlabel("neuron of tops (left six), neuron of shoes (right six)", fontsize=9)
    labels = {
        "distance": "Frechet distance",
        "coverage": "real images covered",
        "evenness": "evenness of garments",
        "diversity": "diversity / real",
    }
    for axes, (metric, label) in zip(right.subplots(2, 2).flat, labels.items(), strict=True):
        _strip(axes, cells, cells.arms, metric, label)
    return figure


def draw_inpainting(cells: Cells) -> "Figure":
    """Eight images with a hole, what fills it, and the error in it."""
    from matplotlib.figure import Figure

    figure: Any = Figure((10.5, 4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    arrays = next(iter(cells.arrays.values()))
    shown = ["image", "hole", *cells.arms]
    for axes, arm in zip(left.subplots(len(shown), 1), shown, strict=True):
        _row(axes, arrays[arm], arm)
    error, accuracy = right.subplots(1, 2)
    _strip(error, cells, cells.arms, "mse", "squared error in the hole")
    _strip(accuracy, cells, cells.arms, "accuracy", "accuracy (judge)")
    return figure


EXPERIMENTS = {
    "known-codes": Experiment(run_known, {"smoke": range(2), "cpu": range(100, 110)}, draw_known),
    "garment-variants": Experiment(run_variants, {"smoke": range(2), "cpu": range(100, 106)}, draw_variants),
    "garment-conditions": Experiment(run_conditions, {"smoke": range(2), "cpu": range(100, 110)}, draw_conditions),
    "garment-facets": Experiment(run_facets, {"smoke": range(2), "cpu": range(100, 110)}, draw_facets),
    "garment-holes": Experiment(run_inpainting, {"smoke": range(2), "cpu": range(100, 110)}, draw_inpainting),
}
