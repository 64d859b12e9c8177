"""EvoNorm-B0 to B2 and S0 to S2: one layer in place of normalisation and activation.

Liu, Brock, Simonyan, Le: Evolving Normalization-Activation Layers, NeurIPS 2020, https://arxiv.org/abs/2004.02967. The
authors' layers are in https://github.com/tensorflow/tpu (ResNet); they have not released the search.

With s^2 a biased variance, psi(x^2) a mean of squares, b the batch, w and h the positions, c/g the channels of a group,
and eps inside every root (Table of the paper):

| layer | formula |
| --- | --- |
| B0 | ``x / max(sqrt(s^2_bwh), v x + sqrt(s^2_wh)) * gamma + beta`` |
| B1 | ``x / max(sqrt(s^2_bwh), (x + 1) sqrt(psi_wh(x^2))) * gamma + beta`` |
| B2 | ``x / max(sqrt(s^2_bwh), sqrt(psi_wh(x^2)) - x) * gamma + beta`` |
| S0 | ``x sigmoid(v x) / sqrt(s^2_wh,c/g) * gamma + beta`` |
| S1 | ``x sigmoid(x) / sqrt(s^2_wh,c/g) * gamma + beta`` |
| S2 | ``x sigmoid(x) / sqrt(psi_wh,c/g(x^2)) * gamma + beta`` |

No layer subtracts a mean. The B layers have no activation function but the maximum; its second argument may be
negative, the first keeps the quotient finite.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

VERSIONS = ("B0", "B1", "B2", "S0", "S1", "S2")


def evonorm_b0(
    x: Float[Tensor, "n c *space"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    v: Float[Tensor, " c"],
    batch_var: Float[Tensor, " c"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "n c *space"]:
    """EvoNorm-B0: ``x / max(sqrt(s^2_bwh + eps), v x + sqrt(s^2_wh + eps)) * gamma + beta``.

    Parameters
    ----------
    x : (N, C, ...)
        Features with one or more dimensions of positions. Half precision is computed in float32.
    weight, bias, v : (C,)
        gamma, beta and v1.
    batch_var : (C,), optional
        s^2_bwh, at test time the running one; by default the biased variance of x.
    eps : float
        Inside both roots.

    Returns
    -------
    (N, C, ...) of the dtype of x.
    """
    return _of_batch("B0", x, weight, bias, v, batch_var, eps)[0]


def evonorm_b1(
    x: Float[Tensor, "n c *space"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    batch_var: Float[Tensor, " c"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "n c *space"]:
    """EvoNorm-B1; arguments as in [`evonorm_b0`][classact.nn.evonorm_b0]."""
    return _of_batch("B1", x, weight, bias, None, batch_var, eps)[0]


def evonorm_b2(
    x: Float[Tensor, "n c *space"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    batch_var: Float[Tensor, " c"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "n c *space"]:
    """EvoNorm-B2; arguments as in [`evonorm_b0`][classact.nn.evonorm_b0]."""
    return _of_batch("B2", x, weight, bias, None, batch_var, eps)[0]


def evonorm_s0(
    x: Float[Tensor, "n c *space"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    v: Float[Tensor, " c"],
    groups: int = 32,
    eps: float = 1e-5,
) -> Float[Tensor, "n c *space"]:
    """EvoNorm-S0: ``x sigmoid(v x) / sqrt(s^2_wh,c/g + eps) * gamma + beta``.

    Parameters
    ----------
    x : (N, C, ...)
        Features with one or more dimensions of positions. Half precision is computed in float32.
    weight, bias, v : (C,)
        gamma, beta and v1.
    groups : int
        Number g of groups, a divisor of C.
    eps : float
        Inside the root.

    Returns
    -------
    (N, C, ...) of the dtype of x.
    """
    return _of_sample("S0", x, weight, bias, v, groups, eps)


def evonorm_s1(
    x: Float[Tensor, "n c *space"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    groups: int = 32,
    eps: float = 1e-5,
) -> Float[Tensor, "n c *space"]:
    """EvoNorm-S1; arguments as in [`evonorm_s0`][classact.nn.evonorm_s0]."""
    return _of_sample("S1", x, weight, bias, None, groups, eps)


def evonorm_s2(
    x: Float[Tensor, "n c *space"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    groups: int = 32,
    eps: float = 1e-5,
) -> Float[Tensor, "n c *space"]:
    """EvoNorm-S2; arguments as in [`evonorm_s0`][classact.nn.evonorm_s0]."""
    return _of_sample("S2", x, weight, bias, None, groups, eps)


def _check(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    if x.ndim < 3 or x.shape[1] != len(weight):
        raise ValueError(f"x: expected shape (N, {len(weight)}, ...) with positions, got {tuple(x.shape)}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: expected a divisor of the {x.shape[1]} channels, got {groups}")
    return x.to(torch.promote_types(x.dtype, torch.float32))  # squares overflow in half precision


def _space(z: Tensor) -> list[int]:
    return list(range(2, z.ndim))


def _channels(values: Tensor, z: Tensor) -> Tensor:
    return values.to(z.dtype).reshape(1, -1, *[1] * (z.ndim - 2))


def _of_batch(
    version: str, x: Tensor, weight: Tensor, bias: Tensor, v: Tensor | None, batch_var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The layer's output, and the batch variance that it used."""
    z = _check(x, weight)
    scaled = (None if t is None else _channels(t, z) for t in (weight, bias, v, batch_var))
    arguments: tuple[Any, ...] = (z, *scaled, eps, version)
    if torch.compiler.is_compiling():  # compilers choose themselves what to keep for the backward pass
        y = _batch_formula(*arguments)
        var = (
            _batch_var(*torch.var_mean(z, _space(z), unbiased=False, keepdim=True)) if batch_var is None else batch_var
        )
    else:
        y, var, *_ = _BatchSeries.apply(*arguments)
    return y.to(x.dtype), var.detach().flatten()


def _of_sample(
    version: str, x: Tensor, weight: Tensor, bias: Tensor, v: Tensor | None, groups: int, eps: float
) -> Tensor:
    z = _check(x, weight, groups)
    arguments: tuple[Any, ...] = (
        z,
        *(None if t is None else _channels(t, z) for t in (weight, bias, v)),
        groups,
        eps,
        version,
    )
    if torch.compiler.is_compiling():
        return _sample_formula(*arguments).to(x.dtype)
    return _SampleSeries.apply(*arguments)[0].to(x.dtype)


def _batch_formula(
    z: Tensor, weight: Tensor, bias: Tensor, v: Tensor | None, batch_var: Tensor | None, eps: float, version: str
) -> Tensor:
    var, mean = torch.var_mean(z, _space(z), unbiased=False, keepdim=True)
    batch_var = _batch_var(var, mean) if batch_var is None else batch_var
    below = _below(z, v, _root(var, mean, eps, version), version)
    return z / torch.maximum((batch_var + eps).sqrt(), below) * weight + bias


def _batch_var(var: Tensor, mean: Tensor) -> Tensor:
    """Variance over batch and positions (1, C, 1, ...) from moments over positions (N, C, 1, ...)."""
    return var.mean(0, keepdim=True) + mean.var(0, unbiased=False, keepdim=True)


def _root(var: Tensor, mean: Tensor, eps: float, version: str) -> Tensor:
    return ((var if version == "B0" else var + mean.square()) + eps).sqrt()


def _sample_formula(
    z: Tensor, weight: Tensor, bias: Tensor, v: Tensor | None, groups: int, eps: float, version: str
) -> Tensor:
    _, inverse = _group(z, groups, eps, version)
    gated = F.silu(z) if v is None else z * torch.sigmoid(z * v)
    return gated * (_spread(inverse, z) * weight) + bias


def _group(z: Tensor, groups: int, eps: float, version: str) -> tuple[Tensor, Tensor]:
    """Means that are subtracted, 0 for S2, and inverse roots of the second moments: (N, G)."""
    grouped = z.reshape(z.shape[0], groups, -1)
    if version == "S2":
        square = grouped.square().mean(2)
        mean = torch.zeros_like(square)
    else:
        square, mean = torch.var_mean(grouped, 2, unbiased=False)
    return mean, (square + eps).rsqrt()


def _spread(of_groups: Tensor, z: Tensor) -> Tensor:
    """One number per sample and channel, (N, C, 1, ...), from one per group."""
    return of_groups.repeat_interleave(z.shape[1] // of_groups.shape[1], 1).reshape(*z.shape[:2], *[1] * (z.ndim - 2))


def _differentiated(formula: Callable[..., Tensor], inputs: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
    """Gradients by autograd, for callers who differentiate them again."""
    tensors = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    found = iter(torch.autograd.grad(formula(*inputs), tensors, grad, create_graph=True))
    return tuple(next(found) if isinstance(t, Tensor) and t.requires_grad else None for t in inputs)


class _BatchSeries(torch.autograd.Function):
    """The formulas of the B series with their gradients written out, keeping x and numbers per channel only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor, weight: Tensor, bias: Tensor, v: Tensor | None, batch_var: Tensor | None, eps: float, version: str
    ) -> tuple[Tensor, ...]:
        var, mean = torch.var_mean(z, _space(z), unbiased=False, keepdim=True)
        used = _batch_var(var, mean) if batch_var is None else batch_var.clone()
        below = _below(z, v, _root(var, mean, eps, version), version).clamp_(min=(used + eps).sqrt())
        return torch.addcmul(bias, z / below, weight), used, var, mean

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.eps, ctx.version = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        z, weight, bias, v, batch_var, used, var, mean = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiated(_batch_formula, (z, weight, bias, v, batch_var, ctx.eps, ctx.version), grad)
        space, over, size = _space(z), [0, *_space(z)], z.numel() // (z.shape[0] * z.shape[1])
        root, batch_root = _root(var, mean, ctx.eps, ctx.version), (used + ctx.eps).sqrt()
        below = _below(z, v, root, ctx.version)
        own = below > batch_root  # where the maximum is not the batch's
        scaled = z / below.clamp_(min=batch_root)
        of_weight = (grad * scaled).sum(over, keepdim=True)
        of_z = (grad * weight).div_(below)
        of_below = scaled.mul_(of_z).neg_()
        total = of_below.sum(over, keepdim=True)
        of_below.mul_(own)
        of_space = of_below.sum(space, keepdim=True)
        of_batch_var = (total - of_space.sum(0, keepdim=True)) / (2 * batch_root)
        of_v, of_root, centre = None, of_space, torch.zeros_like(mean)
        if v is not None:
            of_v, centre = (of_below * z).sum(over, keepdim=True), mean
            of_z.addcmul_(of_below, v)
        elif ctx.version == "B1":
            of_root = of_space + (of_below * z).sum(space, keepdim=True)
            of_z.addcmul_(of_below, root)
        else:
            of_z.sub_(of_below)
        slope = of_root / (size * root)
        offset = slope * centre
        if batch_var is None:  # x enters through the variance of the batch as well
            of_batch = 2 * of_batch_var / (size * z.shape[0])
            slope, offset = slope + of_batch, offset + of_batch * mean.mean(0, keepdim=True)
        of_z.addcmul_(z, slope).sub_(offset)
        return (
            of_z,
            of_weight,
            grad.sum(over, keepdim=True),
            of_v,
            None if batch_var is None else of_batch_var,
            None,
            None,
        )


def _below(z: Tensor, v: Tensor | None, root: Tensor, version: str) -> Tensor:
    """The second argument of the maximum."""
    if version == "B1":
        return (z + 1) * root
    return root - z if v is None else torch.addcmul(root, z, v)


class _SampleSeries(torch.autograd.Function):
    """The formulas of the S series with their gradients written out, keeping x and numbers per group only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor, weight: Tensor, bias: Tensor, v: Tensor | None, groups: int, eps: float, version: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, inverse = _group(z, groups, eps, version)
        gated = F.silu(z) if v is None else (z * v).sigmoid_().mul_(z)
        return torch.addcmul(bias, gated, _spread(inverse, z) * weight), mean, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z, weight, bias, v, ctx.groups, ctx.eps, ctx.version = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(z, weight, bias, v, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        z, weight, bias, v, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiated(_sample_formula, (z, weight, bias, v, ctx.groups, ctx.eps, ctx.version), grad)
        space, over = _space(z), [0, *_space(z)]
        size = z.numel() // inverse.numel()
        spread = _spread(inverse, z)
        gate = z.sigmoid() if v is None else (z * v).sigmoid_()
        gated = z * gate
        product = grad * gated
        of_channel = product.sum(space, keepdim=True)
        rest = gated.neg_().add_(z)  # z (1 - gate)
        of_v = (
            None if v is None else (product.mul_(rest).sum(space, keepdim=True) * spread * weight).sum(0, keepdim=True)
        )
        slope = (rest if v is None else rest.mul_(v)).add_(1).mul_(gate)
        of_z = slope.mul_(grad).mul_(spread * weight)
        of_inverse = (of_channel * weight).reshape(z.shape[0], ctx.groups, -1).sum(2)
        of_square = _spread(of_inverse * inverse**3 / -size, z)
        of_z.addcmul_(z, of_square).sub_(of_square * _spread(mean, z))
        of_weight = (of_channel * spread).sum(0, keepdim=True)
        return of_z, of_weight, grad.sum(over, keepdim=True), of_v, None, None, None


class EvoNorm2d(nn.Module):
    """One of the paper's six layers, in place of BatchNorm and ReLU (B series) or GroupNorm and ReLU (S series).

    Parameters
    ----------
    num_features : int
        Channels C.
    version : {"S0", "S1", "S2", "B0", "B1", "B2"}
        Layers B use batch statistics in training and running ones in evaluation.
    groups : int
        Groups of the S layers; lowered to the next divisor of C, as in the authors' code.
    apply_act : bool
        False where a norm stood without activation, at the end of a residual branch: the layer is then
        ``gamma x + beta``.
    eps : float
        Inside every root.
    momentum : float
        Weight of the new batch in the running variance.
    zero_init : bool
        gamma starts at 0, for the last layer of a residual branch.
    unbiased_running : bool
        Store the running variance as `torch.nn.BatchNorm2d` and timm do, times n / (n - 1); the authors do not.
    sync : bool
        Compute batch statistics over all processes of `torch.distributed`, where it is initialised.

    Raises
    ------
    ValueError
        Unknown version; in `forward`, another number of channels, or no dimension of positions.

    Examples
    --------
    >>> import torch
    >>> layer = EvoNorm2d(64, "S0")
    >>> layer(torch.randn(2, 64, 8, 8)).shape
    torch.Size([2, 64, 8, 8])
    """

    def __init__(
        self,
        num_features: int,
        version: str = "S0",
        groups: int = 32,
        apply_act: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.1,
        zero_init: bool = False,
        unbiased_running: bool = False,
        sync: bool = False,
    ) -> None:
        super().__init__()
        if version not in VERSIONS:
            raise ValueError(f"version: expected one of {', '.join(VERSIONS)}, got {version!r}")
        for name, value in (("num_features", num_features), ("groups", groups)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.num_features, self.version, self.apply_act = num_features, version, apply_act
        self.groups = next(g for g in range(min(groups, num_features), 0, -1) if num_features % g == 0)
        self.eps, self.momentum, self.unbiased_running, self.sync = eps, momentum, unbiased_running, sync
        self.weight = nn.Parameter(torch.full((num_features,), 0.0 if zero_init else 1.0))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.v = nn.Parameter(torch.ones(num_features)) if apply_act and version in ("B0", "S0") else None
        self.running_var: Tensor | None
        of_batch = apply_act and version.startswith("B")
        self.register_buffer("running_var", torch.ones(num_features) if of_batch else None)

    def forward(self, x: Float[Tensor, "n c *space"]) -> Float[Tensor, "n c *space"]:
        """Normalise and activate (N, C, ...); the dtype stays."""
        z = _check(x, self.weight)
        if not self.apply_act:
            return torch.addcmul(_channels(self.bias, z), z, _channels(self.weight, z)).to(x.dtype)
        if self.version == "S0":
            assert self.v is not None
            return evonorm_s0(x, self.weight, self.bias, self.v, self.groups, self.eps)
        if self.version == "S1":
            return evonorm_s1(x, self.weight, self.bias, self.groups, self.eps)
        if self.version == "S2":
            return evonorm_s2(x, self.weight, self.bias, self.groups, self.eps)
        together = self.sync and torch.distributed.is_available() and torch.distributed.is_initialized()
        var, count = None, x.numel() // x.shape[1]
        if not self.training:
            var = self.running_var
        elif together:
            var, count = _synchronised_var(z)
        y, used = _of_batch(self.version, x, self.weight, self.bias, self.v, var, self.eps)
        if self.training and self.running_var is not None:
            with torch.no_grad():
                factor = count / max(count - 1, 1) if self.unbiased_running else 1.0
                self.running_var.lerp_((used * factor).to(self.running_var.dtype), self.momentum)
        return y

    def extra_repr(self) -> str:
        """Show what distinguishes it."""
        groups = f", groups={self.groups}" if self.version.startswith("S") else ""
        return f"{self.num_features}, {self.version!r}{groups}{'' if self.apply_act else ', apply_act=False'}"


def _synchronised_var(z: Tensor) -> tuple[Tensor, int]:
    """Biased variance over all processes, and the number of values; to first order it does not depend on the mean."""
    over = [0, *_space(z)]
    with torch.no_grad():
        moments = torch.cat([z.sum(over).double(), torch.tensor([z.numel() / z.shape[1]]).to(z.device).double()])
        torch.distributed.all_reduce(moments)
        count = int(moments[-1])
        mean = _channels(moments[:-1] / count, z)
    return _SumOverProcesses.apply((z - mean).square().sum(over)) / count, count


class _SumOverProcesses(torch.autograd.Function):
    """Sum a tensor over processes; every process's output depends on every input, so gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        total = grad.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total
