"""PPGN: images for a class, a neuron or a caption, by noisy gradient ascent on the code of a generator.

Nguyen, Clune, Bengio, Dosovitskiy, Yosinski: Plug & Play Generative Networks: Conditional Iterative Generation of
Images in Latent Space, CVPR 2017, https://arxiv.org/abs/1612.00005. Code of the authors (sampling with the noiseless
joint variant, in Caffe): Evolving-AI-Lab/ppgn.

A state s, an image or the code h of a generator G, takes steps

    ``s <- s + e1 R(s) + e2 d log p(y | G(s)) / ds + N(0, e3^2)``                                            (eq. 11)

where the residual R of an autoencoder stands for the gradient of log p(s), and the condition p(y | x) is any network
on images: it is replaced without training anything again. Activation maximisation and its successors are this sampler
with terms left out:

| variant | state | R(s) | (e1, e2, e3) |
| --- | --- | --- | --- |
| `ppgn_x` | image | autoencoder of images, minus s | (1, 1e5, 17.5) |
| `dgn_am` | code | none, codes are clipped | (0, 1, 0) |
| `ppgn_h` | code | autoencoder of codes, minus s | (1e-5, 1, 1e-5) |
| `joint_ppgn_h` | code | E(G(s)) - s, G trained with noise | (1e-5, 1, 1e-5) |
| `noiseless_joint_ppgn_h` | code | E(G(s)) - s, G trained without | (1e-5, 1, 1e-17) |

With e1 = e2 = e and e3 = sqrt(2 e), exact gradients and small steps, the chain samples from p(s | y) (Langevin); the
paper departs from that on purpose. The released code divides every step, its noise included, by its mean absolute
value (``step="normalized"``), so that only the ratios of the e's count, and follows a gradient that leaves out how the
other logits lower log p (``grad="release"``).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from classact.explain.ascent import ascend
from classact.explain.frozen import frozen
from classact.explain.layers import Layer, find_module, recorded

Grad = Literal["logprob", "release"]
Eps = tuple[float, float, float]
EPS: dict[str, Eps] = {
    "ppgn-x": (1.0, 1e5, 17.5),
    "dgn-am": (0.0, 1.0, 0.0),
    "ppgn-h": (1e-5, 1.0, 1e-5),
    "joint-ppgn-h": (1e-5, 1.0, 1e-5),
    "noiseless-joint-ppgn-h": (1e-5, 1.0, 1e-17),
}


class LatentPrior:
    """The term that pulls states towards likely ones: a residual R(s) that points up log p(s).

    Attributes
    ----------
    networks : tuple
        What it evaluates; frozen while a sampler runs.
    """

    networks: tuple[Any, ...] = ()

    def __call__(self, s: Float[Tensor, "n *shape"]) -> Float[Tensor, "n *shape"]:
        """Residual of states (N, ...), without a graph."""
        raise NotImplementedError

    def residual(
        self,
        s: Float[Tensor, "n *shape"],
        x: Float[Tensor, "n c *spatial"],  # noqa: ARG002
    ) -> Float[Tensor, "n *shape"]:
        """Residual where the image x = G(s) is known already; while inpainting, x holds the known pixels."""
        return self(s)


class ZeroPrior(LatentPrior):
    """No prior, as in DGN-AM."""

    def __call__(self, s: Float[Tensor, "n *shape"]) -> Float[Tensor, "n *shape"]:
        """Zeros."""
        return torch.zeros_like(s)


class DAEPrior(LatentPrior):
    """``R(s) - s`` of a denoising autoencoder (PPGN-x on images, PPGN-h on codes; section 3).

    Parameters
    ----------
    dae : callable
        R, states (N, ...) to states, such as [`LatentDAE`][classact.explain.LatentDAE].
    sigma : float, optional
        Standard deviation of the noise R was trained with. If given, the residual is divided by sigma^2 and is the
        gradient of log p itself; the paper leaves that factor to e1.
    """

    def __init__(
        self, dae: Callable[[Float[Tensor, "n *shape"]], Float[Tensor, "n *shape"]], sigma: float | None = None
    ) -> None:
        if sigma is not None and not sigma > 0:
            raise ValueError(f"sigma: expected a positive number, got {sigma}")
        self.dae, self.sigma = dae, sigma
        self.networks = (dae,)

    @torch.no_grad()
    def __call__(self, s: Float[Tensor, "n *shape"]) -> Float[Tensor, "n *shape"]:
        """Residual of states (N, ...)."""
        difference = _same_shape(self.dae(s), s, "the autoencoder") - s
        return difference if self.sigma is None else difference / self.sigma**2


class JointPrior(LatentPrior):
    """``E(G(h)) - h``: generator and encoder are the autoencoder of codes, through the image (section 3.4).

    Parameters
    ----------
    generator : callable
        G, codes to images.
    encoder : callable
        E, images to codes: the layers of a trained network up to the code.
    """

    def __init__(self, generator: Callable[[Tensor], Tensor], encoder: Callable[[Tensor], Tensor]) -> None:
        self.generator, self.encoder = generator, encoder
        self.networks = (generator, encoder)

    @torch.no_grad()
    def __call__(self, s: Float[Tensor, "n *shape"]) -> Float[Tensor, "n *shape"]:
        """Residual of codes (N, ...)."""
        return self.residual(s, self.generator(s))

    @torch.no_grad()
    def residual(self, s: Float[Tensor, "n *shape"], x: Float[Tensor, "n c *spatial"]) -> Float[Tensor, "n *shape"]:
        """Residual of codes whose images are known: one pass of the encoder."""
        return _same_shape(self.encoder(x), s, "the encoder") - s


def _same_shape(code: Tensor, s: Tensor, who: str) -> Tensor:
    if code.shape != s.shape:
        raise ValueError(f"prior: {who} returns codes of shape {tuple(code.shape)}, the state has {tuple(s.shape)}")
    return code


class Condition:
    """What the images shall satisfy: log p(y | x), differentiable in x.

    Networks see images as the generator draws them; where they expect others, wrap them,
    ``nn.Sequential(Normalize(...), network)``.

    Attributes
    ----------
    networks : tuple
        What it evaluates; frozen while a sampler runs.
    """

    networks: tuple[Any, ...] = ()

    def __call__(self, x: Float[Tensor, "n c *spatial"]) -> Float[Tensor, " n"]:
        """Log-probability of the condition for each image (N, C, ...)."""
        return self.objective(x)[1]

    def objective(
        self, x: Float[Tensor, "n c *spatial"], grad: Grad = "logprob"
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """What a sampler differentiates, and log p; they differ where `grad` is "release" and p is a softmax."""
        raise NotImplementedError


class _Softmax(Condition):
    """Conditions whose p is one entry of a softmax over logits (N, C)."""

    wanted: Tensor

    def logits(self, x: Float[Tensor, "n c *spatial"]) -> Float[Tensor, "n classes"]:
        """Logits of the softmax."""
        raise NotImplementedError

    def objective(
        self, x: Float[Tensor, "n c *spatial"], grad: Grad = "logprob"
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Log p, or for the released code's gradient ``(1 - p) logit`` with the factor held fixed."""
        logits = self.logits(x)
        wanted = self.wanted.to(logits.device).expand(len(logits)) if self.wanted.ndim == 0 else self.wanted
        if len(wanted) != len(logits):
            raise ValueError(f"condition: {len(wanted)} targets for {len(logits)} chains")
        if int(wanted.max()) >= logits.shape[1]:
            raise ValueError(f"condition: target {int(wanted.max())}, but there are {logits.shape[1]} logits")
        index = wanted.to(logits.device).unsqueeze(1)
        log_p = _log_softmax(logits).gather(1, index).squeeze(1)
        if grad == "logprob":
            return log_p, log_p
        return (1 - log_p.detach().exp()) * logits.gather(1, index).squeeze(1), log_p


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _targets(name: str, value: int | Int[Tensor, " n"]) -> Tensor:
    targets = torch.as_tensor(value)
    if targets.is_floating_point() or targets.ndim > 1 or targets.numel() == 0 or int(targets.min()) < 0:
        raise ValueError(f"{name}: expected an index from 0, or one of each chain (N,), got {value}")
    return targets.long()


class ClassCondition(_Softmax):
    """Images of a class.

    Parameters
    ----------
    model : callable
        Images to logits (N, classes).
    y : int or (N,) int
        The class, or one for each chain.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], y: int | Int[Tensor, " n"]) -> None:
        self.model, self.wanted = model, _targets("y", y)
        self.networks = (model,)

    def logits(self, x: Float[Tensor, "n c *spatial"]) -> Float[Tensor, "n classes"]:
        """Logits of the model."""
        return self.model(x)


class NeuronCondition(_Softmax):
    """Images that excite a channel more than the other channels of its layer: softmax over channels at a position.

    Parameters
    ----------
    model : Module
        Any network.
    layer : str or Module
        Its layer: outputs (N, K), or maps (N, K, H, W).
    channel : int or (N,) int
        The channel, or one for each chain.
    position : (int, int), optional
        Row and column in the map; the released code takes the centre, 6 of 13, of the last maps of CaffeNet.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: Layer,
        channel: int | Int[Tensor, " n"],
        position: tuple[int, int] | None = None,
    ) -> None:
        self.model, self.position = model, position
        self.layer, self._module = find_module(model, layer)
        self.wanted = _targets("channel", channel)
        self.networks = (model,)

    def logits(self, x: Float[Tensor, "n c *spatial"]) -> Float[Tensor, "n channels"]:
        """Activations of all channels at the position."""
        with recorded([self._module], gradients=True) as found:
            self.model(x)
        (maps,) = found
        if maps is None:
            raise ValueError(f"layer: {self.layer!r} was not reached")
        if maps.ndim == 2 and self.position is None:
            return maps
        if maps.ndim != 4 or self.position is None:
            raise ValueError(
                f"position: expected row and column for maps (N, K, H, W), none for (N, K); got {self.position} for"
                f" {tuple(maps.shape)}"
            )
        row, column = self.position
        if not (0 <= row < maps.shape[2] and 0 <= column < maps.shape[3]):
            raise ValueError(f"position: expected one in a map of {tuple(maps.shape[2:])}, got {self.position}")
        return maps[:, :, row, column]


class CaptionCondition(Condition):
    """Images that a captioner describes by a sentence: the sum of log p(w_t | w_1 .. w_{t-1}, x).

    Parameters
    ----------
    model : callable
        ``model(x, previous)``, images (N, C, H, W) and previous words (N, T) int to logits (N, T, words).
    tokens : (T,) or (N, T) int
        The sentence with its end, for all chains or for each.
    start : int
        The word before the first one; in the released captioner 0, which is the end as well.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        tokens: Int[Tensor, " t"] | Int[Tensor, "n t"] | Sequence[int],
        start: int = 0,
    ) -> None:
        self.model, self.start = model, start
        self.tokens = torch.as_tensor(tokens)
        if self.tokens.is_floating_point() or self.tokens.ndim not in (1, 2) or not self.tokens.numel():
            raise ValueError(f"tokens: expected words (T,) or (N, T), got shape {tuple(self.tokens.shape)}")
        self.networks = (model,)

    def objective(
        self,
        x: Float[Tensor, "n c *spatial"],
        grad: Grad = "logprob",  # noqa: ARG002 - the released code follows the gradient of log p here
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Log p of the sentence, twice."""
        words = self.tokens.to(x.device).expand(len(x), self.tokens.shape[-1])
        previous = torch.cat([torch.full_like(words[:, :1], self.start), words[:, :-1]], 1)
        with torch.backends.cudnn.flags(enabled=False):  # it has no gradient of recurrent networks in evaluation mode
            logits = self.model(x, previous)
        log_p = _log_softmax(logits).gather(-1, words.unsqueeze(-1)).sum((1, 2))
        return log_p, log_p


class CallableCondition(Condition):
    """Any differentiable log p(y | x).

    Parameters
    ----------
    f : callable
        Images (N, C, ...) to log-probabilities (N,), up to a constant.
    """

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        self.f = f
        self.networks = (f,)

    def objective(
        self,
        x: Float[Tensor, "n c *spatial"],
        grad: Grad = "logprob",  # noqa: ARG002
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Log p, twice."""
        log_p = self.f(x)
        if log_p.shape != (len(x),):
            raise ValueError(f"condition: expected one value per image, ({len(x)},), got {tuple(log_p.shape)}")
        return log_p, log_p


class Samples(NamedTuple):
    """M states of chains and what was drawn from them.

    Attributes
    ----------
    images : (M, C, ...)
        G(code); for PPGN-x the states themselves.
    codes : (M, ...)
        States.
    log_prob : (M,)
        Of the condition.
    chain, step : (M,) int
        Which chain, and after how many steps.
    """

    images: Float[Tensor, "m c *spatial"]
    codes: Float[Tensor, "m *shape"]
    log_prob: Float[Tensor, " m"]
    chain: Int[Tensor, " m"]
    step: Int[Tensor, " m"]


@dataclass(frozen=True, eq=False)
class PPGNSampler:
    """The sampler of all variants; ``dataclasses.replace(sampler, condition=other)`` is plug and play.

    Parameters
    ----------
    generator : callable or None
        G, states (N, ...) to images; None where the state is the image (PPGN-x).
    condition : Condition
        p(y | x).
    prior : LatentPrior
        Residual R.
    eps : (float, float, float)
        e1 of the prior, e2 of the condition, e3, the standard deviation of the noise.
    step : {"langevin", "normalized"}
        Steps as they are (the paper), or each chain's divided by its mean absolute value (the released code).
    lr, lr_end : float
        Factor of the steps, from the first to the second in equal steps; constant without `lr_end`.
    clip : (float, float), optional
        Range of the states, [0, 30] for codes after a ReLU in the released code.
    eps4 : float
        Weight of the known pixels while inpainting.
    grad : {"logprob", "release"}
        Gradient of log p, or the released code's ``(1 - p) d logit``, for classes and neurons.
    shape : tuple of int, optional
        Shape of one state; ``(generator.code_dim,)`` by default.

    Raises
    ------
    ValueError
        If a number is out of range, or a joint prior has another generator.

    Examples
    --------
    States with density N(0, 1), whose gradient of log p is -s, seen as y = 2 with noise N(0, 1): p(s | y) is N(1, 1/2).

    >>> import torch
    >>> near_two = CallableCondition(lambda x: -0.5 * (x - 2).square().sum(1))
    >>> prior = DAEPrior(torch.zeros_like)
    >>> sampler = PPGNSampler(None, near_two, prior, eps=(0.02, 0.02, 0.2), shape=(1,))
    >>> samples = sampler.sample(5000, 200, generator=torch.Generator().manual_seed(0))
    >>> samples.codes.mean().round(decimals=1), samples.codes.var().round(decimals=1)
    (tensor(1.), tensor(0.5000))
    """

    generator: Callable[[Tensor], Tensor] | None
    condition: Condition
    prior: LatentPrior
    eps: Eps
    _: KW_ONLY
    step: Literal["langevin", "normalized"] = "langevin"
    lr: float = 1.0
    lr_end: float | None = None
    clip: tuple[float, float] | None = None
    eps4: float = 0.0
    grad: Grad = "logprob"
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.eps) != 3 or not all(0 <= e < math.inf for e in self.eps):
            raise ValueError(f"eps: expected three finite numbers of at least 0, got {self.eps}")
        for name, value in (("eps4", self.eps4), ("lr", self.lr), ("lr_end", self.lr_end)):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
        if self.step not in ("langevin", "normalized"):
            raise ValueError(f"step: expected 'langevin' or 'normalized', got {self.step!r}")
        if self.grad not in ("logprob", "release"):
            raise ValueError(f"grad: expected 'logprob' or 'release', got {self.grad!r}")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip: expected a range (low, high), got {self.clip}")
        if isinstance(self.prior, JointPrior) and self.prior.generator != self.generator:
            raise ValueError("prior: a joint prior needs the generator of the sampler")

    def sample(
        self,
        n: int,
        steps: int,
        init: Float[Tensor, "n *shape"] | None = None,
        generator: torch.Generator | None = None,
        *,
        reset_every: int = 0,
        redraw: tuple[float, float] | None = None,
        keep: float | None = None,
        every: int = 1,
        return_chain: bool = False,
    ) -> Samples:
        """Run `n` chains and return their last states, or many states along them.

        Parameters
        ----------
        n, steps : int
            Chains, all in one batch, and steps of each.
        init : (n, ...), optional
            Where they start; N(0, 1) by default.
        generator : torch.Generator, optional
            Source of randomness.
        reset_every : int
            Chains start anew from N(0, 1) after so many steps, for variety; 0 for never.
        redraw : (float, float), optional
            At a reset, e1 of each chain is drawn anew, uniformly from this range ((1e-6, 1e-2) in the released code).
        keep : float, optional
            Return the states along the chains whose probability p(y | x) is larger than this.
        every : int
            Which states along the chains are looked at: those after 0, `every`, ``2 * every``, ... steps, and the last.
        return_chain : bool
            Return all of them, whatever their probability; memory then grows with the steps.

        Raises
        ------
        ValueError
            For a number out of range, or a start that does not fit.
        FloatingPointError
            If a step is not finite; the message has its number.
        """
        for name, value, least in (
            ("n", n, 1),
            ("steps", steps, 0),
            ("reset_every", reset_every, 0),
            ("every", every, 1),
        ):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if redraw is not None and not 0 <= redraw[0] <= redraw[1]:
            raise ValueError(f"redraw: expected a range of at least 0, got {redraw}")
        return self._run(
            self._start(n, init, generator),
            steps,
            generator,
            reset_every=reset_every,
            redraw=redraw,
            keep=-math.inf if keep is None and return_chain else keep,
            every=every,
        )

    def inpaint(
        self,
        image: Float[Tensor, "n c h w"],
        mask: Bool[Tensor, "n 1 h w"],
        steps: int = 20,
        init: Float[Tensor, "n *shape"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Samples:
        """Fill the missing pixels of images from the condition and the pixels around them.

        Condition and prior see the known pixels as they are and G(h) in the hole; `eps4` weighs the gradient of
        ``-1/2 ||known pixels - G(h)||^2``. The released code takes 20 steps with e = (1e-5, 1, 0), eps4 = 1e-9, and
        normalised steps from 1 down to 0.

        Parameters
        ----------
        image : (N, C, H, W)
            Values in the hole do not count.
        mask : (N, 1, H, W) bool
            True where pixels are missing; some must be, and some not, in every image.
        steps : int
            Number of steps.
        init : (N, ...), optional
            Where to start. By default at E(image), with 0 in the hole, if the prior has an encoder, else at N(0, 1).
        generator : torch.Generator, optional
            Source of randomness.

        Returns
        -------
        Samples
            Its images have the known pixels exactly.

        Raises
        ------
        ValueError
            If there is no generator, or the mask does not fit.
        """
        if self.generator is None:
            raise ValueError("generator: inpainting needs one")
        if steps < 0:
            raise ValueError(f"steps: expected at least 0, got {steps}")
        if image.ndim != 4 or mask.shape != (len(image), 1, *image.shape[2:]) or mask.dtype != torch.bool:
            raise ValueError(
                f"image, mask: expected (N, C, H, W), and bool (N, 1, H, W), got {tuple(image.shape)}, and {mask.dtype}"
                f" {tuple(mask.shape)}"
            )
        missing = mask.flatten(1)
        if not bool((missing.any(1) & ~missing.all(1)).all()):
            raise ValueError("mask: expected missing and known pixels in every image")
        if init is None and isinstance(self.prior, JointPrior):
            with frozen(*self.prior.networks), torch.no_grad():
                init = self.prior.encoder(image.masked_fill(mask, 0))
        return self._run(self._start(len(image), init, generator), steps, generator, known=(image, mask))

    def _start(self, n: int, init: Tensor | None, generator: torch.Generator | None) -> Tensor:
        width = getattr(self.generator, "code_dim", None)
        shape = self.shape if self.shape is not None or width is None else (width,)
        if init is not None:
            if len(init) != n or (shape is not None and init.shape[1:] != torch.Size(shape)):
                raise ValueError(f"init: expected shape {(n, *(shape or ('...',)))}, got {tuple(init.shape)}")
            return init
        if shape is None:
            raise ValueError("init: needed where neither the sampler has a shape nor the generator a code_dim")
        used = (self.generator, *self.condition.networks, *self.prior.networks)
        parameters = (p for network in used if isinstance(network, nn.Module) for p in network.parameters())
        like = next(parameters, torch.empty(0))
        return _normal(torch.empty(n, *shape, device=like.device), generator)

    def _run(
        self,
        start: Tensor,
        steps: int,
        generator: torch.Generator | None,
        *,
        reset_every: int = 0,
        redraw: tuple[float, float] | None = None,
        keep: float | None = None,
        every: int = 1,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> Samples:
        e1, e2, e3 = self.eps
        weight = torch.full((len(start), *[1] * (start.ndim - 1)), float(e1), device=start.device, dtype=start.dtype)
        current = start  # images of the last states looked at
        kept: list[Samples] = []

        def look(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Images, what is climbed, and log p."""
            drawn = s if self.generator is None else self.generator(s)
            if known is None:
                objective, log_p = self.condition.objective(drawn, self.grad)
                return drawn, e2 * objective, log_p
            image, mask = known
            if drawn.shape != image.shape:
                raise ValueError(f"image: the generator draws {tuple(drawn.shape)}, got {tuple(image.shape)}")
            x = torch.where(mask, drawn, image)
            objective, log_p = self.condition.objective(x, self.grad)
            error = (image - drawn).masked_fill(mask, 0).square().flatten(1).sum(1)
            return x, e2 * objective - 0.5 * self.eps4 * error, log_p

        def direction(s: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal current
            with torch.enable_grad():
                s = s.detach().requires_grad_()
                x, objective, log_p = look(s)
                (step,) = torch.autograd.grad(objective.sum(), s)
            s, current = s.detach(), x.detach()
            if e1 > 0 or redraw is not None:
                step = step + weight * self.prior.residual(s, current)
            if e3 > 0:
                step = step + e3 * _normal(s, generator)
            return step, log_p.detach()

        def watch(t: int, s: Tensor, log_p: Tensor) -> None:
            if keep is not None and (t % every == 0 or t == steps):
                (chosen,) = (log_p.exp() > keep).nonzero(as_tuple=True)
                when = torch.full_like(chosen, t)
                kept.append(Samples(current[chosen], s[chosen], log_p[chosen], chosen, when))

        def project(s: Tensor, t: int) -> Tensor:
            nonlocal weight
            if self.clip is not None:
                s = s.clamp(*self.clip)
            if reset_every and t and t % reset_every == 0:
                s = _normal(s, generator)
                if redraw is not None:
                    low, high = redraw
                    weight = low + (high - low) * _uniform(weight, generator)
            return s

        networks = (self.generator, *self.condition.networks, *self.prior.networks)
        with frozen(*networks):
            s = ascend(
                direction,
                start,
                steps,
                lr=(self.lr, self.lr if self.lr_end is None else self.lr_end),
                scale="mean" if self.step == "normalized" else None,
                project=project,
                watch=watch,
            )
            with torch.no_grad():
                current, _, log_p = look(s)
        if keep is None:
            chains = torch.arange(len(s), device=s.device)
            return Samples(current, s, log_p, chains, torch.full_like(chains, steps))
        watch(steps, s, log_p)
        return Samples(*map(torch.cat, zip(*kept, strict=True)))


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.rand(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def ppgn_x(
    condition: Condition,
    dae: Callable[[Tensor], Tensor],
    eps: Eps = EPS["ppgn-x"],
    *,
    sigma: float | None = None,
    **options: Any,
) -> PPGNSampler:
    """Sample images themselves, with an autoencoder of images (section 3.1); pixels of 0 to 255 for the default `eps`.

    Parameters
    ----------
    condition, eps, **options
        Of [`PPGNSampler`][classact.explain.PPGNSampler]; `shape` is that of an image.
    dae, sigma
        Of [`DAEPrior`][classact.explain.DAEPrior].
    """
    return PPGNSampler(None, condition, DAEPrior(dae, sigma), eps, **options)


def dgn_am(
    generator: Callable[[Tensor], Tensor],
    condition: Condition,
    eps: Eps = EPS["dgn-am"],
    *,
    clip: tuple[float, float] | None = (0.0, 30.0),
    **options: Any,
) -> PPGNSampler:
    """Activation maximisation in the codes of a generator, without a learned prior (section 3.2)."""
    _need_generator(generator)
    return PPGNSampler(generator, condition, ZeroPrior(), eps, clip=clip, **options)


def ppgn_h(
    generator: Callable[[Tensor], Tensor],
    condition: Condition,
    dae: Callable[[Tensor], Tensor],
    eps: Eps = EPS["ppgn-h"],
    *,
    sigma: float | None = None,
    clip: tuple[float, float] | None = (0.0, 30.0),
    **options: Any,
) -> PPGNSampler:
    """DGN-AM with an autoencoder of codes as prior (section 3.3)."""
    _need_generator(generator)
    return PPGNSampler(generator, condition, DAEPrior(dae, sigma), eps, clip=clip, **options)


def joint_ppgn_h(
    generator: Callable[[Tensor], Tensor],
    encoder: Callable[[Tensor], Tensor],
    condition: Condition,
    eps: Eps = EPS["joint-ppgn-h"],
    *,
    clip: tuple[float, float] | None = (0.0, 30.0),
    **options: Any,
) -> PPGNSampler:
    """DGN-AM with encoder and generator as prior; the generator is trained with noise (section 3.4)."""
    _need_generator(generator)
    return PPGNSampler(generator, condition, JointPrior(generator, encoder), eps, clip=clip, **options)


def noiseless_joint_ppgn_h(
    generator: Callable[[Tensor], Tensor],
    encoder: Callable[[Tensor], Tensor],
    condition: Condition,
    eps: Eps = EPS["noiseless-joint-ppgn-h"],
    **options: Any,
) -> PPGNSampler:
    """`joint_ppgn_h` with a generator trained without noise, and hardly any in the chain (section 3.5)."""
    return joint_ppgn_h(generator, encoder, condition, eps, **options)


def _need_generator(generator: Any) -> None:
    if not callable(generator):
        raise TypeError(f"generator: this variant samples codes and needs a generator, got {generator!r}")


def sample_neuron(
    sampler: PPGNSampler,
    neuron: Condition,
    n_chains: int = 1,
    *,
    steps: int = 1000,
    reset_every: int = 100,
    redraw: tuple[float, float] | None = (1e-6, 1e-2),
    keep: float = 0.98,
    every: int = 10,
    generator: torch.Generator | None = None,
) -> Samples:
    """A set of images for a neuron: chains that start anew and change their weight of the prior (section 4.3).

    The defaults are those of the released script for hidden units; with ``every=10`` each chain offers 101 states, of
    which those with a probability above `keep` are returned, possibly none.

    Parameters
    ----------
    sampler : PPGNSampler
        Of any variant; its condition is replaced.
    neuron : Condition
        [`NeuronCondition`][classact.explain.NeuronCondition], or any other.
    n_chains : int
        Chains.
    steps, reset_every, redraw, keep, every, generator
        Of [`PPGNSampler.sample`][classact.explain.PPGNSampler.sample].
    """
    return replace(sampler, condition=neuron).sample(
        n_chains, steps, generator=generator, reset_every=reset_every, redraw=redraw, keep=keep, every=every
    )
