"""The task ``mil``: find the multiple-instance method that classifies these bags best.

To add a method, write its model (and loss) and add one line to `METHODS`; a part that joins other methods with ``+``
goes into `PARTS`.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from classact.data.bags import BagSubset, open_bags
from classact.evidence.comparison import Score, Task
from classact.evidence.store import StudyError
from classact.mil.acmil import ACMIL, ACMILLoss
from classact.mil.aem import AttentionEntropy, Subsample
from classact.mil.attention import ABMIL, MultiHeadABMIL
from classact.mil.lit import fit_bags, predict_bags
from classact.mil.model import BagCrossEntropy, MILLoss, Standardized
from classact.mil.pooling import MaxMIL, MeanMIL, PooledLogistic

TRAINING = {"epochs", "lr", "weight_decay", "batch_size", "patience"}
EVERYWHERE = TRAINING | {"class_weight", "standardize"}


def fit_plain(
    model: Callable[..., nn.Module],
    loss: Callable[..., MILLoss],
    train: BagSubset,
    validation: BagSubset,
    *,
    seed: int,
    device: str = "cpu",
    parts: tuple[Callable[[nn.Module, MILLoss], tuple[nn.Module, MILLoss]], ...] = (),
    class_weight: str | None = None,
    standardize: bool | None = None,
    epochs: int = 50,
    patience: int | None = 20,
    **settings: Any,
) -> nn.Module:
    """Train a network on bags with a loss, and keep the epoch with the lowest validation cross-entropy.

    Parameters
    ----------
    model, loss : callable
        Built as ``model(in_dim, n_classes, **...)`` and ``loss(**...)``.
    parts : tuple of callable
        Each maps (network, loss) to what it makes of them.
    class_weight : {"balanced"}, optional
        Weigh classes by the inverse of their frequency among the training bags.
    standardize : bool, optional
        Scale features by the mean and deviation over the training bags' instances. Default: only for tables of
        hand-made features.
    **settings
        Arguments of the network, the loss or `classact.mil.lit.fit_bags`, told apart by name.
    """
    torch.manual_seed(seed)
    classes = len(train.classes)
    weight = _class_weight(class_weight, train.labels, classes)
    of_loss = {k: v for k, v in settings.items() if k in _parameters(loss)}
    of_training = {k: v for k, v in settings.items() if k in TRAINING}
    of_model = {k: v for k, v in settings.items() if k not in of_loss and k not in of_training}
    network = model(train.in_dim, classes, **of_model)
    criterion = loss(class_weight=weight, **of_loss)
    for part in parts:
        network, criterion = part(network, criterion)
    if train.tabular if standardize is None else standardize:
        network = Standardized.from_bags(network, train)
    fitted = fit_bags(
        network,
        criterion,
        train,
        validation,
        seed=seed,
        device=device,
        epochs=epochs,
        patience=patience,
        **of_training,
    )
    fitted.model.history = fitted.history  # type: ignore[assignment]
    return fitted.model


def fit_logistic(
    summary: str,
    train: BagSubset,
    validation: BagSubset,
    *,
    seed: int,
    device: str = "cpu",  # noqa: ARG001 - fitted by scikit-learn
    class_weight: str | None = None,
    **_options: Any,
) -> nn.Module:
    """Fit logistic regression on a summary of each bag; its strength of regularisation is chosen on validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classes = np.arange(len(train.classes))
    model = PooledLogistic(train.in_dim, len(classes), summary)  # type: ignore[arg-type]
    frequency = np.bincount(train.labels, minlength=len(classes)) / len(train)
    with torch.no_grad():
        model.bias.copy_(torch.from_numpy(np.log(np.maximum(frequency, 1e-6))))
        if summary == "none" or len(set(train.labels)) < 2:
            return model.eval()
        seen, held_out = (
            torch.cat([model.summarise(bag.x.unsqueeze(0)) for bag in part]).double().numpy()
            for part in (train, validation)
        )
        best, lowest = None, np.inf
        for c in (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0):
            logistic = LogisticRegression(C=c, max_iter=2000, class_weight=class_weight, random_state=seed)
            pipeline = make_pipeline(StandardScaler(), logistic).fit(seen, train.labels)
            p = np.full((len(held_out), len(classes)), 1e-9)
            p[:, pipeline.classes_] = pipeline.predict_proba(held_out)
            value = log_loss(validation.labels, p / p.sum(1, keepdims=True), labels=classes)
            if value < lowest:
                best, lowest = pipeline, value
        assert best is not None
        scaler, logistic = best[0], best[1]
        coefficients = np.zeros((len(classes), seen.shape[1]))
        intercept = np.full(len(classes), -20.0)
        if len(logistic.classes_) == 2:
            low, high = logistic.classes_
            coefficients[high], intercept[high], intercept[low] = logistic.coef_[0], logistic.intercept_[0], 0.0
        else:
            coefficients[logistic.classes_], intercept[logistic.classes_] = logistic.coef_, logistic.intercept_
        weight = coefficients / scaler.scale_
        model.weight.copy_(torch.from_numpy(weight))
        model.bias.copy_(torch.from_numpy(intercept - weight @ scaler.mean_))
    return model.eval()


def _entropy(network: nn.Module, loss: MILLoss, **settings: Any) -> tuple[nn.Module, MILLoss]:
    return network, loss + AttentionEntropy(**settings)


def _subsample(network: nn.Module, loss: MILLoss, **settings: Any) -> tuple[nn.Module, MILLoss]:
    return Subsample(network, **settings), loss


METHODS: dict[str, Callable[..., nn.Module]] = {
    "mean": partial(fit_plain, MeanMIL, BagCrossEntropy),
    "max": partial(fit_plain, MaxMIL, BagCrossEntropy),
    "abmil": partial(fit_plain, ABMIL, BagCrossEntropy),
    "gated-abmil": partial(fit_plain, partial(ABMIL, gated=True), BagCrossEntropy),
    "mha": partial(fit_plain, MultiHeadABMIL, BagCrossEntropy),
    "acmil": partial(fit_plain, ACMIL, ACMILLoss),
    "acmil-mha": partial(fit_plain, partial(ACMIL, attention="mha"), ACMILLoss),
    "prevalence": partial(fit_logistic, "none"),
    "bag-size": partial(fit_logistic, "size"),
    "lr-mean": partial(fit_logistic, "mean"),
    "lr-max": partial(fit_logistic, "max"),
}
PARTS: dict[str, tuple[Callable[..., tuple[nn.Module, MILLoss]], Callable[..., Any]]] = {
    "aem": (_entropy, AttentionEntropy),
    "subsample": (_subsample, Subsample),
}


def build(name: str, settings: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """Make the ``fit`` of a method, a composition such as ``acmil+aem``, or the user's own ``package.module:factory``.

    Raises
    ------
    StudyError
        If a name or a setting is unknown, or the user's factory does not obey the task.
    """
    if unknown := set(options) - EVERYWHERE:
        raise StudyError(f"no option {', '.join(sorted(unknown))}; there are {', '.join(sorted(EVERYWHERE))}")
    known = {*METHODS, *PARTS}
    base, *parts = name.split("+")
    fit = _own(base) if ":" in base else METHODS.get(base)
    if fit is None:
        raise StudyError(_unknown(base, METHODS))
    for owner in settings:
        if owner not in known and ":" not in owner:
            raise StudyError(f"--set {owner}.…: {_unknown(owner, known)}")
    if parts and getattr(fit, "func", None) is not fit_plain:
        raise StudyError(f"{name}: {base} is not a network trained by the plain step, and takes no parts")
    chosen = []
    for part in parts:
        if part not in PARTS:
            raise StudyError(f"{name}: {_unknown(part, PARTS)}")
        function, target = PARTS[part]
        own = dict(settings.get(part, {}))
        _check_settings(part, own, _parameters(target) - {"network"})
        try:
            target(**own) if part == "aem" else target(_Any(), **own)
        except (ValueError, TypeError) as error:
            raise StudyError(f"--set {part}: {error}") from error
        chosen.append(partial(function, **own))
    own = dict(settings.get(base, {}))
    if getattr(fit, "func", None) is fit_logistic:
        _check_settings(base, own, set())
        return partial(fit, **{k: v for k, v in options.items() if k == "class_weight"})
    if getattr(fit, "func", None) is not fit_plain:  # a training step of its own
        known = _parameters(fit) - {"train", "validation", "seed", "device"}
        _check_settings(base, own, known)
        return partial(fit, **{k: v for k, v in options.items() if k in known}, **own)
    model, loss = fit.args[:2]  # type: ignore[attr-defined]
    allowed = (_parameters(model) - {"in_dim", "n_classes"}) | _parameters(loss) | EVERYWHERE
    _check_settings(base, own, allowed)
    try:
        network = model(8, 2, **{k: v for k, v in own.items() if k in _parameters(model)})
    except (ValueError, TypeError) as error:
        raise StudyError(f"--set {base}: {error}") from error
    if ":" in base:
        _obeys(base, network)
    return partial(fit, parts=tuple(chosen), **{**options, **own})


class _Any(nn.Module):
    in_dim = 1


def _own(name: str) -> Callable[..., nn.Module]:
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise StudyError(f"{name}: cannot be imported ({error}); expected package.module:factory") from error
    return partial(fit_plain, factory, BagCrossEntropy)


def _obeys(name: str, network: Any) -> None:
    """Check once that a user's model answers as the family does."""
    rule = "expected factory(in_dim, n_classes) -> model, with model(x (N, K, D), mask, coords) -> MILOutput"
    try:
        network.eval()
        output = network(torch.zeros(2, 3, 8), torch.tensor([[True] * 3, [True, True, False]]), None)
        shapes = tuple(output.logits.shape), tuple(output.attention_logits.shape)
    except Exception as error:
        raise StudyError(f"{name}: {rule}; got {type(error).__name__}: {error}") from error
    if shapes != ((2, 2), (2, 3)):
        raise StudyError(f"{name}: {rule}; got logits and attention logits of shapes {shapes}, expected (2, 2), (2, 3)")
    if not torch.isneginf(output.attention_logits[1, 2]):
        raise StudyError(f"{name}: attention logits must be -inf where mask is False")


def _parameters(target: Callable[..., Any]) -> set[str]:
    bound = set(target.keywords) if isinstance(target, partial) else set()
    return set(inspect.signature(target).parameters) - bound - {"class_weight"}


def _check_settings(owner: str, given: Mapping[str, Any], allowed: set[str]) -> None:
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(sorted(allowed)) or 'none'}"
            raise StudyError(f"--set {owner}.{key}: {owner} has no such setting{hint}")


def _unknown(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    return f"no method {name!r}; {hint}"


def _class_weight(kind: str | None, labels: np.ndarray, classes: int) -> torch.Tensor | None:
    if kind is None:
        return None
    if kind != "balanced":
        raise StudyError(f"--class-weight: expected 'balanced', got {kind!r}")
    count = np.bincount(labels, minlength=classes)
    return torch.tensor(len(labels) / (classes * np.maximum(count, 1)), dtype=torch.float32)


def score(model: nn.Module, bags: BagSubset, device: str = "cpu") -> Score:
    """Probabilities of the bags, and the attention of every instance where the method has any."""
    predictions = predict_bags(model, bags, device)
    if isinstance(model, PooledLogistic):
        return Score(predictions.probabilities)
    attention = [logits.softmax(-1).numpy() for logits in predictions.attention_logits]
    return Score(predictions.probabilities, attention, "attention")


TASK = Task(
    name="mil",
    load=open_bags,
    build=build,
    score=score,
    controls=("prevalence", "bag-size", "lr-mean", "lr-max"),
    default_methods=("mean", "max", "abmil", "acmil", "abmil+aem"),
    unit="bag",
)
