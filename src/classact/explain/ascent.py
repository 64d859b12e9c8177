"""Gradient ascent on images or codes, the one loop of multifaceted visualisation, PPGN and discriminative stimuli."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Direction = Callable[[Tensor], tuple[Tensor, Tensor]]
Scale = Literal["mean", "norm"] | None


def gradient_of(objective: Callable[[Tensor], Tensor]) -> Direction:
    """The ascent direction of an objective whose samples do not depend on each other.

    Parameters
    ----------
    objective : callable
        (N, ...) -> (N,), to be maximised.

    Returns
    -------
    callable
        (N, ...) -> gradient of the same shape and values (N,), both without a graph.
    """

    def direction(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = objective(x)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        return gradient, value.detach()

    return direction


def unit_step(direction: Tensor, scale: Scale) -> Tensor:
    """Divide each sample's direction by its mean absolute value or its L2 norm; a zero direction stays zero."""
    if scale is None:
        return direction
    flat = direction.flatten(1)
    size = flat.abs().mean(1) if scale == "mean" else flat.norm(dim=1)
    size = torch.where(size > 0, size, torch.ones_like(size))
    return direction / size.view(-1, *[1] * (direction.ndim - 1))


def ascend(
    direction: Direction,
    x: Tensor,
    steps: int,
    *,
    lr: float | tuple[float, float] = 1.0,
    scale: Scale = "mean",
    project: Callable[[Tensor, int], Tensor] | None = None,
    watch: Callable[[int, Tensor, Tensor], bool | None] | None = None,
) -> Tensor:
    """Take `steps` steps ``x <- project(x + lr * unit_step(direction(x)))``; every sample is a run of its own.

    Parameters
    ----------
    direction : callable
        x -> (direction of the shape of x, values (N,)); see [`gradient_of`][classact.explain.ascent.gradient_of].
    x : (N, ...)
        Start; it is not changed in place.
    steps : int
        Number of steps.
    lr : float or pair
        Length of a step; of a pair, it goes from the first to the second value in equal steps
        (``lr[0] + (lr[1] - lr[0]) * t / steps`` at step t = 0, 1, ...).
    scale : {"mean", "norm", None}
        What each sample's direction is divided by: its mean absolute value, its L2 norm, or nothing.
    project : callable, optional
        ``project(x, t)`` after each step: clipping, denoising, a fixed norm.
    watch : callable, optional
        ``watch(t, x, values)`` sees the values at x before the step; if it returns True the loop ends there.

    Raises
    ------
    FloatingPointError
        If a direction is not finite; the message has the step.
    """
    first, last = lr if isinstance(lr, tuple) else (lr, lr)
    x = x.detach().clone()
    for t in range(steps):
        step, values = direction(x)
        if not bool(torch.isfinite(step).all()):
            raise FloatingPointError(f"the ascent direction is not finite at step {t}")
        if watch is not None and watch(t, x, values):
            break
        x = x + (first + (last - first) * t / steps) * unit_step(step, scale)
        if project is not None:
            x = project(x, t)
    return x
