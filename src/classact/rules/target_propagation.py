"""Difference target propagation: every layer learns to hit a target that learned inverses have carried down.

Lee, Zhang, Fischer, Bengio: Difference Target Propagation, ECML PKDD 2015, https://arxiv.org/abs/1412.7525.

With layers ``a_i = f_i(a_{i-1})`` and learned inverses g_i of them, the target of the top hidden layer is a step down
the gradient of the loss, ``t_{L-1} = a_{L-1} - eta dL/da_{L-1}``; below, ``t_{i-1} = a_{i-1} + g_i(t_i) - g_i(a_i)``,
where the difference takes away what g_i gets wrong. Layer i learns ``|f_i(a_{i-1}) - t_i|^2 / 2``; the last one learns
the loss itself; and g_i learns ``|g_i(f_i(a_{i-1} + eps)) - (a_{i-1} + eps)|^2 / 2`` with noise eps.

Here the layers are those of a [`DualSequential`][classact.rules.DualSequential]: f_i goes up, g_i down. Losses are
means over the batch, and dL/da the gradient of every example's own loss. All losses of a step see the weights from
before it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from classact.rules.ccl import CCLNetwork
from classact.rules.feedback_alignment import fit


class DifferenceTargetPropagation(CCLNetwork):
    """Network trained by difference target propagation.

    B_1 and B_L of the layers are not used, for no target is needed for the input, and the gradient of the loss gives
    that of the top hidden layer.

    Parameters
    ----------
    shape, classes
        As for [`CCLNetwork`][classact.rules.CCLNetwork].
    step : float
        eta of the first target.
    noise : float
        Standard deviation of eps.
    **settings
        hidden, kind, pool, act, kernel and bias of [`CCLNetwork`][classact.rules.CCLNetwork].

    Examples
    --------
    >>> import torch
    >>> model = DifferenceTargetPropagation.for_data((8,), classes=3, hidden=(16, 16))
    >>> x, y = torch.randn(60, 8), torch.arange(60) % 3
    >>> fit_dtp(model, x, y, epochs=2).predict_proba(x).shape
    torch.Size([60, 3])
    """

    def __init__(
        self, shape: Sequence[int], classes: int, *, step: float = 1.0, noise: float = 0.1, **settings: Any
    ) -> None:
        super().__init__(shape, classes, **settings)
        if step <= 0 or noise < 0:
            raise ValueError(f"step, noise: expected step > 0 and noise >= 0, got {step} and {noise}")
        self.step, self.noise = step, noise
        self.config |= {"step": step, "noise": noise}

    def targets(self, states: Sequence[Tensor], y: Int[Tensor, " n"]) -> list[Tensor]:
        """t_1, ..., t_{L-1} of the states a_0, ..., a_L; without gradients."""
        with torch.enable_grad():
            top = states[-2].detach().requires_grad_()
            # a copy, because hooks on layers, as of counters of operations, want no leaf
            loss = F.cross_entropy(self.forward_stage(self.depth, top.clone()), y, reduction="sum")
            (slope,) = torch.autograd.grad(loss, top)
        found = [top.detach() - self.step * slope]
        with torch.no_grad():
            for i in range(self.depth - 1, 1, -1):
                correction = states[i - 1] - self.feedback_stage(i, states[i])
                found.append(self.feedback_stage(i, found[-1]) + correction)
        return found[::-1]

    def inverse_losses(self, states: Sequence[Tensor]) -> Iterator[Tensor]:
        """Losses of g_2, ..., g_{L-1}, at the states a_0, ..., a_L and new noise; gradients reach no f."""
        for i in range(2, self.depth):
            with torch.no_grad():
                below = states[i - 1] + self.noise * torch.randn_like(states[i - 1])
                above = self.forward_stage(i, below)
            yield _half_squares(self.feedback_stage(i, above) - below)

    def losses(self, x: Float[Tensor, "n *shape"], y: Int[Tensor, " n"]) -> Iterator[Tensor]:
        """All losses of a step: of the last layer, of f_1, ..., f_{L-1}, and of their inverses."""
        states = self.forward_states(x, local=True)
        targets = self.targets(states, y)
        yield F.cross_entropy(states[-1], y)
        for state, target in zip(states[1:-1], targets, strict=True):
            yield _half_squares(state - target)
        yield from self.inverse_losses([state.detach() for state in states])


def _half_squares(error: Tensor) -> Tensor:
    return 0.5 * error.square().sum() / len(error)


def fit_dtp(
    model: DifferenceTargetPropagation,
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, " n"],
    *,
    epochs: int = 10,
    lr: float = 0.1,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device = "cpu",
    feedback_lr: float | None = None,
    **settings: Any,
) -> DifferenceTargetPropagation:
    """Train layers and inverses by difference target propagation.

    Parameters
    ----------
    model : DifferenceTargetPropagation
        The network.
    x, y : (N, ...) and (N,)
        Inputs and classes.
    epochs, lr, batch_size, seed, device, **settings
        See [`fit`][classact.rules.feedback_alignment.fit]; the gradients of layers and of inverses are clipped apart.
    feedback_lr : float, optional
        Learning rate of the inverses, if it is another.
    """
    parameters = [model.forward_parameters(), model.feedback_parameters()]
    rates = [lr, lr if feedback_lr is None else feedback_lr]
    run: dict[str, Any] = {"epochs": epochs, "lr": rates, "batch_size": batch_size, "seed": seed, "device": device}
    return fit(model, x, y, parameters, model.losses, **run, **settings)
