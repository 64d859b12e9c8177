"""Feedback alignment and direct feedback alignment, beside back-propagation and a readout of random layers.

Lillicrap, Cownden, Tweed, Akerman: Random synaptic feedback weights support error backpropagation for deep learning,
Nature Communications 2016, https://doi.org/10.1038/ncomms13276. Noekland: Direct feedback alignment provides learning
in deep neural networks, NIPS 2016, https://arxiv.org/abs/1609.01596.

Back-propagation carries the error of layer i to the layer below by the transpose of W_i. Feedback alignment (FA) puts
a fixed random B_i in its place; direct feedback alignment (DFA) takes the error of the output to every hidden layer at
once, by a fixed random matrix each. Layers themselves learn as always: error times input.

All rules of this family are called alike, ``Rule.for_data(shape, classes, ...)`` and ``fit_rule(model, x, y, ...)``,
and make the same network of the same settings: widths, activation, biases (none in linear layers, convolutions start
with 0).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from classact.rules.noprop import _check_data

Kind = Literal["mlp", "cnn"]
Activation = Literal["elu", "relu", "leaky_relu", "selu", "tanh"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "selu": F.selu,
    "tanh": torch.tanh,
}


def activation(act: str) -> Callable[[Tensor], Tensor]:
    """Return the activation of that name."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act: expected one of {', '.join(ACTIVATIONS)}, got {act!r}")
    return ACTIVATIONS[act]


class _FeedbackLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, feedback: Tensor) -> Tensor:  # noqa: ARG004
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[0], inputs[3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, feedback = ctx.saved_tensors
        grad = grad.to(feedback.dtype)
        rows = grad.flatten(0, -2)
        of_x = grad @ feedback if ctx.needs_input_grad[0] else None
        of_weight = rows.mT @ x.flatten(0, -2).to(grad.dtype) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None, None


class _FeedbackConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        feedback: Tensor,  # noqa: ARG004
        stride: Any,
        padding: Any,
    ) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[0], inputs[3])
        ctx.where = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, feedback = ctx.saved_tensors
        grad, x = grad.to(feedback.dtype), x.to(feedback.dtype)
        needs = ctx.needs_input_grad
        of_x = conv2d_input(x.shape, feedback, grad, *ctx.where) if needs[0] else None
        of_weight = conv2d_weight(x, feedback.shape, grad, *ctx.where) if needs[1] else None
        return of_x, of_weight, grad.sum((0, 2, 3)) if needs[2] else None, None, None, None


def feedback_linear(
    x: Float[Tensor, "*n i"],
    weight: Float[Tensor, "o i"],
    bias: Float[Tensor, " o"] | None,
    feedback: Float[Tensor, "o i"],
) -> Float[Tensor, "*n o"]:
    """``x W^T + b``, whose gradient for x is ``grad B`` in place of ``grad W``.

    Examples
    --------
    >>> import torch
    >>> x, w, b = torch.ones(1, 2, requires_grad=True), torch.ones(3, 2), torch.zeros(3, 2)
    >>> feedback_linear(x, w, None, b).sum().backward()
    >>> x.grad
    tensor([[0., 0.]])
    """
    if feedback.shape != weight.shape:
        raise ValueError(f"feedback: expected the weight's shape {tuple(weight.shape)}, got {tuple(feedback.shape)}")
    if x.ndim < 2:
        raise ValueError(f"x: expected shape (..., {weight.shape[1]}) with at least 2 dimensions, got {tuple(x.shape)}")
    if torch.compiler.is_compiling():  # the same in the operations that compilers and exporters know
        through = F.linear(x, feedback)
        return F.linear(x.detach(), weight, bias) + (through - through.detach())
    y: Tensor = _FeedbackLinear.apply(x, weight, bias, feedback)
    return y


def feedback_conv2d(
    x: Float[Tensor, "n i h w"],
    weight: Float[Tensor, "o i k1 k2"],
    bias: Float[Tensor, " o"] | None,
    feedback: Float[Tensor, "o i k1 k2"],
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
) -> Float[Tensor, "n o h2 w2"]:
    """Cross-correlate with W; the gradient for x is that of a convolution with B."""
    if feedback.shape != weight.shape:
        raise ValueError(f"feedback: expected the weight's shape {tuple(weight.shape)}, got {tuple(feedback.shape)}")
    if torch.compiler.is_compiling():
        through = F.conv2d(x, feedback, None, stride, padding)
        return F.conv2d(x.detach(), weight, bias, stride, padding) + (through - through.detach())
    y: Tensor = _FeedbackConv2d.apply(x, weight, bias, feedback, stride, padding)
    return y


class FALinear(nn.Linear):
    """Linear layer whose error goes down by the buffer ``feedback``, drawn as the weight is and never trained."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.config = {"in_features": in_features, "out_features": out_features, "bias": bias}
        self.register_buffer("feedback", nn.init.kaiming_uniform_(torch.empty_like(self.weight), math.sqrt(5)))

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """``x W^T + b``."""
        return feedback_linear(x, self.weight, self.bias, self.feedback)  # type: ignore[arg-type]


class FAConv2d(nn.Conv2d):
    """Convolution whose error goes down by the buffer ``feedback``, drawn as the weight is and never trained."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": padding,
            "bias": bias,
        }
        self.register_buffer("feedback", nn.init.kaiming_uniform_(torch.empty_like(self.weight), math.sqrt(5)))

    def forward(self, x: Float[Tensor, "n i h w"]) -> Float[Tensor, "n o h2 w2"]:
        """Cross-correlate with W, add b."""
        feedback: Any = self.feedback
        return feedback_conv2d(x, self.weight, self.bias, feedback, self.stride, self.padding)  # type: ignore[arg-type]


class Step(NamedTuple):
    """One step of a network: a linear layer, a convolution of stride 1 or 2, or the flattening of a map."""

    name: Literal["linear", "same", "stride", "flatten"]
    inputs: int
    outputs: int
    shape: tuple[int, ...]
    """Of what comes in."""


def layout(shape: Sequence[int], classes: int, hidden: Sequence[int], kind: Kind) -> list[Step]:
    """Steps of the network that all rules make.

    ``"mlp"``: the input flattened, linear layers of the widths `hidden`, and a linear readout. ``"cnn"``: convolutions
    of the widths `hidden`, each with stride 2 as long as height and width are even, and a linear readout of the
    flattened map.

    Raises
    ------
    ValueError
        If `shape` is not (D,) or (C, H, W), a width is below 1, there are fewer than 2 classes, or a CNN is asked for
        rows.

    Examples
    --------
    >>> [(step.name, step.outputs) for step in layout((1, 28, 28), 10, (8, 16, 32), "cnn")]
    [('stride', 8), ('stride', 16), ('same', 32), ('flatten', 1568), ('linear', 10)]
    """
    shape = tuple(shape)
    if len(shape) not in (1, 3) or min(shape) < 1:
        raise ValueError(f"shape: expected (D,) or (C, H, W), got {shape}")
    if classes < 2:
        raise ValueError(f"classes: expected at least 2, got {classes}")
    if not hidden or min(hidden) < 1:
        raise ValueError(f"hidden: expected at least one width of 1 or more, got {list(hidden)}")
    if kind not in ("mlp", "cnn"):
        raise ValueError(f"kind: expected 'mlp' or 'cnn', got {kind!r}")
    steps: list[Step] = []
    if kind == "cnn":
        if len(shape) != 3:
            raise ValueError(f"kind: expected 'mlp' for rows of shape {shape}, got 'cnn'")
        for width in hidden:
            even = not (shape[1] % 2 or shape[2] % 2)
            steps.append(Step("stride" if even else "same", shape[0], width, shape))
            shape = (width, *(side // 2 if even else side for side in shape[1:]))
    if len(shape) == 3:
        steps.append(Step("flatten", shape[0], math.prod(shape), shape))
    last = math.prod(shape)
    for width in (*(hidden if kind == "mlp" else ()), classes):
        steps.append(Step("linear", last, width, (last,)))
        last = width
    return steps


class Network(nn.Module):
    """Layers one after the other, for all rules."""

    classes: int

    def forward_states(self, x: Float[Tensor, "n *shape"], local: bool = False) -> list[Tensor]:
        """Input, output of every layer, logits; with `local`, no gradient leaves a layer for the one below."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "n *shape"]) -> Float[Tensor, "n *out"]:
        """Logits, or whatever the last layer answers."""
        return self.forward_states(x)[-1]

    def forward_parameters(self) -> list[nn.Parameter]:
        """Weights that answer, from the bottom up."""
        raise NotImplementedError

    def readout_parameters(self) -> list[nn.Parameter]:
        """Weights of the last layer."""
        raise NotImplementedError


AnyNetwork = TypeVar("AnyNetwork", bound=Network)
AnyClassifier = TypeVar("AnyClassifier", bound="Classifier")


class Classifier(Network):
    """What the classifiers of all rules share: ``for_data`` and ``predict_proba``."""

    shape: tuple[int, ...]

    @classmethod
    def for_data(  # noqa: PYI019 - the run-time checks of the tests do not know Self
        cls: type[AnyClassifier],
        shape: Sequence[int],
        classes: int,
        *,
        hidden: Sequence[int] = (256, 256, 256),
        kind: Kind = "mlp",
        seed: int = 0,
        **settings: Any,
    ) -> AnyClassifier:
        """Build the network for rows (D,) or images (C, H, W), with weights drawn from `seed`.

        Parameters
        ----------
        shape : sequence of int
            Of one input. A multilayer perceptron flattens images.
        classes : int
            Number of classes.
        hidden : sequence of int
            Widths of the hidden layers, or channels of the convolutions.
        kind : {"mlp", "cnn"}
            Linear layers or convolutions.
        seed : int
            Equal seeds, equal weights; the global random state stays as it is.
        **settings
            Of the class itself.
        """
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return cls(shape, classes, hidden=hidden, kind=kind, **settings)

    @torch.no_grad()
    def predict_proba(self, x: Float[Tensor, "n *shape"], batch_size: int = 1000) -> Float[Tensor, "n m"]:
        """Probabilities of the classes, rows sum to 1; the network stays in the mode it was in."""
        training, device = self.training, next(self.parameters()).device
        try:
            self.eval()
            found = [self(part.to(device)).float().softmax(-1) for part in x.split(batch_size)]
        finally:
            self.train(training)
        return torch.cat(found)

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x: expected shape (N, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")


class LayeredNetwork(Classifier):
    """Linear layers or convolutions, an activation after all but the last.

    Parameters
    ----------
    shape, classes, hidden, kind
        As for [`layout`][classact.rules.feedback_alignment.layout].
    act : str
        Activation: elu, relu, leaky_relu, selu or tanh.
    kernel : int
        Odd side of the kernels of a CNN.
    bias : bool
        Whether linear layers have biases. Those of convolutions start at 0.

    Examples
    --------
    >>> import torch
    >>> model = LayeredNetwork.for_data((1, 8, 8), classes=3, hidden=(4, 8), kind="cnn")
    >>> [tuple(state.shape) for state in model.forward_states(torch.randn(2, 1, 8, 8))]
    [(2, 1, 8, 8), (2, 4, 4, 4), (2, 8, 2, 2), (2, 3)]
    """

    linear: ClassVar[type[nn.Linear]] = nn.Linear
    conv: ClassVar[type[nn.Conv2d]] = nn.Conv2d

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        hidden: Sequence[int] = (256, 256, 256),
        kind: Kind = "mlp",
        act: Activation = "elu",
        kernel: int = 3,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_kernel(kernel)
        self.shape, self.classes, self.act = tuple(shape), classes, activation(act)
        self.config = {
            "shape": list(shape),
            "classes": classes,
            "hidden": list(hidden),
            "kind": kind,
            "act": act,
            "kernel": kernel,
            "bias": bias,
        }
        self.layers = nn.ModuleList()
        for name, inputs, outputs, _ in layout(shape, classes, hidden, kind):
            if name == "linear":
                self.layers.append(self.linear(inputs, outputs, bias=bias))
            elif name != "flatten":
                stride = 2 if name == "stride" else 1
                layer = self.conv(inputs, outputs, kernel, stride=stride, padding=kernel // 2)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
                self.layers.append(layer)

    def forward_states(self, x: Float[Tensor, "n *shape"], local: bool = False) -> list[Tensor]:
        """Input, output of every layer, logits; with `local`, no gradient leaves a layer for the one below."""
        self._check(x)
        states = [x]
        for i, layer in enumerate(self.layers, 1):
            h = states[-1].detach() if local else states[-1]
            h = layer(h.flatten(1) if isinstance(layer, nn.Linear) else h)
            states.append(self.act(h) if i < len(self.layers) else h)
        return states

    def forward_parameters(self) -> list[nn.Parameter]:
        """All weights."""
        return list(self.layers.parameters())

    def readout_parameters(self) -> list[nn.Parameter]:
        """Weights of the last layer."""
        return list(self.layers[-1].parameters())


class FeedbackAlignment(LayeredNetwork):
    """Network trained by feedback alignment: the errors go down by fixed random weights, by whatever loss.

    Parameters are those of [`LayeredNetwork`][classact.rules.LayeredNetwork]. The feedback is in the buffers
    ``layers.<i>.feedback``, of the shape of the weights.

    Examples
    --------
    >>> import torch
    >>> model = FeedbackAlignment.for_data((8,), classes=3, hidden=(16, 16))
    >>> x, y = torch.randn(60, 8), torch.arange(60) % 3
    >>> fit_fa(model, x, y, epochs=2).predict_proba(x).shape
    torch.Size([60, 3])
    """

    linear = FALinear
    conv = FAConv2d


class DirectFeedbackAlignment(LayeredNetwork):
    """Network trained by direct feedback alignment.

    The error e = dL/da_L of the logits reaches hidden layer i as ``e B_i``, where B_i (classes, units) is fixed,
    uniform on +-1/sqrt(classes), in the buffer ``feedback_<i>``; the layer then learns as if that were the gradient of
    its output.

    Parameters are those of [`LayeredNetwork`][classact.rules.LayeredNetwork].

    Examples
    --------
    >>> import torch
    >>> model = DirectFeedbackAlignment.for_data((8,), classes=3, hidden=(16, 16))
    >>> x, y = torch.randn(60, 8), torch.arange(60) % 3
    >>> fit_dfa(model, x, y, epochs=2).predict_proba(x).shape
    torch.Size([60, 3])
    """

    def __init__(self, shape: Sequence[int], classes: int, **settings: Any) -> None:
        super().__init__(shape, classes, **settings)
        with torch.no_grad():
            states = self.forward_states(torch.zeros(1, *shape))
        bound = 1 / math.sqrt(classes)
        for i, state in enumerate(states[1:-1], 1):
            self.register_buffer(f"feedback_{i}", torch.empty(classes, state.numel()).uniform_(-bound, bound))

    def losses(self, x: Float[Tensor, "n *shape"], y: Int[Tensor, " n"]) -> Iterator[Tensor]:
        """Cross-entropy, with a gradient for the last layer only, and for every hidden layer its own surrogate.

        The gradient of a surrogate ``sum(a_i * e B_i)`` is direct feedback alignment's; its value means nothing.
        """
        states = self.forward_states(x, local=True)
        loss = F.cross_entropy(states[-1], y)
        (error,) = torch.autograd.grad(loss, states[-1], retain_graph=True)
        yield loss
        for i, state in enumerate(states[1:-1], 1):
            yield (state.flatten(1) * (error @ getattr(self, f"feedback_{i}"))).sum()


def check_kernel(kernel: int) -> None:
    """Raise unless `kernel` is odd."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel: expected an odd number of at least 1, got {kernel}")


def settle(parameters: Sequence[Sequence[nn.Parameter]], clip: float | None, centralise: bool) -> None:
    """What happens to gradients before a step, in place.

    With `centralise`, every weight's gradient loses its mean over all but the first dimension; then the gradients of
    each group are clipped to a norm of `clip`.
    """
    for group in parameters:
        for p in group if centralise else ():
            if p.grad is not None and p.ndim > 1:
                p.grad -= p.grad.mean(tuple(range(1, p.ndim)), keepdim=True)
        if clip is not None:
            nn.utils.clip_grad_norm_(group, clip)


def fit(
    model: AnyNetwork,
    x: Tensor,
    y: Tensor,
    parameters: Sequence[Sequence[nn.Parameter]],
    losses: Callable[[Tensor, Tensor], Iterable[Tensor]],
    *,
    epochs: int,
    lr: float | Sequence[float],
    batch_size: int,
    seed: int,
    device: str | torch.device,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    centralise: bool = False,
    warmup: int = 0,
    cosine: bool = False,
) -> AnyNetwork:
    """Train in place by stochastic gradient descent; the loop of all rules.

    Parameters
    ----------
    model : Module
        Comes back on `device`, in evaluation mode.
    x, y : (N, ...)
        Inputs and targets.
    parameters
        Groups of weights, each with gradients clipped by themselves.
    losses : callable
        ``losses(x, y)``; each is back-propagated before the next one is asked for.
    epochs, batch_size, momentum, weight_decay
        Of the descent.
    lr : float or one per group
        Learning rates.
    seed : int
        Equal seeds, equal results on the same device; the global random state stays as it is.
    device : str or device
        Where to train.
    clip : float, optional
        Largest norm of the gradient of a group.
    centralise : bool
        Subtract from every weight's gradient its mean over all but the first dimension.
    warmup : int
        Losses of step s < `warmup` are multiplied by (s + 1) / warmup.
    cosine : bool
        Let the learning rates fall to 0.001 along a cosine, in steps of an epoch.

    Raises
    ------
    ValueError
        If shapes, classes or settings do not fit, or x has values that are not finite.
    """
    if y.is_floating_point() and y.ndim > 1:
        if x.shape != y.shape or len(x) < 2:
            raise ValueError(
                f"x, y: expected N >= 2 inputs and targets of one shape, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if not bool(x.isfinite().all()):
            raise ValueError("x: expected finite numbers, got NaN or infinity")
    else:
        _check_data(x, y, model.classes)
    for name, number in (("epochs", epochs), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    rates = [lr] * len(parameters) if isinstance(lr, int | float) else list(lr)
    if min(rates) <= 0 or len(rates) != len(parameters):
        raise ValueError(f"lr: expected a positive number, got {lr}")
    if clip is not None and clip <= 0:
        raise ValueError(f"clip: expected a positive number or None, got {clip}")
    model.to(device).train()
    x, y = x.to(device), y.to(device)
    groups = [{"params": list(group), "lr": rate} for group, rate in zip(parameters, rates, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=min(1e-3, *rates))
    step = 0
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).to(x.device).split(batch_size):
                optimizer.zero_grad()
                factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
                for loss in losses(x[rows], y[rows]):
                    (loss * factor if factor < 1 else loss).backward()
                settle(parameters, clip, centralise)
                optimizer.step()
                step += 1
            if cosine:
                schedule.step()
    optimizer.zero_grad()
    return model.eval()


def backprop_losses(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Cross-entropy of the whole network; the mean squared error, where the targets are no classes."""
    yield F.mse_loss(model(x), y) if y.is_floating_point() else F.cross_entropy(model(x), y)


def readout_losses(model: Network, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """As [`backprop_losses`][classact.rules.feedback_alignment.backprop_losses], for the last layer only."""
    out = model.forward_states(x, local=True)[-1]
    yield F.mse_loss(out, y) if y.is_floating_point() else F.cross_entropy(out, y)


def fit_backprop(
    model: AnyNetwork,
    x: Float[Tensor, "n *shape"],
    y: Tensor,
    *,
    epochs: int = 10,
    lr: float = 0.1,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device = "cpu",
    **settings: Any,
) -> AnyNetwork:
    """Train the forward weights by back-propagation.

    Parameters
    ----------
    model : network of any rule but feedback alignment
        Its feedback weights, if any, stay as they are.
    x : (N, ...)
        Inputs.
    y : (N,) integers, or (N, ...)
        Classes, or targets of the shape of x for the mean squared error.
    epochs, lr, batch_size, seed, device, **settings
        See [`fit`][classact.rules.feedback_alignment.fit].
    """
    if isinstance(model, FeedbackAlignment):
        raise TypeError("model: expected a network that passes its own gradients on, got FeedbackAlignment, see fit_fa")

    def losses(x: Tensor, y: Tensor) -> Iterator[Tensor]:
        return backprop_losses(model, x, y)

    run: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed, "device": device}
    return fit(model, x, y, [model.forward_parameters()], losses, **run, **settings)


def fit_readout(
    model: AnyNetwork,
    x: Float[Tensor, "n *shape"],
    y: Tensor,
    *,
    epochs: int = 10,
    lr: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device = "cpu",
    **settings: Any,
) -> AnyNetwork:
    """Train the last layer only, on hidden layers that stay random: what a rule must beat to have taught them a thing.

    Arguments are those of [`fit_backprop`][classact.rules.fit_backprop].
    """

    def losses(x: Tensor, y: Tensor) -> Iterator[Tensor]:
        return readout_losses(model, x, y)

    run: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed, "device": device}
    return fit(model, x, y, [model.readout_parameters()], losses, **run, **settings)


def fit_fa(
    model: FeedbackAlignment,
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, " n"],
    *,
    epochs: int = 10,
    lr: float = 0.1,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device = "cpu",
    **settings: Any,
) -> FeedbackAlignment:
    """Train by feedback alignment; arguments are those of [`fit_backprop`][classact.rules.fit_backprop]."""

    def losses(x: Tensor, y: Tensor) -> Iterator[Tensor]:
        return backprop_losses(model, x, y)

    run: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed, "device": device}
    return fit(model, x, y, [model.forward_parameters()], losses, **run, **settings)


def fit_dfa(
    model: DirectFeedbackAlignment,
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, " n"],
    *,
    epochs: int = 10,
    lr: float = 0.1,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device = "cpu",
    **settings: Any,
) -> DirectFeedbackAlignment:
    """Train by direct feedback alignment; arguments are those of [`fit_backprop`][classact.rules.fit_backprop]."""
    run: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed, "device": device}
    return fit(model, x, y, [model.forward_parameters()], model.losses, **run, **settings)
