"""Grad-CAM: where the evidence for a score lies, from the gradient at a layer.

Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017 and
IJCV 2019, https://arxiv.org/abs/1610.02391. Also here: guided backpropagation and deconvolution, Guided Grad-CAM,
counterfactual maps, names of neurons and textual explanations.

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 5))
>>> with GradCAM(model) as cam:
...     maps = cam(torch.rand(2, 3, 16, 16), target=1)
>>> maps.shape, cam.layers
(torch.Size([2, 16, 16]), ['1'])
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from classact.explain.cam import CAM, Record, check_input, upsample_map
from classact.explain.frozen import frozen
from classact.explain.layers import Layer, Reshape, find_layout, find_module, patch_grid, recorded
from classact.explain.targets import Target, target_scores

Rule = Literal["guided", "deconv"]


class GradCAM(CAM):
    """Gradient-weighted class activation maps (section 3, equations 1 and 2).

    The weight of a feature map is the mean of the score's gradient over its positions, alpha_k = 1/Z sum_ij g_kij, and
    the map is ReLU(sum_k alpha_k A_k). The authors' code sums in place of averaging, which differs by the factor Z and
    not at all once a map is divided by its maximum.

    Parameters
    ----------
    model, layer, reshape
        See [`CAM`][classact.explain.CAM].
    pool : {"mean", "max"}
        How gradients of a map become one weight; ``"max"`` is an ablation of the paper.
    absolute : bool
        Take absolute gradients (ablation of the paper).
    relu : bool
        Keep only the positive part of the map (section 3.1); without it, evidence of other classes enters.
    rule : {"guided", "deconv"}, optional
        Modify the backward pass through ReLUs (ablation of the paper).
    """

    def __init__(
        self,
        model: nn.Module,
        layer: Layer | Sequence[Layer] = "auto",
        *,
        reshape: Reshape | None = None,
        pool: Literal["mean", "max"] = "mean",
        absolute: bool = False,
        relu: bool = True,
        rule: Rule | None = None,
    ) -> None:
        super().__init__(model, layer, reshape=reshape)
        if pool not in ("mean", "max"):
            raise ValueError(f"pool must be 'mean' or 'max', got {pool!r}")
        self.pool, self.absolute, self.relu, self.rule = pool, absolute, relu, rule

    def record(self, x: Tensor, target: Target = None) -> Record:
        """As for every [`CAM`][classact.explain.CAM], under the rule for ReLUs if there is one."""
        with nullcontext() if self.rule is None else ReLURule(self.rule):
            return super().record(x, target)

    def combine(self, A: Tensor, g: Tensor, *, counterfactual: bool = False, **options: Any) -> Tensor:
        """ReLU(sum_k alpha_k A_k); `counterfactual` negates the gradient: what would lower the score (section 3.3)."""
        if options:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(options)}")
        alpha = self.alpha(g)
        L = torch.einsum("nk,nk...->n...", -alpha if counterfactual else alpha, A)
        return L.relu() if self.relu else L

    def alpha(self, g: Float[Tensor, "N K *S"]) -> Float[Tensor, "N K"]:
        """Importance of each feature map (equation 1)."""
        flat = g.flatten(2)
        flat = flat.abs() if self.absolute else flat
        return flat.mean(2) if self.pool == "mean" else flat.amax(2)

    def weights(self, x: Tensor, target: Target = None) -> Float[Tensor, "N K"]:
        """Importance alpha (N, K) of the feature maps of the first layer for the target."""
        return self.alpha(self.record(x, target).layers[0].gradients[0])


class _RuledReLU(torch.autograd.Function):
    """Clamp to [0, high] with the backward pass of a rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, high: float, rule: Rule) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward((x > 0) & (x < high))
        return x.clamp(0, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (active,) = ctx.saved_tensors
        kept = grads[0].clamp_min(0)
        return kept * active if ctx.rule == "guided" else kept, None, None


_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.hardtanh, F.hardtanh_}


class ReLURule(TorchFunctionMode):
    """While active, every ReLU and ReLU6, module or function, goes backward by a rule.

    ``"guided"`` (Springenberg et al. 2015): grad_in = grad_out * [x > 0] * [grad_out > 0]. ``"deconv"`` (Zeiler and
    Fergus 2014): grad_in = grad_out * [grad_out > 0]. `met` counts the ReLUs.
    """

    def __init__(self, rule: Rule) -> None:
        if rule not in ("guided", "deconv"):
            raise ValueError(f"rule must be 'guided' or 'deconv', got {rule!r}")
        super().__init__()
        self.rule, self.met = rule, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _RELU:
            return func(*args, **kwargs)
        hard = "hardtanh" in func.__name__
        order = ("input", "min_val", "max_val", "inplace") if hard else ("input", "inplace")
        named = dict(zip(order, args, strict=False)) | kwargs
        if hard and named.get("min_val", -1.0) != 0:
            return func(*args, **kwargs)
        high = named.get("max_val", 1.0) if hard else 6.0 if func is F.relu6 else float("inf")
        self.met += 1
        result = _RuledReLU.apply(named["input"], high, self.rule)
        return named["input"].copy_(result) if named.get("inplace") or func.__name__.endswith("_") else result


class GuidedBackprop:
    """Guided backpropagation or deconvolution: the gradient at the input, with a rule at every ReLU.

    Alone it is sharp, but nearly the same for every class (section 3.2).

    Parameters
    ----------
    model : Module
        With ReLU or ReLU6 activations, as modules or functions.
    rule : {"guided", "deconv"}
        See [`ReLURule`][classact.explain.ReLURule].
    """

    def __init__(self, model: nn.Module, rule: Rule = "guided") -> None:
        self.model, self.rule = model, rule
        ReLURule(rule)

    def __enter__(self) -> "GuidedBackprop":  # noqa: PYI034 - as above
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, x: Tensor, target: Target = None) -> Tensor:
        """Gradients (N, C, *S) of the target at the input x (N, C, *S).

        Raises
        ------
        ValueError
            If the network has no ReLU, for which the rules are defined, and as `input_gradient`.
        """
        with ReLURule(self.rule) as rule:
            gradient = input_gradient(self.model, x, target)
        if not rule.met:
            raise ValueError(
                f"{type(self.model).__name__} has no ReLU, for which the {self.rule} rule is defined; its plain"
                " gradient is classact.explain.input_gradient"
            )
        return gradient


def input_gradient(model: nn.Module, x: Tensor, target: Target = None) -> Tensor:
    """Gradient (N, C, *S) of the target at the input (Simonyan et al. 2014); the plain baseline of every map.

    Raises
    ------
    ValueError
        If the target is more than one score per sample, or does not depend on the input.
    """
    x = check_input(x)
    with torch.inference_mode(mode=False), torch.enable_grad(), frozen(model):
        x.requires_grad_()
        scores = target_scores(model(x.clone()), target, len(x))  # a copy, since the first layer may work in place
        if scores.shape[1] > 1:
            raise ValueError(f"target must be one score per sample, got {scores.shape[1]}")
        gradient = torch.autograd.grad(scores.sum(), x, allow_unused=True)[0] if scores.requires_grad else None
    if gradient is None:
        raise ValueError("the score does not depend on the input x by differentiable operations")
    return gradient


class GuidedGradCAM:
    """Guided backpropagation times Grad-CAM: high-resolution and class-discriminative (section 3.2).

    Parameters
    ----------
    model, layer, reshape
        See [`CAM`][classact.explain.CAM].
    rule : {"guided", "deconv"}
        ``"deconv"`` gives the paper's Deconvolution Grad-CAM.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: Layer | Sequence[Layer] = "auto",
        *,
        rule: Rule = "guided",
        reshape: Reshape | None = None,
    ) -> None:
        self.cam, self.backprop = GradCAM(model, layer, reshape=reshape), GuidedBackprop(model, rule)

    def __enter__(self) -> "GuidedGradCAM":  # noqa: PYI034 - as above
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, x: Tensor, target: Target = None) -> Tensor:
        """Pictures (N, C, *S), signed: the guided gradient where the map is, for x (N, C, *S)."""
        return self.backprop(x, target) * self.cam(x, target).unsqueeze(1)


class NeuronNames:
    """Names for the units of a layer: the concept whose masks a unit's strongest activations overlap most.

    Network Dissection (Bau et al. 2017), as the paper uses it for textual explanations: a unit's threshold T_k is
    reached at a share `quantile` of all positions; its upsampled activation, cut there, is compared with each
    concept's mask by the intersection over union of all images together.

    Parameters
    ----------
    quantile : float
        Share of positions over the threshold.
    min_iou : float
        Units whose best overlap is not larger have no name.
    batch_size : int
        Images per forward pass.

    Attributes
    ----------
    names_ : list of (str or None)
        One per unit.
    iou_ : (K, M) array of overlaps with the M concepts, as a Tensor.
    thresholds_ : (K,) Tensor
    """

    def __init__(self, quantile: float = 0.005, min_iou: float = 0.04, batch_size: int = 64) -> None:
        if not 0 < quantile < 1:
            raise ValueError(f"quantile must be in (0, 1), got {quantile}")
        self.quantile, self.min_iou, self.batch_size = quantile, min_iou, batch_size

    def fit(
        self,
        model: nn.Module,
        layer: Layer,
        images: Float[Tensor, "n C H W"],
        concept_masks: Bool[Tensor, "n M H W"],
        concepts: Sequence[str] | None = None,
    ) -> "NeuronNames":
        """Name the units of a layer from a probe set whose pixels are annotated.

        Parameters
        ----------
        model, layer
            Network, and a layer of it or its name.
        images : (n, C, H, W)
            Probe images.
        concept_masks : (n, M, H, W) bool
            Where each of M concepts is.
        concepts : sequence of str, optional
            Their names; ``"0"``, ``"1"``, ... by default.
        """
        if len(concept_masks) != len(images) or concept_masks.shape[2:] != images.shape[2:]:
            raise ValueError(
                f"concept_masks must be (n, M, H, W) for images {tuple(images.shape)}, got {tuple(concept_masks.shape)}"
            )
        names = [str(m) for m in range(concept_masks.shape[1])] if concepts is None else list(concepts)
        if len(names) != concept_masks.shape[1]:
            raise ValueError(f"concepts must name {concept_masks.shape[1]} masks, got {len(names)} names")
        kept: Tensor | None = None
        lows = []
        for A in self._activations(model, layer, images):
            flat = A.movedim(1, 0).flatten(1)
            # the largest values seen so far hold the quantile of all positions exactly
            count = max(1, round(self.quantile * len(images) * A[0, 0].numel()))
            kept = flat if kept is None else torch.cat([kept, flat], 1)
            kept = kept.topk(min(count, kept.shape[1]), dim=1).values
            lows.append(flat.amin(1))
        assert kept is not None
        self.thresholds_ = kept[:, -1]
        low = torch.stack(lows).amin(0).unsqueeze(1)  # a unit that is silent there, or everywhere, is not active
        both = torch.zeros(len(kept), len(names), dtype=torch.float64, device=kept.device)
        over = both.new_zeros(len(kept))
        each = (a for A in self._activations(model, layer, images) for a in A)
        for a, mask in zip(each, concept_masks, strict=True):  # one by one: K maps of the size of an image are large
            a = upsample_map(a, images.shape[2:]).flatten(1)
            active = (a >= self.thresholds_.unsqueeze(1)) & (a > low)
            both += active.to(a) @ mask.flatten(1).to(a).T
            over += active.sum(1)
        there = concept_masks.sum((0, 2, 3)).to(both)
        self.iou_ = (both / (over.unsqueeze(1) + there - both).clamp_min(1)).float()
        best = self.iou_.max(1)
        self.names_ = [
            names[c] if v > self.min_iou else None
            for v, c in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return self

    def _activations(self, model: nn.Module, layer: Layer, images: Tensor) -> Iterable[Tensor]:
        _, module = find_module(model, layer)
        with torch.no_grad(), frozen(model):
            for x in images.split(self.batch_size):
                with recorded([module], gradients=False) as found:
                    model(x)
                features = found[0]
                if features is None:
                    raise ValueError(f"layer {layer!r} was not executed in the forward pass")
                patches = patch_grid(model, x.shape[2:])
                yield find_layout(features, x.shape[2:], layer=module, patches=patches)(features)


def textual_explanation(
    weights: Float[Tensor, "N K"], names: Sequence[str | None], k: int = 5
) -> list[dict[str, list[str]]]:
    """Names of the units that speak most for and against a class (section 6): one dict per sample.

    Parameters
    ----------
    weights : (N, K)
        Importance alpha of the units, from [`GradCAM.weights`][classact.explain.GradCAM].
    names : sequence of K str or None
        Names of the units, from [`NeuronNames`][classact.explain.NeuronNames]; those without a name are left out.
    k : int
        Units per side.

    Returns
    -------
    list of dict
        ``{"for": [...], "against": [...]}``, strongest first.
    """
    if len(names) != weights.shape[1]:
        raise ValueError(f"names must have one entry per unit, {weights.shape[1]}, got {len(names)}")
    named = [i for i, name in enumerate(names) if name is not None]
    found = []
    for row in weights:
        order = sorted(named, key=lambda i: -float(row[i]))
        found.append({
            "for": [str(names[i]) for i in order[:k] if row[i] > 0],
            "against": [str(names[i]) for i in order[::-1][:k] if row[i] < 0],
        })  # fmt: skip
    return found
