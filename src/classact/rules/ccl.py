"""Counter-current learning: a network from the input up and one from the target down, pulled together layer by layer.

Kao, Hariharan: Counter-Current Learning: A Biologically Plausible Dual Network Approach for Deep Learning, NeurIPS
2024, https://arxiv.org/abs/2409.19841; code of the authors: https://github.com/IandRover/CCL-NeurIPS24.

Upwards ``a_0 = x, a_i = phi(F_i sg(a_{i-1}))``, downwards ``c_L = target, c_{i-1} = phi(B_i sg(c_i))``, without phi at
the two far ends; sg stops gradients at the *input* of every layer. The loss of the pair (a_i, c_i) therefore trains F_i
and B_{i+1}, and nothing else. What is near the label, at the bottom of one network, informs the top of the other.
Inference needs the upward network only.

Of classes the downward network sees the m one-hot vectors, once per step: c_i has m rows whatever the batch. Pair 0,
of the input, trains B_1 only, which nothing else uses.

Taken from the authors' code: losses with all constants, among them the 256 of the dense loss; who sees whose gradient;
biases that start at 0, none in linear layers; optimisers and their settings; the threshold 0.9 of the confidence
filter, whose rows still count in the mean. The warm-up there multiplies by the number of the batch within its epoch,
here by the number of the step, which is the same while a warm-up ends within an epoch. In the autoencoder the affine
parameters of batch normalisation are left out, as the authors' optimisers leave them at 1 and 0, and the bias of a
downward convolution starts at 0 too.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from classact.rules.feedback_alignment import (
    Activation,
    Classifier,
    Kind,
    Network,
    activation,
    check_kernel,
    fit,
    layout,
)

Mode = Literal["stride", "pool", "same", "up"]
PairKind = Literal["gram", "cosine_gram", "ae"]


class DualLinear(nn.Module):
    """``phi(F a)`` upwards and ``phi(B c)`` downwards.

    Parameters
    ----------
    in_features, out_features : int
        Of F; those of B are the other way round.
    act : str
        phi: elu, relu, leaky_relu, selu or tanh.
    bias : bool
        Whether F and B have biases, which start at 0.

    Examples
    --------
    >>> import torch
    >>> layer = DualLinear(4, 2)
    >>> layer(torch.randn(5, 4)).shape, layer.reverse(torch.randn(3, 2)).shape
    (torch.Size([5, 2]), torch.Size([3, 4]))
    """

    def __init__(self, in_features: int, out_features: int, act: Activation = "elu", bias: bool = False) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features, out_features: expected at least 1, got {in_features} and {out_features}")
        self.inputs, self.outputs, self.act = in_features, out_features, activation(act)
        self.config = {"in_features": in_features, "out_features": out_features, "act": act, "bias": bias}
        self.F = nn.Linear(in_features, out_features, bias=bias)
        self.B = nn.Linear(out_features, in_features, bias=bias)
        _zero_biases(self)

    def forward(self, x: Float[Tensor, "n i"], local: bool = False, act: bool = True) -> Float[Tensor, "n o"]:
        """``phi(F x)``; with `local` no gradient reaches x, without `act` there is no phi."""
        a = self.F(x.detach() if local else x)
        return self.act(a) if act else a

    def reverse(self, c: Float[Tensor, "k o"], local: bool = False, act: bool = True) -> Float[Tensor, "k i"]:
        """``phi(B c)``; with `local` no gradient reaches c, without `act` there is no phi."""
        below = self.B(c.detach() if local else c)
        return self.act(below) if act else below


class DualConv2d(nn.Module):
    """A convolution up and one down, which undoes what the former does to height and width.

    Parameters
    ----------
    in_channels, out_channels, kernel : int
        Of F; B has the channels the other way round. The kernel is odd, the padding half of it.
    mode : {"stride", "pool", "same", "up"}
        Upwards a stride of 2, a 2 x 2 max-pooling after phi, neither, or doubling of rows and columns before the
        convolution. Downwards the first two double rows and columns, and the last has a stride of 2.
    act : str
        phi.
    bias : bool, optional
        Biases, which start at 0; by default except with ``"pool"``.
    norm : bool
        Batch normalisation between convolution and phi, both ways, without affine parameters.

    Examples
    --------
    >>> import torch
    >>> layer = DualConv2d(3, 8, mode="stride")
    >>> layer(torch.randn(2, 3, 6, 6)).shape, layer.reverse(torch.randn(2, 8, 3, 3)).shape
    (torch.Size([2, 8, 3, 3]), torch.Size([2, 3, 6, 6]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        mode: Mode = "stride",
        act: Activation = "elu",
        bias: bool | None = None,
        norm: bool = False,
    ) -> None:
        super().__init__()
        check_kernel(kernel)
        if mode not in ("stride", "pool", "same", "up"):
            raise ValueError(f"mode: expected 'stride', 'pool', 'same' or 'up', got {mode!r}")
        bias = mode != "pool" if bias is None else bias
        self.inputs, self.outputs, self.mode, self.act = in_channels, out_channels, mode, activation(act)
        self.config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel": kernel,
            "mode": mode,
            "act": act,
            "bias": bias,
            "norm": norm,
        }
        half = kernel // 2
        self.F = nn.Conv2d(in_channels, out_channels, kernel, 2 if mode == "stride" else 1, half, bias=bias)
        self.B = nn.Conv2d(out_channels, in_channels, kernel, 2 if mode == "up" else 1, half, bias=bias)
        self.norm_F = nn.BatchNorm2d(out_channels, affine=False) if norm else nn.Identity()
        self.norm_B = nn.BatchNorm2d(in_channels, affine=False) if norm else nn.Identity()
        _zero_biases(self)

    def forward(self, x: Float[Tensor, "n i h w"], local: bool = False, act: bool = True) -> Float[Tensor, "n o h2 w2"]:
        """Up; with `local` no gradient reaches x, without `act` there is neither phi nor batch normalisation."""
        if self.mode in ("stride", "pool"):
            _check_even("x", x)
        x = x.detach() if local else x
        a = self.F(_double(x) if self.mode == "up" else x)
        a = self.act(self.norm_F(a)) if act else a
        return functional.max_pool2d(a, 2) if self.mode == "pool" else a

    def reverse(self, c: Float[Tensor, "k o h w"], local: bool = False, act: bool = True) -> Float[Tensor, "k i h2 w2"]:
        """Down; with `local` no gradient reaches c, without `act` there is neither phi nor batch normalisation."""
        if self.mode == "up":
            _check_even("c", c)
        c = c.detach() if local else c
        below = self.B(_double(c) if self.mode in ("stride", "pool") else c)
        return self.act(self.norm_B(below)) if act else below


class DualFlatten(nn.Module):
    """Maps of the given shape (C, H, W) to rows, and rows to maps.

    Examples
    --------
    >>> import torch
    >>> layer = DualFlatten((2, 3, 3))
    >>> layer(torch.randn(5, 2, 3, 3)).shape, layer.reverse(torch.randn(4, 18)).shape
    (torch.Size([5, 18]), torch.Size([4, 2, 3, 3]))
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.inputs, self.outputs = self.shape[0], torch.Size(self.shape).numel()
        self.config = {"shape": list(shape)}

    def forward(self, x: Float[Tensor, "n *shape"], local: bool = False) -> Float[Tensor, "n d"]:
        """Rows; with `local` no gradient reaches x."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x: expected shape (N, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        return (x.detach() if local else x).flatten(1)

    def reverse(self, c: Float[Tensor, "k d"], local: bool = False) -> Float[Tensor, "k *shape"]:
        """Maps; with `local` no gradient reaches c."""
        return (c.detach() if local else c).unflatten(1, self.shape)


def _zero_biases(layer: nn.Module) -> None:
    for name, p in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)


def _double(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def _check_even(name: str, x: Tensor) -> None:
    if x.shape[-1] % 2 or x.shape[-2] % 2:
        raise ValueError(f"{name}: expected even height and width, got {tuple(x.shape[-2:])}")


Dual = DualLinear | DualConv2d | DualFlatten


class DualSequential(Network):
    """Dual layers one upon the other; called like any network it is the upward one, gradients and all.

    A flattening belongs to the layer below it, so that L linear layers and convolutions make L + 1 states each way.

    Parameters
    ----------
    *layers : DualLinear, DualConv2d or DualFlatten
        From the input up.

    Examples
    --------
    >>> import torch
    >>> model = DualSequential(DualConv2d(1, 4), DualFlatten((4, 2, 2)), DualLinear(16, 3))
    >>> [tuple(a.shape) for a in model.forward_states(torch.randn(5, 1, 4, 4))]
    [(5, 1, 4, 4), (5, 16), (5, 3)]
    >>> [tuple(c.shape) for c in model.feedback_states(torch.eye(3))]
    [(3, 1, 4, 4), (3, 16), (3, 3)]
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        last: int | None = None
        self._stages: list[list[Any]] = [[]]
        for number, layer in enumerate(layers, 1):
            if not isinstance(layer, Dual):
                kind = type(layer).__name__
                raise TypeError(f"layers: expected DualLinear, DualConv2d or DualFlatten, got {kind}")
            if last not in (None, layer.inputs):
                raise ValueError(f"layers: layer {number} takes {layer.inputs}, but layer {number - 1} gives {last}")
            last = layer.outputs
            if isinstance(layer, DualFlatten):
                self._stages[-1].append(layer)
            else:
                self._stages.append([layer])
        self.depth = len(self._stages) - 1
        if not self.depth or last is None:
            raise ValueError("layers: expected at least one DualLinear or DualConv2d, got none")
        self.classes = last
        self.layers = nn.ModuleList(layers)

    def forward_stage(self, i: int, a: Tensor, local: bool = False) -> Tensor:
        """a_i of a_{i-1}, for i from 1 to L."""
        layer, *flatten = self._stages[i]
        a = layer(a, local=local, act=i < self.depth)
        for part in flatten:
            a = part(a)
        return a

    def feedback_stage(self, i: int, c: Tensor, local: bool = False) -> Tensor:
        """c_{i-1} of c_i, for i from L to 1."""
        layer, *flatten = self._stages[i]
        for part in reversed(flatten):
            c = part.reverse(c)
        below: Tensor = layer.reverse(c, local=local, act=i > 1)
        return below

    def start(self, x: Float[Tensor, "n *shape"]) -> Tensor:
        """a_0: the input, flattened if the network begins so."""
        for part in self._stages[0]:
            x = part(x)
        return x

    def forward_states(self, x: Float[Tensor, "n *shape"], local: bool = False) -> list[Tensor]:
        """a_0, ..., a_L; with `local` no gradient crosses a layer."""
        states = [self.start(x)]
        for i in range(1, self.depth + 1):
            states.append(self.forward_stage(i, states[-1], local))
        return states

    def feedback_states(self, target: Float[Tensor, "k *shape"], local: bool = True) -> list[Tensor]:
        """c_0, ..., c_L of the target, in the order of ``forward_states``; with `local` no gradient crosses a layer."""
        states = [target]
        for i in range(self.depth, 0, -1):
            states.append(self.feedback_stage(i, states[-1], local))
        return states[::-1]

    def forward_parameters(self) -> list[nn.Parameter]:
        """All F_i, from the bottom up."""
        return [p for stage in self._stages[1:] for p in stage[0].F.parameters()]

    def feedback_parameters(self) -> list[nn.Parameter]:
        """All B_i, from the bottom up."""
        return [p for stage in self._stages[1:] for p in stage[0].B.parameters()]

    def readout_parameters(self) -> list[nn.Parameter]:
        """F_L."""
        return list(self._stages[-1][0].F.parameters())

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """F_i and B_i of every layer, from the bottom up."""
        return [(stage[0].F.weight, stage[0].B.weight) for stage in self._stages[1:]]


class CCLNetwork(DualSequential, Classifier):
    """Dual network for rows or images: the paper's multilayer perceptron, or its convolutional network.

    Parameters
    ----------
    shape, classes, hidden, kind
        As for [`LayeredNetwork`][classact.rules.LayeredNetwork]. The paper's networks have (256,) * 5 (MNIST) and
        (1024,) * 3 (CIFAR) linear layers, or (128, 128, 256, 256, 512) convolutions.
    pool : bool
        Convolutions with pooling in place of strides.
    act, kernel, bias
        As there.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> import torch
    >>> x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    >>> x = x.float() / 16
    >>> model = fit_ccl(CCLNetwork.for_data((64,), classes=10, hidden=(64, 64)), x[:1000], y[:1000], epochs=20)
    >>> bool((model.predict_proba(x[1000:]).argmax(1) == y[1000:]).float().mean() > 0.8)
    True
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        hidden: Sequence[int] = (256, 256, 256),
        kind: Kind = "mlp",
        pool: bool = False,
        act: Activation = "elu",
        kernel: int = 3,
        bias: bool = False,
    ) -> None:
        layers: list[nn.Module] = []
        for name, inputs, outputs, before in layout(shape, classes, hidden, kind):
            if name == "flatten":
                layers.append(DualFlatten(before))
            elif name == "linear":
                layers.append(DualLinear(inputs, outputs, act, bias))
            else:
                mode: Mode = "same" if name == "same" else "pool" if pool else "stride"
                layers.append(DualConv2d(inputs, outputs, kernel, mode, act))
        super().__init__(*layers)
        self.shape = tuple(shape)
        self.config = {
            "shape": list(shape),
            "classes": classes,
            "hidden": list(hidden),
            "kind": kind,
            "pool": pool,
            "act": act,
            "kernel": kernel,
            "bias": bias,
        }

    def forward_states(self, x: Float[Tensor, "n *shape"], local: bool = False) -> list[Tensor]:
        """a_0, ..., a_L; with `local` no gradient crosses a layer."""
        self._check(x)
        return super().forward_states(x, local)


class DualAutoencoder(DualSequential):
    """The paper's convolutional autoencoder: strides down to a code, doubling back to an image, both networks alike.

    Batch normalisation and ReLU after every layer but the last of each network. Weights start orthogonal, those on the
    way to the image (the upper half of F, the lower half of B) scaled by 0.001, the last layer of each network at 0.

    Parameters
    ----------
    channels : int
        Of the images, whose height and width must be divisible by 2 ** len(widths).
    widths : sequence of int
        Channels of the encoder; the decoder mirrors it.
    kernel : int
        Odd side of the kernels.

    Examples
    --------
    >>> import torch
    >>> DualAutoencoder(1, (4, 8))(torch.randn(2, 1, 8, 8)).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = (128, 256, 1024, 2048),
        kernel: int = 3,
        act: Activation = "relu",
    ) -> None:
        if not widths:
            raise ValueError("widths: expected at least one width, got none")
        sizes = [channels, *widths]
        down = [DualConv2d(i, o, kernel, "stride", act, norm=True) for i, o in pairwise(sizes)]
        up = [DualConv2d(o, i, kernel, "up", act, norm=True) for i, o in pairwise(sizes)][::-1]
        super().__init__(*down, *up)
        self.config = {"channels": channels, "widths": list(widths), "kernel": kernel, "act": act}
        for layers, scale_F, scale_B in ((down, 1.0, 1e-3), (up, 1e-3, 1.0)):
            for layer in layers:
                for weight, scale in ((layer.F.weight, scale_F), (layer.B.weight, scale_B)):
                    _orthogonal(weight, scale)
        nn.init.zeros_(up[-1].F.weight)
        nn.init.zeros_(down[0].B.weight)


@torch.no_grad()
def _orthogonal(weight: Tensor, scale: float) -> None:
    """Orthogonal rows, or columns where these are fewer channels."""
    wide = weight if weight.shape[0] >= weight.shape[1] else weight.transpose(0, 1)
    wide.copy_(scale * nn.init.orthogonal_(torch.empty(wide.shape)))


class PairLoss(nn.Module):
    """What pulls a_i and c_i together.

    - ``"gram"``, for linear layers: ``256 s / d mean((A C^T - Y)^2)``, d the width, Y one-hot.
    - ``"cosine_gram"``, for convolutions, of rows of length 1:
      ``s mean((A C^T - Y)^2) + s' mean((A A^T - I)^2) + s' mean((C C^T - I)^2)``.
    - ``"ae"``: ``H s mean((A - C)^2) + H s' mean((A~ - C~)^2)`` of maps of height H, where ~ subtracts from each
      channel its mean over space and divides it by its norm.

    Parameters
    ----------
    kind : {"gram", "cosine_gram", "ae"}
        Which.
    scale, extra : float
        s and s'. The paper has s = 0.5 for gram, s = 1 (0.5 on MNIST and Fashion-MNIST) and s' = 0.5 for cosine_gram,
        and 1 and 1 for the autoencoder.

    Examples
    --------
    >>> import torch
    >>> A, C = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> PairLoss("gram", 0.5)(A, C, torch.tensor([0, 2]))
    tensor(149.3333)
    """

    def __init__(self, kind: PairKind = "gram", scale: float = 0.5, extra: float = 0.5) -> None:
        super().__init__()
        if kind not in ("gram", "cosine_gram", "ae"):
            raise ValueError(f"kind: expected 'gram', 'cosine_gram' or 'ae', got {kind!r}")
        if scale < 0 or extra < 0:
            raise ValueError(f"scale, extra: expected 0 or more, got {scale} and {extra}")
        self.kind, self.scale, self.extra = kind, scale, extra

    def forward(
        self, A: Float[Tensor, "n *a"], C: Float[Tensor, "k *c"], y: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, ""]:
        """Loss of a pair.

        Parameters
        ----------
        A : (N, ...)
            State of the batch, going up.
        C : (m, ...) or (N, ...)
            State of the m classes going down, or for ``"ae"`` of the batch's targets.
        y : (N,), optional
            Classes, which ``"ae"`` does not need.
        """
        if self.kind == "ae":
            if A.shape != C.shape or A.ndim != 4:
                raise ValueError(f"A, C: expected equal shapes (N, C, H, W), got {tuple(A.shape)} and {tuple(C.shape)}")
            loss = self.scale * functional.mse_loss(A, C)
            if self.extra:
                loss = loss + self.extra * functional.mse_loss(_standard(A), _standard(C))
            return A.shape[2] * loss
        A, C = A.flatten(1), C.flatten(1)
        if A.shape[1] != C.shape[1]:
            raise ValueError(f"A, C: expected rows of one width, got {A.shape[1]} and {C.shape[1]}")
        if y is None:
            raise ValueError(f"y: expected the classes for the kind {self.kind!r}, got None")
        wanted = (y.unsqueeze(1) == torch.arange(len(C), device=y.device)).to(A.dtype)
        if self.kind == "gram":
            return 256 * self.scale / A.shape[1] * functional.mse_loss(A @ C.T, wanted)
        A, C = (rows / (rows.norm(dim=1, keepdim=True) + 1e-8) for rows in (A, C))
        loss = self.scale * functional.mse_loss(A @ C.T, wanted)
        for rows in (A, C):
            eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
            loss = loss + self.extra * functional.mse_loss(rows @ rows.T, eye)
        return loss


def _standard(maps: Tensor) -> Tensor:
    maps = maps - maps.mean((2, 3), keepdim=True)
    return maps / (maps.norm(dim=(2, 3), keepdim=True) + 1e-8)


class CCLLoss(nn.Module):
    """All pairs and the top: cross-entropy of the logits, which trains F_L only.

    Parameters
    ----------
    kind, scale, extra
        Of [`PairLoss`][classact.rules.PairLoss]. With ``"ae"`` the top is the pair of a_L and the target, and it and
        the pair of the input have the first term only.
    confidence : float, optional
        Rows of A, in all pairs, whose class has a probability above it are set to 0, so that they teach nothing but
        still count in the mean; 0.9 in the paper's CNN for CIFAR-10, absent elsewhere.

    Examples
    --------
    >>> import torch
    >>> model, x, y = CCLNetwork.for_data((8,), 3, hidden=(4,)), torch.randn(6, 8), torch.arange(6) % 3
    >>> loss = CCLLoss()(model.forward_states(x, local=True), model.feedback_states(torch.eye(3)), y)
    >>> loss.backward()
    """

    def __init__(
        self, kind: PairKind = "gram", scale: float = 0.5, extra: float = 0.5, confidence: float | None = None
    ) -> None:
        super().__init__()
        if confidence is not None and not 0 < confidence < 1:
            raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
        self.pair, self.end = PairLoss(kind, scale, extra), PairLoss(kind, scale, 0.0 if kind == "ae" else extra)
        self.confidence = confidence

    @torch.no_grad()
    def unsure(self, logits: Float[Tensor, "n m"], y: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """1 for rows that take part, 0 for those whose class is sure already."""
        found: Tensor = logits.softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
        return (found <= (self.confidence or 1)).to(logits.dtype)

    def of_pair(
        self,
        i: int,
        depth: int,
        a: Float[Tensor, "n *a"],
        c: Float[Tensor, "k *c"],
        y: Tensor,
        unsure: Float[Tensor, " n"] | None = None,
    ) -> Float[Tensor, ""]:
        """Loss of pair i of L = `depth`."""
        if self.pair.kind == "ae":
            loss: Tensor = (self.end if i in (0, depth) else self.pair)(a, c)
        elif i == depth:
            loss = functional.cross_entropy(a, y)
        else:
            loss = self.pair(a if unsure is None else a.flatten(1) * unsure.unsqueeze(1), c, y)
        return loss

    def forward(self, states: Sequence[Tensor], feedback: Sequence[Tensor], y: Tensor) -> Float[Tensor, ""]:
        """Sum over the pairs.

        Parameters
        ----------
        states, feedback : L + 1 tensors each
            Of ``forward_states(x, local=True)`` and ``feedback_states(target)``.
        y : (N,)
            Classes; ``"ae"`` does not look at them.
        """
        if len(states) != len(feedback):
            raise ValueError(f"states, feedback: expected equally many, got {len(states)} and {len(feedback)}")
        depth = len(states) - 1
        unsure = None if self.confidence is None else self.unsure(states[-1], y)
        pairs = enumerate(zip(states, feedback, strict=True))
        return torch.stack([self.of_pair(i, depth, a, c, y, unsure) for i, (a, c) in pairs]).sum()


def ccl_losses(
    model: DualSequential, loss: CCLLoss, x: Float[Tensor, "n *shape"], y: Tensor, parallel_update: bool = True
) -> Iterator[Tensor]:
    """Yield losses whose gradients add up to those of a step.

    Parameters
    ----------
    model, loss
        Dual network and its loss.
    x : (N, ...)
        Inputs.
    y : (N,) integers, or (N, ...)
        Classes, or targets like x.
    parallel_update : bool
        One loss per pair, made when it is asked for: if each is back-propagated before the next, as much memory is
        needed as one layer takes. Otherwise their sum.
    """
    target = y if y.is_floating_point() else torch.eye(model.classes, device=x.device)
    feedback = model.feedback_states(target)
    if not parallel_update:
        yield loss(model.forward_states(x, local=True), feedback, y)
        return
    unsure = None
    if loss.confidence is not None:
        with torch.no_grad():
            unsure = loss.unsure(model(x), y)
    a = model.start(x)
    for i in range(model.depth + 1):
        a = model.forward_stage(i, a, local=True) if i else a
        # popped, so that what a pair holds is free once it is back-propagated
        yield loss.of_pair(i, model.depth, a, feedback.pop(0), y, unsure)
        a = a.detach()


DualNetwork = TypeVar("DualNetwork", bound=DualSequential)


def default_loss(model: DualSequential) -> CCLLoss:
    """Return the paper's loss for an autoencoder, a network with convolutions, or one of linear layers."""
    if isinstance(model, DualAutoencoder):
        return CCLLoss("ae", 1.0, 1.0)
    convolutions = any(isinstance(layer, DualConv2d) for layer in model.layers)
    return CCLLoss("cosine_gram", 1.0, 0.5) if convolutions else CCLLoss("gram", 0.5)


def fit_ccl(
    model: DualNetwork,
    x: Float[Tensor, "n *shape"],
    y: Tensor,
    *,
    epochs: int = 10,
    lr: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device = "cpu",
    loss: CCLLoss | None = None,
    feedback_lr: float | None = None,
    parallel_update: bool = True,
    **settings: Any,
) -> DualNetwork:
    """Train both networks in place by counter-current learning.

    By default with the paper's settings for linear layers: SGD with a learning rate of 1, gradients of each network
    clipped to a norm of 1. Its convolutional networks have ``momentum=0.8, weight_decay=1e-6, clip=0.3, warmup=100,
    cosine=True, centralise=True`` and a confidence of 0.9 on CIFAR-10, its autoencoder ``lr=0.01, momentum=0.9,
    weight_decay=1e-4, batch_size=32, clip=0.2, cosine=True, centralise=True, warmup=100``.

    Parameters
    ----------
    model : DualSequential
        The networks.
    x : (N, ...)
        Inputs.
    y : (N,) integers, or (N, ...)
        Classes; or for an autoencoder targets like x: the images themselves, or other views of them.
    epochs, lr, batch_size, seed, device, **settings
        See [`fit`][classact.rules.feedback_alignment.fit].
    loss : CCLLoss, optional
        By default the paper's for this kind of network.
    feedback_lr : float, optional
        Learning rate of the downward network, if it is another.
    parallel_update : bool
        See [`ccl_losses`][classact.rules.ccl.ccl_losses]. The result is the same up to rounding.
    """
    criterion = default_loss(model) if loss is None else loss
    if y.is_floating_point() != (criterion.pair.kind == "ae"):
        wanted = "targets like x" if criterion.pair.kind == "ae" else "integer classes"
        raise ValueError(f"y: expected {wanted} for the loss {criterion.pair.kind!r}, got {y.dtype}")

    def losses(x: Tensor, y: Tensor) -> Iterator[Tensor]:
        return ccl_losses(model, criterion, x, y, parallel_update)

    parameters = [model.forward_parameters(), model.feedback_parameters()]
    rates = [lr, lr if feedback_lr is None else feedback_lr]
    run: dict[str, Any] = {"epochs": epochs, "lr": rates, "batch_size": batch_size, "seed": seed, "device": device}
    return fit(model, x, y, parameters, losses, **run, **settings)


def linear_cka(A: Float[Tensor, "n d"], C: Float[Tensor, "n e"]) -> float:
    """Linear centred kernel alignment of two representations of the same examples, from 0 to 1; NaN if one is constant.

    Examples
    --------
    >>> import torch
    >>> A = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    >>> round(linear_cka(A, 3 * A + 1), 6)
    1.0
    """
    A, C = (rows.double() - rows.double().mean(0) for rows in (A, C))
    if max(A.shape[1], C.shape[1]) > len(A):
        K, L = A @ A.T, C @ C.T
        return float((K * L).sum() / (K.norm() * L.norm()))
    return float((A.T @ C).square().sum() / ((A.T @ A).norm() * (C.T @ C).norm()))


class Alignment(NamedTuple):
    """How alike the two networks are."""

    cka: Float[Tensor, "a c"]
    """Linear CKA of a_i and c_j, for i, j = 1, ..., L - 1."""
    cosine: Float[Tensor, " layers"]
    """Cosine of F_i and the transpose of B_i, for i = 1, ..., L; of convolutions, the transposed convolution."""


@torch.no_grad()
def alignment(model: DualSequential, loader: Iterable[Any]) -> Alignment:
    """Similarity of states and weights of the two networks.

    Parameters
    ----------
    model : DualSequential
        Left in the mode it was in; it is run in evaluation mode.
    loader : iterable of (x, y) or x
        With integer classes y, every example's c_j is that of its class; with targets y like x, or without y, that of
        its target, which is x by default. All examples are held at once.

    Returns
    -------
    Alignment
        CKA of all pairs of hidden states, and cosines of the weights.
    """
    training, device = model.training, next(model.parameters()).device
    up: list[list[Tensor]] = []
    down: list[list[Tensor]] = []
    try:
        model.eval()
        for batch in loader:
            x, *rest = batch if isinstance(batch, list | tuple) else (batch,)
            x = x.to(device)
            y = rest[0].to(device) if rest else x
            up.append([a.flatten(1) for a in model.forward_states(x)[1:-1]])
            if y.is_floating_point():
                down.append([c.flatten(1) for c in model.feedback_states(y)[1:-1]])
            else:
                classes = model.feedback_states(torch.eye(model.classes, device=device))
                down.append([c.flatten(1)[y] for c in classes[1:-1]])
    finally:
        model.train(training)
    if not up:
        raise ValueError("loader: expected at least one batch, got none")
    if model.depth < 2:
        raise ValueError(f"model: expected at least one hidden layer, got {model.depth - 1}")
    above, below = ([torch.cat(parts) for parts in zip(*found, strict=True)] for found in (up, down))
    cka = torch.tensor([[linear_cka(a, c) for c in below] for a in above])
    cosine = []
    for weight, back in model.weights():
        mirrored = back.transpose(0, 1).flip((2, 3)) if back.ndim == 4 else back.T
        cosine.append(functional.cosine_similarity(weight.flatten(), mirrored.flatten(), 0))
    return Alignment(cka, torch.stack(cosine).cpu())
