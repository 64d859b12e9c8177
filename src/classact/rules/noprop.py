"""NoProp: blocks that learn alone to denoise the label, and classify together by denoising it from pure noise.

Li, Teh, Pascanu: NoProp: Training Neural Networks without Back-propagation or Forward-propagation, 2025,
https://arxiv.org/abs/2503.24322 (in its second version "without Full Back-propagation or Full Forward-propagation").
No code of the authors is known.

What every block is to receive is fixed beforehand: the embedding u_y of the class, noised the more the earlier the
block. Block t learns by itself to recover u_y from that and the input x; within a block there is back-propagation,
between blocks there is none. To classify, the blocks denoise z_0 ~ N(0, I) one after the other. NoProp-DT has T blocks
and discrete time, NoProp-CT one block that is told the time and a learned noise schedule, NoProp-FM one block that
learns the velocity from noise to label. Within this module z_0 is the noise and z_T (or z_1) the label.

Stated by the paper: losses, coefficients, cosine schedule, form of the blocks, optimisers. Inferred: the cosine is cut
off at 0.001; a 2 x 2 pooling follows every convolution as long as there are pixels left; the classifier p(y|z) starts
as the nearest embedding, because at the paper's learning rate one that starts at random needs thousands of steps and
alone decides how accurate a short training gets.

Three things to know before use. The weights SNR(t) - SNR(t-1) of the likelihood differ by a factor of ten thousand from
block to block. Adam does not mind where each has a block of its own, but NoProp-CT, with one block, then learns near
t = 1 only, and learned embeddings are drawn together, for the errors shrink with them: ``weight="uniform"`` drops the
weights. A block that sees x may learn to ignore z: [`block_reliance`][classact.rules.block_reliance] says by how much.
And inference with noise between the blocks answers with a draw from p(y|x), which is right less often than the most
probable class; ``deterministic=True`` comes nearer to that.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

Weight = Literal["snr", "uniform"]
Solver = Literal["euler", "heun"]
Kind = Literal["onehot", "learned", "prototype"]
Network = TypeVar("Network", bound=nn.Module)


def cosine_abar(T: int, clamp: float = 1e-3) -> Float[Tensor, " t"]:
    """``abar_t = cos^2((1 - t/T) pi/2)`` for t = 0, ..., T, kept within [clamp, 1 - clamp]; float64.

    Examples
    --------
    >>> cosine_abar(2)
    tensor([0.0010, 0.5000, 0.9990], dtype=torch.float64)
    """
    if T < 1:
        raise ValueError(f"T: expected at least 1 block, got {T}")
    if not 0 < clamp < 0.5:
        raise ValueError(f"clamp: expected a number in (0, 0.5), got {clamp}")
    t = torch.arange(T + 1, dtype=torch.float64) / T
    return ((1 - t) * math.pi / 2).cos().square().clamp(clamp, 1 - clamp)


class DTCoefficients(NamedTuple):
    """``z_t = a_t u + b_t z_{t-1} + sqrt(c_t) eps``, and SNR(t) - SNR(t-1), for t = 1, ..., T."""

    a: Float[Tensor, " t"]
    b: Float[Tensor, " t"]
    c: Float[Tensor, " t"]
    snr: Float[Tensor, " t"]


def dt_coefficients(abar: Float[Tensor, " t1"]) -> DTCoefficients:
    """Coefficients of the denoising steps of NoProp-DT (section 2, and its derivation in the appendix).

    With alpha = abar_{t-1} / abar_t, a_t = sqrt(abar_t) (1 - alpha) / (1 - abar_{t-1}),
    b_t = sqrt(alpha) (1 - abar_t) / (1 - abar_{t-1}) and c_t = (1 - abar_t) (1 - alpha) / (1 - abar_{t-1}): the
    posterior of z_t given z_{t-1} and the embedding.

    Parameters
    ----------
    abar : (T + 1,)
        Increasing, within (0, 1).

    Raises
    ------
    ValueError
        If `abar` is not increasing within (0, 1).

    Examples
    --------
    >>> import torch
    >>> dt_coefficients(torch.tensor([0.2, 0.5])).a
    tensor([0.5303])
    """
    if len(abar) < 2 or not bool((abar.diff() > 0).all() and abar[0] > 0 and abar[-1] < 1):
        raise ValueError(f"abar: expected at least two increasing values in (0, 1), got {abar.tolist()}")
    before, after = abar[:-1], abar[1:]
    alpha, noise = before / after, 1 - before
    return DTCoefficients(
        a=after.sqrt() * (1 - alpha) / noise,
        b=alpha.sqrt() * (1 - after) / noise,
        c=(1 - after) * (1 - alpha) / noise,
        snr=after / (1 - after) - before / noise,
    )


def prior_kl(u: Float[Tensor, "n d"], abar: float | Float[Tensor, ""]) -> Float[Tensor, ""]:
    """``KL(q(z_0|y) || N(0, I))`` with ``q(z_0|y) = N(sqrt(abar) u, 1 - abar)``, mean over the N embeddings."""
    abar = torch.as_tensor(abar, dtype=u.dtype, device=u.device)
    return 0.5 * (abar * u.square().sum(1) - u.shape[1] * (abar + torch.log1p(-abar))).mean()


def _noised(u: Tensor, abar: float | Tensor) -> Tensor:
    abar = torch.as_tensor(abar, dtype=u.dtype, device=u.device)
    return abar.sqrt() * u + (1 - abar).sqrt() * torch.randn_like(u)


class LearnedGamma(nn.Module):
    """Noise schedule of NoProp-CT: ``abar(t) = sigmoid(-gamma(t))``, gamma decreasing whatever the parameters are.

    ``gamma(t) = g_0 + (g_1 - g_0) (1 - gbar(t))``, where gbar goes from 0 to 1 and is a small network with positive
    weights, ``w t + sum_j v_j sigmoid(a_j t + b_j)``, scaled. SNR = exp(-gamma).

    Parameters
    ----------
    hidden : int
        Units of the network.
    low, high : float
        Where g_0 = gamma(1) and g_1 = gamma(0) start.

    Examples
    --------
    >>> import torch
    >>> LearnedGamma().abar(torch.tensor([0.0, 1.0]))
    tensor([9.1105e-04, 9.9909e-01], grad_fn=<SigmoidBackward0>)
    """

    def __init__(self, hidden: int = 64, low: float = -7.0, high: float = 7.0) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden: expected at least 1, got {hidden}")
        if not low < high:
            raise ValueError(f"low, high: expected low < high, got {low} and {high}")
        self.config = {"hidden": hidden, "low": low, "high": high}
        self.g0 = nn.Parameter(torch.tensor(float(low)))
        self.log_range = nn.Parameter(torch.tensor(math.log(high - low)))
        self.w = nn.Parameter(torch.zeros(()))
        self.v = nn.Parameter(torch.full((hidden,), -math.log(hidden)))
        self.a = nn.Parameter(torch.full((hidden,), 4.0))
        self.b = nn.Parameter(-4 * torch.linspace(0, 1, hidden))

    def _shape(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The network before scaling, and its derivative."""
        w, v, a = (F.softplus(p) for p in (self.w, self.v, self.a))
        s = (t.unsqueeze(-1) * a + self.b).sigmoid()
        return w * t + s @ v, w + (s * (1 - s)) @ (a * v)

    def gamma(self, t: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
        """Return gamma(t) and its derivative."""
        first, last = self._shape(torch.stack([torch.zeros_like(self.w), torch.ones_like(self.w)]))[0]
        value, slope = self._shape(t)
        whole = self.log_range.exp()
        return self.g0 + whole * (last - value) / (last - first), -whole * slope / (last - first)

    def abar(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """``sigmoid(-gamma(t))``."""
        return (-self.gamma(t)[0]).sigmoid()

    def snr(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """``abar / (1 - abar) = exp(-gamma(t))``."""
        return (-self.gamma(t)[0]).exp()

    def snr_prime(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Derivative of the SNR, ``-gamma'(t) exp(-gamma(t))``."""
        gamma, slope = self.gamma(t)
        return -slope * (-gamma).exp()


def probability_flow(
    u: Float[Tensor, "n d"], z: Float[Tensor, "n d"], gamma: Float[Tensor, "..."], slope: Float[Tensor, "..."]
) -> Float[Tensor, "n d"]:
    """Velocity dz/dt that carries z along q(z_t|u).

    ``abar' / (2 (1 - abar)) (u / sqrt(abar) - z)``, which with ``abar = sigmoid(-gamma)`` is
    ``-gamma'/2 (sqrt(abar) u - abar z)``; `slope` is gamma'.
    """
    abar = (-gamma).sigmoid()
    return -0.5 * slope * (abar.sqrt() * u - abar * z)


def integrate(
    velocity: Callable[[Tensor, float], Tensor], z: Float[Tensor, "n d"], steps: int, solver: Solver = "euler"
) -> Float[Tensor, "n d"]:
    """Solve ``dz/dt = velocity(z, t)`` from t = 0 to 1 in equal steps; Heun's method calls it twice a step.

    Examples
    --------
    >>> import torch
    >>> integrate(lambda z, t: z, torch.ones(1, 1), 100, "heun")
    tensor([[2.7182]])
    """
    if solver not in ("euler", "heun"):
        raise ValueError(f"solver: expected 'euler' or 'heun', got {solver!r}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    for i in range(steps):
        first = velocity(z, i / steps)
        if solver == "euler":
            z = z + first / steps
        else:
            z = z + (first + velocity(z + first / steps, (i + 1) / steps)) / (2 * steps)
    return z


def class_prototypes(
    x: Float[Tensor, "n *shape"], y: Int[Tensor, " n"], classes: int
) -> Float[Tensor, "classes *shape"]:
    """Of every class the example with the smallest median distance to the others of its class.

    Raises
    ------
    ValueError
        If a class has no example.
    """
    found = []
    for label in range(classes):
        own = x[y == label]
        if not len(own):
            raise ValueError(f"y: expected examples of all {classes} classes, there is none of class {label}")
        if len(own) > 1:
            flat = own.flatten(1)
            others = ~torch.eye(len(own), dtype=torch.bool, device=own.device)
            distances = torch.cdist(flat, flat)[others].reshape(len(own), -1)
            own = own[distances.median(1).values.argmin()].unsqueeze(0)
        found.append(own[0])
    return torch.stack(found)


class LabelEmbedding(nn.Module):
    """The matrix W (m, d) whose rows u_y are what the blocks recover.

    Parameters
    ----------
    classes, d : int
        m and d.
    kind : {"onehot", "learned", "prototype"}
        The identity, which asks for d = m; trained with the blocks, from orthogonal rows of length 1 (as many as fit
        into d dimensions); or examples of the classes, as [`class_prototypes`][classact.rules.class_prototypes] finds
        them.
    prototypes : (m, ...), optional
        For ``"prototype"``; without them the rows are 0 until ``load_state_dict`` fills them.

    Examples
    --------
    >>> import torch
    >>> LabelEmbedding(3, 3)(torch.tensor([2]))
    tensor([[0., 0., 1.]])
    """

    def __init__(
        self,
        classes: int,
        d: int,
        kind: Kind = "onehot",
        prototypes: Float[Tensor, "classes *shape"] | None = None,
    ) -> None:
        super().__init__()
        if classes < 2 or d < 1:
            raise ValueError(f"classes, d: expected at least 2 classes and 1 dimension, got {classes} and {d}")
        if kind == "onehot" and d != classes:
            raise ValueError(f"d: expected {classes}, the number of classes, for one-hot labels, got {d}")
        if prototypes is not None and (kind != "prototype" or prototypes.flatten(1).shape != (classes, d)):
            raise ValueError(
                f"prototypes: expected {classes} of {d} values and kind 'prototype', got shape"
                f" {tuple(prototypes.shape)} and {kind!r}"
            )
        self.classes, self.d = classes, d
        self.config = {"classes": classes, "d": d, "kind": kind}
        if kind == "onehot":
            weight = torch.eye(classes)
        elif kind == "learned":
            weight = nn.init.orthogonal_(torch.empty(classes, d))
        elif kind == "prototype":
            weight = torch.zeros(classes, d) if prototypes is None else prototypes.detach().flatten(1).clone().float()
        else:
            raise ValueError(f"kind: expected 'onehot', 'learned' or 'prototype', got {kind!r}")
        self.weight = nn.Parameter(weight, requires_grad=kind == "learned")

    def forward(self, y: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Rows u_y."""
        return self.weight[y]

    def mixture(self, logits: Float[Tensor, "n m"]) -> Float[Tensor, "n d"]:
        """``softmax(logits) W``, a point in the convex hull of the embeddings."""
        return logits.float().softmax(-1) @ self.weight


class InputEncoder(nn.Module):
    """Path of the input: convolutions 3 x 3 for images, linear layers for tables; ReLU and dropout after each.

    Parameters
    ----------
    shape : tuple of int
        (C, H, W) of an image, or (D,) of a row.
    channels : sequence of int
        Width of every layer.
    dropout : float
        After every layer.

    Examples
    --------
    >>> import torch
    >>> InputEncoder((1, 28, 28))(torch.randn(2, 1, 28, 28)).shape
    torch.Size([2, 1152])
    """

    def __init__(self, shape: Sequence[int], channels: Sequence[int] = (32, 64, 128), dropout: float = 0.2) -> None:
        super().__init__()
        self.shape = tuple(shape)
        if len(self.shape) not in (1, 3) or min(self.shape) < 1:
            raise ValueError(f"shape: expected (D,) or (C, H, W), got {self.shape}")
        if not channels or min(channels) < 1:
            raise ValueError(f"channels: expected at least one width, got {list(channels)}")
        self.config = {"shape": list(shape), "channels": list(channels), "dropout": dropout}
        layers: list[nn.Module] = []
        last, size = self.shape[0], self.shape[1:]
        for width in channels:
            layers += [nn.Conv2d(last, width, 3, padding=1) if size else nn.Linear(last, width), nn.ReLU()]
            if size and min(size) > 1:
                layers.append(nn.MaxPool2d(2))
                size = tuple(side // 2 for side in size)
            layers.append(nn.Dropout(dropout))
            last = width
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.width = last * math.prod(size)

    def forward(self, x: Float[Tensor, "n *shape"]) -> Float[Tensor, "n f"]:
        """Features of N inputs."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x: expected shape (N, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        features: Tensor = self.layers(x)
        return features


class DenoiseBlock(nn.Module):
    """One block of NoProp (figure 6): input x, noised label z and, with `time_dim`, the time, to `out` values.

    Without time, as in NoProp-DT: the paths of x and z end in batch normalisation, that of z has a skip connection, and
    two layers with batch normalisation join them. With time, as in NoProp-CT: ReLU in place of every normalisation.

    Parameters
    ----------
    encoder : Module
        Path of x: maps it to (N, F) and has F as its attribute ``width``, like
        [`InputEncoder`][classact.rules.InputEncoder].
    d : int
        Width of z.
    out : int
        Number of classes for NoProp-DT and -CT, whose blocks answer with logits; d for NoProp-FM.
    hidden : int
        Width of all other layers.
    time_dim : int, optional
        Width of the sinusoidal embedding of the time, even.
    z_encoder : Module, optional
        Path of z before its first linear layer, for labels that are themselves inputs (prototypes): with ``shape``, to
        which z is brought, and ``width``.

    Examples
    --------
    >>> import torch
    >>> block = DenoiseBlock(InputEncoder((1, 8, 8)), d=10, out=10)
    >>> block(torch.randn(4, 1, 8, 8), torch.randn(4, 10)).shape
    torch.Size([4, 10])
    """

    def __init__(
        self,
        encoder: nn.Module,
        d: int,
        out: int,
        hidden: int = 256,
        time_dim: int | None = None,
        z_encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("d", d), ("out", out), ("hidden", hidden)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if time_dim is not None and (time_dim < 2 or time_dim % 2):
            raise ValueError(f"time_dim: expected an even number of at least 2, got {time_dim}")
        self.d, self.out, self.time_dim = d, out, time_dim
        self.config = {
            "encoder": encoder,
            "d": d,
            "out": out,
            "hidden": hidden,
            "time_dim": time_dim,
            "z_encoder": z_encoder,
        }
        self.encoder, self.z_encoder = encoder, z_encoder
        z_width = d if z_encoder is None else int(z_encoder.width)  # type: ignore[arg-type]

        def layer(inputs: int, norm: bool = time_dim is None) -> nn.Sequential:
            parts = [nn.Linear(inputs, hidden), *([nn.BatchNorm1d(hidden)] if norm else []), nn.ReLU()]
            return nn.Sequential(*parts)

        width = int(encoder.width)  # type: ignore[arg-type]
        if time_dim is None:
            self.x_path: nn.Module = nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden))
            self.skip = nn.Sequential(layer(hidden), nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden))
        else:
            self.x_path = layer(width)
            self.t_path = layer(time_dim)
        self.z_path = layer(z_width)
        self.join = nn.Sequential(layer(hidden * (2 if time_dim is None else 3)), layer(hidden), nn.Linear(hidden, out))

    def encode(self, x: Float[Tensor, "n *shape"]) -> Float[Tensor, "n h"]:
        """Features of x, which depend on neither z nor time: computed once while one input is denoised."""
        features: Tensor = self.x_path(self.encoder(x))
        return features

    def denoise(
        self,
        features: Float[Tensor, "n h"],
        z: Float[Tensor, "n d"],
        t: Float[Tensor, " n"] | float | None = None,
    ) -> Float[Tensor, "n out"]:
        """Answer for features that ``encode`` returned."""
        if z.ndim != 2 or z.shape[1] != self.d:
            raise ValueError(f"z: expected shape (N, {self.d}), got {tuple(z.shape)}")
        if (t is None) != (self.time_dim is None):
            raise ValueError(f"t: expected {'no ' if self.time_dim is None else 'a '}time for this block, got {t}")
        label = z if self.z_encoder is None else self.z_encoder(z.unflatten(1, self.z_encoder.shape))
        h = self.z_path(label)
        if t is None:
            parts = [features, h + self.skip(h)]
        else:
            parts = [features, h, self.t_path(self._waves(torch.as_tensor(t, dtype=z.dtype, device=z.device)))]
            parts[2] = parts[2].expand(len(z), -1)
        answer: Tensor = self.join(torch.cat(parts, 1))
        return answer

    def _waves(self, t: Tensor) -> Tensor:
        half = (self.time_dim or 0) // 2
        frequency = 1000 * 10_000 ** (-torch.arange(half, dtype=t.dtype, device=t.device) / half)
        angle = t.reshape(-1, 1) * frequency
        return torch.cat([angle.sin(), angle.cos()], 1)

    def forward(
        self, x: Float[Tensor, "n *shape"], z: Float[Tensor, "n d"], t: Float[Tensor, " n"] | float | None = None
    ) -> Float[Tensor, "n out"]:
        """Logits (N, m), or the velocity (N, d)."""
        return self.denoise(self.encode(x), z, t)


class _Classifier(nn.Module):
    """What the networks and the twin share: probabilities."""

    @torch.no_grad()
    def predict_proba(
        self,
        x: Float[Tensor, "n *shape"],
        seed: int = 0,
        batch_size: int = 1000,
        z: Float[Tensor, "n d"] | None = None,
        **settings: Any,
    ) -> Float[Tensor, "n m"]:
        """Probabilities of the classes, rows sum to 1; `seed` draws z_0, unless it is given, and the noise of sampling.

        Parameters
        ----------
        x : (N, ...)
            Inputs.
        seed, batch_size : int
            The same answer for the same of both; the global random state stays as it is.
        z : (N, d), optional
            z_0.
        **settings
            Of the network's ``forward``.
        """
        training, device = self.training, next(self.parameters()).device
        starts = [None] * -(-len(x) // batch_size) if z is None else z.split(batch_size)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            try:
                self.eval()
                found = [
                    self(part.to(device), None if start is None else start.to(device), **settings).float().softmax(-1)
                    for part, start in zip(x.split(batch_size), starts, strict=True)
                ]
            finally:
                self.train(training)
        return torch.cat(found)


class _NoProp(_Classifier):
    """The embedding, and the classifier p(y|z) of the last z."""

    def __init__(self, embedding: LabelEmbedding) -> None:
        super().__init__()
        self.embedding = embedding
        self.head = nn.Linear(embedding.d, embedding.classes)
        # the nearest embedding: |z - u|^2 = |z|^2 - 2 (z u - |u|^2 / 2)
        with torch.no_grad():
            self.head.weight.copy_(embedding.weight)
            self.head.bias.copy_(-0.5 * embedding.weight.square().sum(1))

    @classmethod
    def for_data(  # noqa: PYI019 - the run-time checks of the tests do not know Self
        cls: type[Network],
        shape: Sequence[int],
        classes: int,
        *,
        embedding: Kind = "onehot",
        d: int | None = None,
        prototypes: Float[Tensor, "classes *shape"] | None = None,
        channels: Sequence[int] = (32, 64, 128),
        hidden: int = 256,
        dropout: float = 0.2,
        **settings: Any,
    ) -> Network:
        """Build the network with the paper's blocks for images (C, H, W) or rows (D,).

        Parameters
        ----------
        shape : sequence of int
            Shape of one input.
        classes : int
            Number m of classes.
        embedding : {"onehot", "learned", "prototype"}
            See [`LabelEmbedding`][classact.rules.LabelEmbedding].
        d : int, optional
            Width of a learned embedding; m by default. Prototypes have the size of the input.
        prototypes : (m, ...), optional
            For ``embedding="prototype"``; z gets a path like that of x.
        channels, hidden, dropout
            Of [`InputEncoder`][classact.rules.InputEncoder] and [`DenoiseBlock`][classact.rules.DenoiseBlock].
        **settings
            Of the class itself.

        Examples
        --------
        >>> import torch
        >>> model = NoPropDT.for_data((1, 8, 8), classes=10, T=4)
        >>> model(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        """
        own = embedding == "prototype"
        d = math.prod(shape) if own else d or classes
        labels = LabelEmbedding(classes, d, embedding, prototypes)
        out = d if issubclass(cls, NoPropFM) else classes
        time_dim = None if issubclass(cls, NoPropDT) else 64
        encoders = [InputEncoder(shape, channels, dropout) for _ in range(2 if own else 1)]
        block = DenoiseBlock(encoders[0], d, out, hidden, time_dim, encoders[1] if own else None)
        return cls(block, labels, **settings)

    def _check(self, block: nn.Module, out: int) -> None:
        for name, wanted in (("d", self.embedding.d), ("out", out)):
            if getattr(block, name, wanted) != wanted:
                raise ValueError(f"block: expected {name} = {wanted} for this embedding, got {getattr(block, name)}")

    def _start(self, x: Tensor, z: Tensor | None) -> Tensor:
        """z_0, drawn from N(0, I) unless it is given."""
        if z is None:
            return torch.randn(len(x), self.embedding.d, device=x.device)
        if z.shape != (len(x), self.embedding.d):
            raise ValueError(f"z: expected shape {(len(x), self.embedding.d)}, got {tuple(z.shape)}")
        return z

    def _from_label(self, y: Tensor, first: float | Tensor, last: float | Tensor) -> Tensor:
        """``E[-log p(y|z_T)] + KL(q(z_0|y) || p(z_0))``."""
        u = self.embedding(y)
        return F.cross_entropy(self.head(_noised(u, last)), y) + prior_kl(u, first)


def _check_weight(weight: str, eta: float) -> None:
    if weight not in ("snr", "uniform"):
        raise ValueError(f"weight: expected 'snr' or 'uniform', got {weight!r}")
    if not eta > 0:
        raise ValueError(f"eta: expected a positive number, got {eta}")


def _fresh(block: nn.Module) -> nn.Module:
    """A copy with new initial weights."""
    block = copy.deepcopy(block)
    for part in block.modules():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()
    return block


def _denoising_loss(
    block: nn.Module, embedding: LabelEmbedding, abar: float, weight: float, x: Tensor, y: Tensor
) -> Tensor:
    """``weight E ||u_hat(z_{t-1}, x) - u_y||^2``, with z_{t-1} drawn from q(.|y), whose abar is given."""
    u = embedding(y)
    return weight * (embedding.mixture(block(x, _noised(u, abar))) - u).square().sum(1).mean()


class NoPropDT(_NoProp):
    """NoProp in discrete time: T blocks, each with weights of its own.

    Block t answers with ``u_hat_t(z_{t-1}, x) = softmax(block(x, z_{t-1})) W``, and
    ``z_t = a_t u_hat_t + b_t z_{t-1} + sqrt(c_t) eps``. Its loss is
    ``T/2 eta (SNR(t) - SNR(t-1)) E||u_hat_t - u_y||^2``, to which come, of the label alone,
    ``E[-log p(y|z_T)] + KL(q(z_0|y) || N(0, I))``. [`fit_noprop`][classact.rules.fit_noprop] trains it.

    Parameters
    ----------
    block : Module
        A [`DenoiseBlock`][classact.rules.DenoiseBlock] without time, or any module that maps x and z (N, d) to logits
        (N, m). It becomes block 1, and the others are copies with new weights.
    embedding : LabelEmbedding
        W.
    T : int
        Number of blocks.
    eta : float
        Weight of the denoising term in the loss.
    weight : {"snr", "uniform"}
        ``SNR(t) - SNR(t-1)``, with which the loss is a bound of the likelihood, or 1.
    abar : sequence of T + 1 floats, optional
        The noise schedule; by default [`cosine_abar`][classact.rules.cosine_abar].

    Raises
    ------
    ValueError
        If `abar` is not T + 1 increasing values in (0, 1), or the block does not fit the embedding.

    Examples
    --------
    >>> import torch
    >>> model = NoPropDT(DenoiseBlock(InputEncoder((64,)), d=10, out=10), LabelEmbedding(10, 10), T=5)
    >>> x, y = torch.randn(32, 64), torch.arange(32) % 10
    >>> model.block_loss(3, x, y).backward()
    >>> [any(p.grad is not None for p in block.parameters()) for block in model.blocks]
    [False, False, True, False, False]
    """

    def __init__(
        self,
        block: nn.Module,
        embedding: LabelEmbedding,
        T: int = 10,
        eta: float = 0.1,
        weight: Weight = "snr",
        abar: Sequence[float] | None = None,
    ) -> None:
        super().__init__(embedding)
        self._check(block, embedding.classes)
        _check_weight(weight, eta)
        schedule = cosine_abar(T) if abar is None else torch.tensor(list(abar), dtype=torch.float64)
        if len(schedule) != T + 1:
            raise ValueError(f"abar: expected T + 1 = {T + 1} values, got {len(schedule)}")
        self.T, self.abar = T, schedule.tolist()
        self._a, self._b, self._c, snr = (part.tolist() for part in dt_coefficients(schedule))
        self.weights = [T / 2 * eta * (step if weight == "snr" else 1.0) for step in snr]
        self.blocks = nn.ModuleList([block, *(_fresh(block) for _ in range(T - 1))])
        self.config = {
            "block": block,
            "embedding": embedding,
            "T": T,
            "eta": eta,
            "weight": weight,
            "abar": None if abar is None else list(abar),
        }

    def _number(self, t: int) -> int:
        if not 1 <= t <= self.T:
            raise ValueError(f"t: expected a block from 1 to {self.T}, got {t}")
        return t - 1

    def block_loss(self, t: int, x: Float[Tensor, "n *shape"], y: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Denoising loss of block t alone; it has gradients for that block, and for W where W is trained.

        Parameters
        ----------
        t : int
            From 1 to T.
        x, y : (N, ...) and (N,)
            Inputs and classes.
        """
        i = self._number(t)
        return _denoising_loss(self.blocks[i], self.embedding, self.abar[i], self.weights[i], x, y)

    def head_loss(self, y: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """``E[-log p(y|z_T)] + KL(q(z_0|y) || N(0, I))``, which depends on the labels only."""
        return self._from_label(y, self.abar[0], self.abar[-1])

    def loss(self, x: Float[Tensor, "n *shape"], y: Int[Tensor, " n"], t: int | None = None) -> Float[Tensor, ""]:
        """Return the paper's loss, for block t or one that is drawn."""
        chosen = int(torch.randint(1, self.T + 1, ())) if t is None else t
        return self.block_loss(chosen, x, y) + self.head_loss(y)

    def chain(
        self, x: Float[Tensor, "n *shape"], z: Float[Tensor, "n d"] | None = None, deterministic: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits of every block, and its z_t."""
        z = self._start(x, z)
        for block, a, b, c in zip(self.blocks, self._a, self._b, self._c, strict=True):
            logits = block(x, z)
            z = a * self.embedding.mixture(logits) + b * z
            if not deterministic:
                z = z + math.sqrt(c) * torch.randn_like(z)
            yield logits, z

    def forward(
        self, x: Float[Tensor, "n *shape"], z: Float[Tensor, "n d"] | None = None, deterministic: bool = False
    ) -> Float[Tensor, "n m"]:
        """Logits of p(y|z_T).

        Parameters
        ----------
        x : (N, ...)
            Inputs.
        z : (N, d), optional
            z_0; drawn from N(0, I) by default.
        deterministic : bool
            Leave out the noise between blocks.
        """
        for _, last in self.chain(x, z, deterministic):
            z = last
        logits: Tensor = self.head(z)
        return logits


class NoPropCT(_NoProp):
    """NoProp in continuous time: one block with weights shared by all times, and a noise schedule that is learned too.

    Loss: ``eta/2 E_{t~U(0,1)}[SNR'(t) ||u_hat(z_t, x, t) - u_y||^2]``, one time per example, and the two terms of the
    label alone, as for NoProp-DT.

    Parameters
    ----------
    block : Module
        A [`DenoiseBlock`][classact.rules.DenoiseBlock] with time, or any module with its ``encode`` and ``denoise``.
    embedding : LabelEmbedding
        W.
    schedule : LearnedGamma, optional
        abar(t).
    eta : float
        Weight of the denoising term.
    weight : {"snr", "uniform"}
        ``SNR'(t)``, or 1. Without SNR' a schedule that learns would do away with the noise, so it is kept as it is.

    Examples
    --------
    >>> import torch
    >>> model = NoPropCT.for_data((64,), classes=10, weight="uniform")
    >>> model.loss(torch.randn(32, 64), torch.arange(32) % 10).backward()
    >>> model(torch.randn(2, 64), steps=30, solver="heun").shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        block: nn.Module,
        embedding: LabelEmbedding,
        schedule: LearnedGamma | None = None,
        eta: float = 1.0,
        weight: Weight = "snr",
    ) -> None:
        super().__init__(embedding)
        self._check(block, embedding.classes)
        _check_weight(weight, eta)
        self.block, self.schedule = block, schedule or LearnedGamma()
        self.eta, self.weight = eta, weight
        if weight == "uniform":
            self.schedule.requires_grad_(False)
        self.config = {
            "block": block,
            "embedding": embedding,
            "schedule": self.schedule,
            "eta": eta,
            "weight": weight,
        }

    def loss(self, x: Float[Tensor, "n *shape"], y: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the paper's loss of a batch, at times drawn from U(0, 1)."""
        u = self.embedding(y)
        t = torch.rand(len(y), device=u.device)
        gamma, slope = self.schedule.gamma(t)
        found = self.embedding.mixture(self.block(x, _noised(u, (-gamma).sigmoid().unsqueeze(1)), t))
        error = (found - u).square().sum(1)
        if self.weight == "snr":
            error = -slope * (-gamma).exp() * error
        first, last = self.schedule.abar(torch.tensor([0.0, 1.0], device=u.device))
        return 0.5 * self.eta * error.mean() + self._from_label(y, first, last)

    def forward(
        self,
        x: Float[Tensor, "n *shape"],
        z: Float[Tensor, "n d"] | None = None,
        steps: int = 1000,
        solver: Literal["euler", "heun", "sde"] = "euler",
    ) -> Float[Tensor, "n m"]:
        """Logits of p(y|z_1).

        Parameters
        ----------
        x : (N, ...)
            Inputs.
        z : (N, d), optional
            z_0; drawn from N(0, I) by default.
        steps : int
            1000 in the paper; a few tens do with Heun's method.
        solver : {"euler", "heun", "sde"}
            Of the ordinary differential equation, or Euler and Maruyama's of the stochastic one.
        """
        z, features = self._start(x, z), self.block.encode(x)  # type: ignore[operator]
        if solver != "sde":
            z = integrate(lambda z, t: probability_flow(*self._step(features, z, t)), z, steps, solver)
        else:
            if steps < 1:
                raise ValueError(f"steps: expected at least 1, got {steps}")
            for i in range(steps):
                u, _, gamma, slope = self._step(features, z, i / steps)
                abar = (-gamma).sigmoid()
                drift = -slope * (abar.sqrt() * u - (1 + abar) / 2 * z)
                z = z + drift / steps + (-slope * (1 - abar) / steps).sqrt() * torch.randn_like(z)
        logits: Tensor = self.head(z)
        return logits

    def _step(self, features: Tensor, z: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u_hat, z, gamma and its derivative at time t."""
        u = self.embedding.mixture(self.block.denoise(features, z, t))  # type: ignore[operator]
        return u, z, *self.schedule.gamma(torch.tensor(t, device=z.device))


class NoPropFM(_NoProp):
    """NoProp by flow matching: one block learns the velocity ``u_y - z_0`` on straight lines from noise to the label.

    Loss: ``E||v(z_t, x, t) - (u_y - z_0)||^2`` with ``z_t = t u_y + (1-t) z_0 + sigma eps``. Where W is trained,
    ``-log p(y|z_t + (1-t) v)`` is added, the anchor that keeps the embeddings apart.

    Parameters
    ----------
    block : Module
        A [`DenoiseBlock`][classact.rules.DenoiseBlock] with time and ``out=d``, or any module with its ``encode`` and
        ``denoise``.
    embedding : LabelEmbedding
        W.
    sigma : float
        Noise on the line.

    Examples
    --------
    >>> import torch
    >>> model = NoPropFM.for_data((64,), classes=10)
    >>> model.loss(torch.randn(32, 64), torch.arange(32) % 10).backward()
    >>> model(torch.randn(2, 64), steps=30, solver="heun").shape
    torch.Size([2, 10])
    """

    def __init__(self, block: nn.Module, embedding: LabelEmbedding, sigma: float = 0.0) -> None:
        super().__init__(embedding)
        self._check(block, embedding.d)
        if sigma < 0:
            raise ValueError(f"sigma: expected 0 or more, got {sigma}")
        self.block, self.sigma = block, sigma
        if not embedding.weight.requires_grad:
            self.head.requires_grad_(False)
        self.config = {"block": block, "embedding": embedding, "sigma": sigma}

    def loss(self, x: Float[Tensor, "n *shape"], y: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the paper's loss of a batch, at times drawn from U(0, 1)."""
        u = self.embedding(y)
        z0, t = torch.randn_like(u), torch.rand(len(y), device=u.device)
        part = t.unsqueeze(1)
        z = part * u + (1 - part) * z0
        if self.sigma:
            z = z + self.sigma * torch.randn_like(u)
        v = self.block(x, z, t).float()
        loss = (v - (u - z0)).square().sum(1).mean()
        if self.embedding.weight.requires_grad:
            loss = loss + F.cross_entropy(self.head(z + (1 - part) * v), y)
        return loss

    def forward(
        self,
        x: Float[Tensor, "n *shape"],
        z: Float[Tensor, "n d"] | None = None,
        steps: int = 1000,
        solver: Solver = "euler",
    ) -> Float[Tensor, "n m"]:
        """Logits of p(y|z_1); arguments as for [`NoPropCT`][classact.rules.NoPropCT]."""
        block: Any = self.block
        features = block.encode(x)
        last = integrate(lambda z, t: block.denoise(features, z, t), self._start(x, z), steps, solver)
        logits: Tensor = self.head(last)
        return logits


class EndToEndTwin(_Classifier):
    """The stack of a NoProp-DT, trained by back-propagation through the whole chain: what NoProp is compared with.

    Parameters
    ----------
    network : NoPropDT
        Its blocks, embedding and classifier are used as they are, not copied.

    Examples
    --------
    >>> import torch
    >>> twin = EndToEndTwin(NoPropDT.for_data((64,), classes=10, T=3))
    >>> twin.loss(torch.randn(32, 64), torch.arange(32) % 10).backward()
    >>> all(p.grad is not None for p in twin.network.blocks.parameters())
    True
    """

    def __init__(self, network: NoPropDT) -> None:
        super().__init__()
        self.network = network
        self.config = {"network": network}

    def forward(
        self, x: Float[Tensor, "n *shape"], z: Float[Tensor, "n d"] | None = None, deterministic: bool = False
    ) -> Float[Tensor, "n m"]:
        """Logits of p(y|z_T), as [`NoPropDT`][classact.rules.NoPropDT]'s."""
        logits: Tensor = self.network(x, z, deterministic)
        return logits

    def loss(self, x: Float[Tensor, "n *shape"], y: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Cross-entropy of a sampled chain."""
        return F.cross_entropy(self(x), y)


Model = TypeVar("Model", NoPropDT, NoPropCT, NoPropFM, EndToEndTwin)


def fit_noprop(
    model: Model,
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, " n"],
    *,
    epochs: int = 100,
    lr: float = 1e-3,
    batch_size: int = 128,
    seed: int = 0,
    device: str | torch.device = "cpu",
    weight_decay: float = 1e-3,
    workers: int = 1,
) -> Model:
    """Train a NoProp network, or its twin, in place; it comes back in evaluation mode.

    NoProp-DT with fixed embeddings is trained one block after the other, each by an optimiser and random numbers of
    its own; the classifier p(y|z_T), which needs the labels only, makes T steps per batch. With trained embeddings,
    which the blocks share, the loop is the paper's: in every epoch block after block. All use AdamW; the paper takes
    Adam for NoProp-CT and -FM, whose decay, a part of the gradient, outweighs the loss where that is small, as it is
    with ``weight="uniform"`` and many classes, and nothing is learned.

    Parameters
    ----------
    model : NoPropDT, NoPropCT, NoPropFM or EndToEndTwin
        The network.
    x, y : (N, ...) and (N,)
        Inputs and classes.
    epochs, lr, batch_size, weight_decay
        Of the training of every block. A last batch of one example is passed over: it has no batch statistics.
    seed : int
        Equal seeds, equal results on the same device; the global random state stays as it is.
    device : str or device
        Where to train; the network stays there.
    workers : int
        Train so many blocks of a NoProp-DT at a time, in processes of their own. The result is the same, bit for bit
        if each computes with as many threads as one process would.

    Raises
    ------
    ValueError
        If shapes, classes or settings do not fit, x has values that are not finite, or blocks that share trained
        embeddings are to be trained in several processes.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> import torch
    >>> x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    >>> x = x.float() / 16
    >>> model = NoPropDT.for_data((64,), classes=10, T=2, channels=(64,), hidden=64)
    >>> model = fit_noprop(model, x[:1000], y[:1000], epochs=10)
    >>> bool((model.predict_proba(x[1000:]).argmax(1) == y[1000:]).float().mean() > 0.85)
    True
    """
    network = model.network if isinstance(model, EndToEndTwin) else model
    _check_data(x, y, network.embedding.classes)
    for name, number in (("epochs", epochs), ("workers", workers)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    if batch_size < 2:
        raise ValueError(f"batch_size: expected at least 2, got {batch_size}")
    shared = network.embedding.weight.requires_grad
    blockwise = isinstance(model, NoPropDT)
    if workers > 1 and (shared or not blockwise):
        raise ValueError(f"workers: expected 1 except for NoPropDT with fixed embeddings, got {workers}")
    model.to(device).train()
    x, y = x.to(device), y.to(device)
    plan = _Plan(epochs, lr, batch_size, seed, weight_decay)
    if isinstance(model, NoPropDT):
        if shared:
            _descend(model, lambda t, rows: model.loss(x[rows], y[rows], t), range(1, model.T + 1), len(y), plan)
        else:
            _fit_blocks(model, x, y, plan, workers)
    else:
        _descend(model, lambda _, rows: model.loss(x[rows], y[rows]), (0,), len(y), plan)
    return model.eval()


class _Plan(NamedTuple):
    epochs: int
    lr: float
    batch_size: int
    seed: int
    weight_decay: float


def _check_data(x: Tensor, y: Tensor, classes: int) -> None:
    if y.ndim != 1 or len(x) != len(y) or len(y) < 2:
        raise ValueError(f"x, y: expected N >= 2 inputs and classes, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    if y.is_floating_point() or int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(f"y: expected classes from 0 to {classes - 1}, got {y.dtype} from {y.min()} to {y.max()}")
    if not bool(x.isfinite().all()):
        raise ValueError("x: expected finite numbers, got NaN or infinity")


def _descend(
    part: nn.Module,
    loss: Callable[[int, Tensor], Tensor],
    rounds: Sequence[int],
    n: int,
    plan: _Plan,
    stream: int = 0,
) -> None:
    """Descend ``loss(round, rows)`` through all batches, for each round of each epoch.

    What a loss does not touch has no gradient, and the optimiser leaves it alone.
    """
    parameters = [p for p in part.parameters() if p.requires_grad]
    if not parameters:
        return
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=plan.weight_decay)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence([plan.seed, stream]).generate_state(1)[0]))
        for _ in range(plan.epochs):
            for number in rounds:
                for rows in torch.randperm(n).to(device).split(plan.batch_size):
                    if len(rows) > 1:
                        optimizer.zero_grad()
                        loss(number, rows).backward()
                        optimizer.step()
    optimizer.zero_grad()


def _fit_blocks(model: NoPropDT, x: Tensor, y: Tensor, plan: _Plan, workers: int) -> None:
    _descend(model.head, lambda _, rows: model.head_loss(y[rows]), range(model.T), len(y), plan)
    jobs = [
        (block, model.embedding, model.abar[i], model.weights[i], x, y, plan, i + 1)
        for i, block in enumerate(model.blocks)
    ]
    if workers == 1:
        for job in jobs:
            _fit_block(*job)
        return
    from joblib import Parallel, delayed

    threads = max(1, torch.get_num_threads() // workers)
    trained = Parallel(n_jobs=workers, backend="loky")(delayed(_fit_block)(*job, threads) for job in jobs)
    for block, state in zip(model.blocks, trained, strict=True):
        block.load_state_dict(state)


def _fit_block(
    block: nn.Module,
    embedding: LabelEmbedding,
    abar: float,
    weight: float,
    x: Tensor,
    y: Tensor,
    plan: _Plan,
    t: int,
    threads: int | None = None,
) -> dict[str, Tensor]:
    """Train block t, in whatever process."""
    if threads is not None:
        torch.set_num_threads(threads)

    def loss(_: int, rows: Tensor) -> Tensor:
        return _denoising_loss(block, embedding, abar, weight, x[rows], y[rows])

    _descend(block, loss, (t,), len(y), plan, stream=t)
    return {name: tensor.cpu() for name, tensor in block.state_dict().items()}


class BlockReliance(NamedTuple):
    """Accuracies that say what the blocks of a NoProp-DT go by; chance is one over the number of classes.

    Attributes
    ----------
    chain, chain_shuffled : float
        Of the whole network, without noise between blocks; and on inputs of other examples, which is chance.
    first_block : float
        Of block 1 alone, given pure noise.
    last_block, last_block_shuffled, last_block_noise : float
        Of block T, given the noised label of its training; given that and the input of another example, near 1 if it
        goes by z and chance if by x alone; and given pure noise in place of the label.
    """

    chain: float
    chain_shuffled: float
    first_block: float
    last_block: float
    last_block_shuffled: float
    last_block_noise: float


@torch.no_grad()
def block_reliance(model: NoPropDT, x: Float[Tensor, "n *shape"], y: Int[Tensor, " n"], seed: int = 0) -> BlockReliance:
    """Tell whether a trained NoProp-DT denoises labels, or is T classifiers of x side by side.

    The accuracy of the chain does not tell these apart. Report it next to these.

    Parameters
    ----------
    model : NoPropDT
        A trained network; left in the mode it was in.
    x, y : (N, ...) and (N,)
        Test inputs and classes, in one batch.
    seed : int
        Of the noise and of the order in which inputs are shuffled.

    Examples
    --------
    >>> import torch
    >>> model = NoPropDT.for_data((64,), classes=10, T=3)
    >>> block_reliance(model, torch.randn(50, 64), torch.arange(50) % 10).chain <= 1
    True
    """
    _check_data(x, y, model.embedding.classes)
    training, device = model.training, model.head.weight.device
    x, y = x.to(device), y.to(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            model.eval()
            u, other = model.embedding(y), x[torch.randperm(len(x)).to(device)]
            noise, label = torch.randn_like(u), _noised(u, model.abar[-2])
            first, last = model.blocks[0], model.blocks[-1]
            answers = (
                model(x, noise, deterministic=True),
                model(other, noise, deterministic=True),
                first(x, noise),
                last(x, label),
                last(other, label),
                last(x, noise),
            )
        finally:
            model.train(training)
    return BlockReliance(*((answer.argmax(1) == y).float().mean().item() for answer in answers))
