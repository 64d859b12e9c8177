"""Training what PPGN samples with: the generator G, and autoencoders of codes or images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from classact.explain.frozen import frozen
from classact.explain.ppgn.networks import LatentDAE
from classact.explain.ppgn.sampler import EPS, Condition, DAEPrior, Eps, JointPrior, LatentPrior, PPGNSampler, ZeroPrior
from classact.training import History, fit, pl

Variant = Literal["ppgn-x", "dgn-am", "ppgn-h", "joint-ppgn-h", "noiseless-joint-ppgn-h"]


class PPGNGeneratorModule(pl.LightningModule):
    """Trains G to invert a fixed encoder ``E = E2 o E1``, against a discriminator (section 3.4).

    From an image x with h1 = E1(x) and h = E2(h1), G draws x' = G(h), and minimises
    ``w_img ||x' - x||^2 + w_h1 ||E1(x') - h1||^2 + w_h ||E(x') - h||^2 - w_adv log D(x')``, norms over the values of a
    sample, the mean over the batch. D learns by ``-log D(x) - log(1 - D(x'))``, and pauses while that is less than
    `pause` times ``-log D(x')``. Losses, weights and pause are those of Dosovitskiy & Brox 2016.

    Parameters
    ----------
    G : Module
        Codes to images.
    E1, E2 : Module
        Images to h1, and h1 to h; kept in evaluation mode and not trained.
    D : Module, optional
        Images to one logit, (N, 1) or (N,); needed if the adversarial weight is not 0.
    weights : (float, float, float, float)
        w_img, w_h1, w_h, w_adv. The defaults are those of Dosovitskiy & Brox for pixels of 0 to 255.
    noise : float
        0 for the noiseless variant. Else Gaussian noise is added to x, to h1 and to h on the way to the code, of
        standard deviation `noise` times the mean absolute value of each in the batch; targets stay clean.
    lr : float
        Of Adam, with betas (0.9, 0.999), for G and for D.
    pause : float
        See above; 0 never pauses.
    """

    def __init__(
        self,
        G: nn.Module,
        E1: nn.Module,
        E2: nn.Module,
        D: nn.Module | None = None,
        weights: Sequence[float] = (2e-6, 1e-2, 1e-2, 100.0),
        noise: float = 0.0,
        *,
        lr: float = 2e-4,
        pause: float = 0.1,
    ) -> None:
        super().__init__()
        if len(weights) != 4 or min(weights) < 0:
            raise ValueError(f"weights: expected four numbers of at least 0, got {tuple(weights)}")
        if D is None and weights[3] > 0:
            raise ValueError("D: the adversarial loss needs a discriminator; give one, or a last weight of 0")
        if noise < 0:
            raise ValueError(f"noise: expected at least 0, got {noise}")
        self.automatic_optimization = False
        self.G, self.E1, self.E2, self.D = G, E1, E2, D
        self.weights, self.noise, self.lr, self.pause = tuple(weights), noise, lr, pause

    def train(self, mode: bool = True) -> "PPGNGeneratorModule":
        """Set the mode of G and D; the encoder stays in evaluation mode."""
        super().train(mode)
        self.E1.eval()
        self.E2.eval()
        return self

    def configure_optimizers(self) -> Any:
        """One Adam for G, and one for D."""
        return [
            torch.optim.Adam(network.parameters(), lr=self.lr, betas=(0.9, 0.999), fused=True)
            for network in (self.G, self.D)
            if network is not None
        ]

    def code(self, x: Float[Tensor, "n c *spatial"]) -> Float[Tensor, "n *code"]:
        """Code from which G draws x, with noise on x, h1 and h."""
        return self._noisy(self.E2(self._noisy(self.E1(self._noisy(x)))))

    def _noisy(self, value: Tensor) -> Tensor:
        return value + self.noise * value.abs().mean() * torch.randn_like(value) if self.noise else value

    def generator_loss(self, x: Float[Tensor, "n c *spatial"]) -> tuple[Float[Tensor, ""], dict[str, Tensor], Tensor]:
        """Loss of G on images, its four terms before weighting, and what G drew."""
        with torch.no_grad():
            h1 = self.E1(x)
            h = self.E2(h1)
            code = self.code(x) if self.noise else h
        drawn = self.G(code)
        if drawn.shape != x.shape:
            raise ValueError(f"G: expected images {tuple(x.shape)}, it draws {tuple(drawn.shape)}")
        drawn_h1 = self.E1(drawn)
        pairs = ((drawn, x), (drawn_h1, h1), (self.E2(drawn_h1), h))
        terms = {
            name: (ours - wanted).square().flatten(1).sum(1).mean()
            for name, (ours, wanted) in zip(("img", "h1", "h"), pairs, strict=True)
        }
        if self.D is not None:
            terms["adv"] = F.softplus(-self.D(drawn)).mean()
        loss = sum((w * term for w, term in zip(self.weights, terms.values(), strict=False)), x.new_zeros(()))
        return loss, terms, drawn

    def training_step(self, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001, ARG002, RUF100
        """Step of G, then, unless it pauses, of D."""
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        optimizers = self.optimizers()
        of_G, of_D = optimizers if isinstance(optimizers, list) else (optimizers, None)
        self.toggle_optimizer(of_G)
        loss, terms, drawn = self.generator_loss(x)
        of_G.zero_grad()
        self.manual_backward(loss)
        of_G.step()
        self.untoggle_optimizer(of_G)
        if of_D is not None and self.D is not None:
            self.toggle_optimizer(of_D)
            terms["D"] = (F.softplus(-self.D(x)) + F.softplus(self.D(drawn.detach()))).mean()
            if terms["D"].detach() >= self.pause * terms["adv"].detach():
                of_D.zero_grad()
                self.manual_backward(terms["D"])
                of_D.step()
            self.untoggle_optimizer(of_D)
        self.log_dict({"train_loss": loss.detach(), **terms}, on_step=False, on_epoch=True, batch_size=len(x))


def fit_generator(
    images: Any,
    G: nn.Module,
    E1: nn.Module,
    E2: nn.Module,
    D: nn.Module | None = None,
    *,
    seed: int,
    device: str = "cpu",
    epochs: int = 50,
    batch_size: int = 64,
    **options: Any,
) -> History:
    """Train G in place, and D; E1 and E2 are left as they were. G and D end in evaluation mode.

    Parameters
    ----------
    images : (n, C, H, W) or Dataset
        Images, or a data set of images or of tuples that begin with one.
    G, E1, E2, D, **options
        Of [`PPGNGeneratorModule`][classact.explain.PPGNGeneratorModule].
    seed, device, epochs
        Of [`fit`][classact.training.fit].
    batch_size : int
        Images of a step.
    """
    shuffle = torch.Generator().manual_seed(seed)
    batches = DataLoader(images, batch_size=batch_size, shuffle=True, generator=shuffle, drop_last=True)
    with frozen(E1, E2):
        module = PPGNGeneratorModule(G, E1, E2, D, **options)
        history = fit(module, batches, epochs=epochs, seed=seed, device=device)
    G.eval()
    if D is not None:
        D.eval()
    return history


def fit_latent_dae(
    codes: Float[Tensor, "n *shape"],
    sigma: float,
    hidden: Sequence[int] = (2048, 1024, 500, 1024, 2048),
    *,
    seed: int,
    epochs: int = 25,
    batch_size: int = 64,
    lr: float = 1e-3,
) -> LatentDAE:
    """Train an autoencoder to remove Gaussian noise of standard deviation `sigma` from codes, or from images.

    Adam, with a learning rate that falls to 0 along half a cosine. The device is that of the codes.

    Parameters
    ----------
    codes : (n, ...)
        States.
    sigma : float
        Positive.
    hidden : sequence of int
        Of [`LatentDAE`][classact.explain.LatentDAE].
    seed : int
        Of the first weights, the order and the noise.
    epochs, batch_size, lr
        Of the training.

    Returns
    -------
    LatentDAE
        In evaluation mode.

    Examples
    --------
    Of standard normal codes, the best guess is ``s / (1 + sigma^2)``.

    >>> codes = torch.randn(4096, 2, generator=torch.Generator().manual_seed(0))
    >>> R = fit_latent_dae(codes, sigma=0.5, hidden=(), seed=0, epochs=20, lr=1e-2)
    >>> R.layers[0].weight.detach().round(decimals=1).abs()
    tensor([[0.8000, 0.0000],
            [0.0000, 0.8000]])
    """
    if not sigma > 0:
        raise ValueError(f"sigma: expected a positive number, got {sigma}")
    if codes.ndim < 2 or not len(codes) or not bool(torch.isfinite(codes).all()):
        raise ValueError(f"codes: expected finite codes (n, ...), got shape {tuple(codes.shape)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dae = LatentDAE(codes[0].numel(), hidden).to(codes.device)
    generator = torch.Generator(codes.device).manual_seed(seed)
    optimizer = torch.optim.Adam(dae.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(codes) // batch_size))
    for _ in range(epochs):
        for chosen in torch.randperm(len(codes), generator=generator, device=codes.device).split(batch_size):
            s = codes[chosen]
            noise = torch.randn(s.shape, generator=generator, device=s.device, dtype=s.dtype)
            optimizer.zero_grad()
            (dae(s + sigma * noise) - s).square().mean().backward()
            optimizer.step()
            schedule.step()
    return dae.eval()


@dataclass(frozen=True)
class FittedPPGN:
    """What a variant samples with.

    Attributes
    ----------
    variant : str
        Which.
    generator : Module or None
        G; None for PPGN-x.
    prior : LatentPrior
        The residual.
    shape : tuple of int
        Of a state.
    """

    variant: Variant
    generator: nn.Module | None
    prior: LatentPrior
    shape: tuple[int, ...]

    def sampler(self, condition: Condition, eps: Eps | None = None, **options: Any) -> PPGNSampler:
        """Sampler for a condition, with the e's of the paper unless others are given; codes are clipped to [0, 30]."""
        clip = None if self.generator is None else (0.0, 30.0)
        options = {"clip": clip, "shape": self.shape, **options}
        return PPGNSampler(self.generator, condition, self.prior, EPS[self.variant] if eps is None else eps, **options)


def fit_ppgn(
    images: Any,
    E1: nn.Module,
    E2: nn.Module,
    variant: Variant = "noiseless-joint-ppgn-h",
    *,
    seed: int,
    G: nn.Module | None = None,
    D: nn.Module | None = None,
    trained: bool = False,
    noise: float = 0.01,
    sigma: float = 0.3,
    hidden: Sequence[int] = (2048, 1024, 500, 1024, 2048),
    dae_epochs: int = 25,
    device: str = "cpu",
    **options: Any,
) -> FittedPPGN:
    """Train what a variant needs: the generator, and an autoencoder of codes (PPGN-h) or of images (PPGN-x).

    Parameters
    ----------
    images : (n, C, H, W) or Dataset
        As in [`fit_generator`][classact.explain.fit_generator].
    E1, E2 : Module
        The encoder; not used by PPGN-x.
    variant : str
        "ppgn-x", "dgn-am", "ppgn-h", "joint-ppgn-h" or "noiseless-joint-ppgn-h".
    seed : int
        Of all parts.
    G, D : Module
        Generator, trained in place, and discriminator; not used by PPGN-x.
    trained : bool
        G is trained already: DGN-AM, PPGN-h and the noiseless joint variant can share one.
    noise : float
        Of the generator's training in the joint variant; the others have none.
    sigma : float
        Noise of the autoencoder, in standard deviations of the values of all states.
    hidden, dae_epochs
        Of the autoencoder.
    device : str
        Where to train; the networks stay there.
    **options
        Of [`fit_generator`][classact.explain.fit_generator].
    """
    if variant not in EPS:
        raise ValueError(f"variant: expected one of {', '.join(EPS)}, got {variant!r}")
    if variant == "ppgn-x":
        x = torch.cat([batch.to(device) for batch in _images(images)])
        dae = fit_latent_dae(x, sigma * float(x.std()), hidden, seed=seed, epochs=dae_epochs)
        return FittedPPGN(variant, None, DAEPrior(dae), tuple(x.shape[1:]))
    if G is None:
        raise ValueError(f"G: {variant} needs a generator")
    if not trained:
        level = noise if variant == "joint-ppgn-h" else 0.0
        fit_generator(images, G, E1, E2, D, seed=seed, device=device, noise=level, **options)
    encoder = nn.Sequential(E1, E2).to(device)
    with frozen(encoder), torch.no_grad():
        codes = torch.cat([encoder(batch.to(device)) for batch in _images(images)])
    prior: LatentPrior = ZeroPrior() if variant == "dgn-am" else JointPrior(G.to(device), encoder)
    if variant == "ppgn-h":
        prior = DAEPrior(fit_latent_dae(codes, sigma * float(codes.std()), hidden, seed=seed, epochs=dae_epochs))
    return FittedPPGN(variant, G, prior, tuple(codes.shape[1:]))


def _images(images: Any) -> Iterator[Tensor]:
    for batch in DataLoader(images, batch_size=256):
        yield batch[0] if isinstance(batch, (tuple, list)) else batch
