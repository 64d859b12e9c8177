"""The task ``mil``: find the multiple-instance method that classifies these bags best.

To add a method, write its model (and loss) and add one line to `METHODS`; a part that joins other methods with ``+``
goes into `TERMS` or
`WRAPPERS`.
"""

import difflib
import importlib
import inspect
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import loguniform
from torch import nn

from classact.data.bag_files import RawBag, Source
from classact.data.bags import BagDataset, BagSubset, open_bags
from classact.data.check import check_bags
from classact.data.provenance import provenance, summarise
from classact.evidence.comparison import Score, Task
from classact.evidence.store import StudyError
from classact.mil.acmil import ACMIL, ACMILLoss
from classact.mil.aem import AttentionEntropy, Subsample
from classact.mil.attention import ABMIL, MultiHeadABMIL
from classact.mil.clam import CLAMSB, CLAMLoss
from classact.mil.dsmil import DSMIL, DSMILLoss
from classact.mil.imbalance import FocalLoss, LDAMLoss, LogitAdjustment
from classact.mil.lit import fit_bags
from classact.mil.location import ATTENTION, deletion_insertion, locate
from classact.mil.mambamil import MambaMIL
from classact.mil.mhim import MHIM, fit_mhim
from classact.mil.model import BagCrossEntropy, MILLoss, Standardized
from classact.mil.pooling import MaxMIL, MeanMIL, PooledLogistic
from classact.mil.scmil import SCMIL, SCMILLoss
from classact.mil.transmil import TransMIL

TRAINING = {"epochs", "lr", "weight_decay", "batch_size", "patience", "sampler"}
EVERYWHERE = TRAINING | {"keep", "class_weight", "standardize"}
EPOCHS = 50


def fit_plain(
    model: Callable[..., nn.Module],
    loss: Callable[..., MILLoss],
    train: BagSubset,
    validation: BagSubset,
    *,
    seed: int,
    device: str = "cpu",
    terms: tuple[MILLoss, ...] = (),
    wrappers: tuple[Callable[[nn.Module], nn.Module], ...] = (),
    mhim: Mapping[str, Any] | None = None,
    class_weight: str | None = None,
    standardize: bool | None = None,
    epochs: int = EPOCHS,
    steps: int | None = None,
    patience: int | None = 20,
    keep: Literal["best", "last"] = "best",
    **settings: Any,
) -> nn.Module:
    """Train a network on bags with a loss, and keep the epoch with the lowest validation cross-entropy.

    Parameters
    ----------
    model, loss : callable
        Built as ``model(in_dim, n_classes, **...)`` and ``loss(**...)``.
    terms : tuple of MILLoss
        Added to the loss.
    wrappers : tuple of callable
        Put around the network.
    mhim : mapping, optional
        Train in two stages by [`fit_mhim`][classact.mil.fit_mhim] with these arguments.
    class_weight : {"balanced"}, optional
        Weigh classes by the inverse of their frequency among the training bags.
    standardize : bool, optional
        Scale features by the mean and deviation over the training bags' instances. Default: only for tables of
        hand-made features.
    steps : int, optional
        Train for so many optimiser steps in place of `epochs`, to within half an epoch, without stopping early.
    keep : {"best", "last"}
        Weights of the epoch with the lowest validation cross-entropy, or those of the last; then nothing stops early.
    **settings
        Arguments of the network, the loss or `classact.mil.lit.fit_bags`, told apart by name.
    """
    torch.manual_seed(seed)
    classes = len(train.classes)
    weight = _class_weight(class_weight, train.labels, classes)
    of_loss = {k: v for k, v in settings.items() if k in _parameters(loss)}
    of_training = {k: v for k, v in settings.items() if k in TRAINING}
    of_model = {k: v for k, v in settings.items() if k not in of_loss and k not in of_training}
    if "class_counts" in inspect.signature(loss).parameters:
        of_loss["class_counts"] = np.bincount(train.labels, minlength=classes)
    criterion = loss(class_weight=weight, **of_loss)
    for term in terms:
        criterion = criterion + term
    scaled = train.tabular if standardize is None else standardize
    scaling: Standardized | None = None

    def network() -> nn.Module:
        made = model(train.in_dim, classes, **of_model)
        for wrap in wrappers:
            made = wrap(made)
        return Standardized(made, scaling.mean, scaling.scale) if scaling is not None else made

    if scaled:
        scaling = Standardized.from_bags(_Any(train.in_dim), train)
    if steps is not None:
        per_epoch = math.ceil(len(train) / of_training.get("batch_size", 1))
        epochs, patience = max(1 if mhim is None else 2, round(steps / per_epoch)), None
        of_training = {k: v for k, v in of_training.items() if k not in ("epochs", "patience")}
    shared: dict[str, Any] = {"seed": seed, "device": device, "epochs": epochs, "patience": patience, **of_training}
    watched = validation if keep == "best" else None
    if mhim is None:
        fitted = fit_bags(network(), criterion, train, watched, **shared)
    else:
        fitted = fit_mhim(network, criterion, train, watched, **{**shared, **mhim})
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
    C: float | None = None,
    **_options: Any,
) -> nn.Module:
    """Fit logistic regression on a summary of each bag.

    Its regularisation `C` is chosen on validation from six values where none is given.
    """
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
        for c in (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0) if C is None else (C,):
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


METHODS: dict[str, Callable[..., nn.Module]] = {
    "mean": partial(fit_plain, MeanMIL, BagCrossEntropy),
    "max": partial(fit_plain, MaxMIL, BagCrossEntropy),
    "abmil": partial(fit_plain, ABMIL, BagCrossEntropy),
    "gated-abmil": partial(fit_plain, partial(ABMIL, gated=True), BagCrossEntropy),
    "mha": partial(fit_plain, MultiHeadABMIL, BagCrossEntropy),
    "acmil": partial(fit_plain, ACMIL, ACMILLoss),
    "acmil-mha": partial(fit_plain, partial(ACMIL, attention="mha"), ACMILLoss),
    "dsmil": partial(fit_plain, DSMIL, DSMILLoss),
    "clam-sb": partial(fit_plain, CLAMSB, CLAMLoss),
    "transmil": partial(fit_plain, TransMIL, BagCrossEntropy),
    "mambamil": partial(fit_plain, MambaMIL, BagCrossEntropy),
    "bimamba": partial(fit_plain, partial(MambaMIL, mode="bidirectional"), BagCrossEntropy),
    "mamba": partial(fit_plain, partial(MambaMIL, mode="plain"), BagCrossEntropy),
    # the classifier learns last: validation results of the first half of the training say nothing
    "scmil": partial(fit_plain, SCMIL, SCMILLoss, keep="last", sampler="balanced", batch_size=16),
    "balanced-abmil": partial(fit_plain, ABMIL, BagCrossEntropy, sampler="balanced"),
    "focal-abmil": partial(fit_plain, ABMIL, FocalLoss),
    "ldam-abmil": partial(fit_plain, ABMIL, partial(LDAMLoss, scale=1.0)),
    "logit-adjusted-abmil": partial(fit_plain, ABMIL, LogitAdjustment),
    "prevalence": partial(fit_logistic, "none"),
    "bag-size": partial(fit_logistic, "size"),
    "lr-mean": partial(fit_logistic, "mean"),
    "lr-max": partial(fit_logistic, "max"),
}
# what joins a method with +: a term of its loss, or a wrapper of its network
TERMS: dict[str, Callable[..., MILLoss]] = {"aem": AttentionEntropy}
WRAPPERS: dict[str, Callable[..., nn.Module]] = {"subsample": Subsample}
_DROPOUT = {"dropout": [0.0, 0.25, 0.5]}
_ATTENTION = {**_DROPOUT, "hidden": [64, 128, 256]}
_SCAN = {"layers": [1, 2], "dropout": [0.0, 0.25]}
_BRANCHES = {"branches": [1, 3, 5], "top_k": [5, 10, 20], "mask_drop": [0.3, 0.6], "diversity_weight": [0.0, 0.3, 1.0]}
# what --tune draws from, for a method or a part; learning rate and weight decay come on top for every network
SPACES: dict[str, dict[str, Any]] = {
    "mean": {"dim": [64, 128, 256, 512]},
    "max": {"dim": [64, 128, 256, 512]},
    **dict.fromkeys(("abmil", "gated-abmil", "balanced-abmil"), _ATTENTION),
    "mha": {"dropout": [0.0, 0.1, 0.25]},
    "acmil": _BRANCHES,
    "acmil-mha": _BRANCHES,
    "dsmil": {**_DROPOUT, "instance_weight": [0.25, 0.5, 0.75], "average": [False, True]},
    "clam-sb": {**_DROPOUT, "bag_weight": [0.5, 0.7, 0.9], "k_sample": [4, 8, 16], "instance_loss": ["svm", "ce"]},
    "transmil": {"dropout": [0.0, 0.1, 0.25]},
    "mambamil": {**_SCAN, "rate": [5, 10, 20]},
    "bimamba": _SCAN,
    "mamba": _SCAN,
    "scmil": {"temperature": [0.07, 0.1, 0.5], "curriculum": ["linear", "parabolic", "cosine"]},
    "focal-abmil": {**_ATTENTION, "gamma": [0.5, 1.0, 2.0, 5.0]},
    "ldam-abmil": {**_ATTENTION, "max_margin": [0.3, 0.5, 1.0]},
    "logit-adjusted-abmil": {**_ATTENTION, "tau": [0.5, 1.0, 1.5]},
    "aem": {"weight": loguniform(1e-3, 1.0)},
    "subsample": {"ratio": [0.25, 0.5, 0.75]},
    "mhim": {"high": [0.01, 0.03, 0.05, 0.1], "random": [0.0, 0.25, 0.5], "alpha": [0.1, 0.5, 1.0]},
}
# scan the instances in the order of their coordinates, or else as they are stored
SCANNING = ("mambamil", "bimamba", "mamba")


def build(name: str, settings: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """Make the ``fit`` of a method: ``acmil``, ``acmil+aem``, ``mhim(acmil)+aem``, or your ``package.module:factory``.

    Raises
    ------
    StudyError
        If a name or a setting is unknown, or the user's factory does not obey the task.
    """
    if unknown := set(options) - EVERYWHERE - {"steps"}:
        raise StudyError(f"no option {', '.join(sorted(unknown))}; there are {', '.join(sorted(EVERYWHERE))}")
    masked, base, parts = parse(name)
    known = {*METHODS, *TERMS, *WRAPPERS, "mhim"}
    fit = _own(base) if ":" in base else METHODS.get(base)
    if fit is None:
        raise StudyError(_unknown(base, [*METHODS, "mhim"]))
    for owner in settings:
        if owner not in known and ":" not in owner:
            raise StudyError(f"--set {owner}.…: {_unknown(owner, known)}")
    if (parts or masked) and getattr(fit, "func", None) is not fit_plain:
        raise StudyError(f"{name}: {base} is not a network trained by the plain step, and takes no parts")
    own = dict(settings.get(base, {}))
    if getattr(fit, "func", None) is fit_logistic:
        _check_settings(base, own, {"C"})
        return partial(fit, **{k: v for k, v in options.items() if k == "class_weight"}, **own)
    if getattr(fit, "func", None) is not fit_plain:  # a training step of its own
        known = _parameters(fit) - {"train", "validation", "seed", "device"}
        _check_settings(base, own, known)
        return partial(fit, **{k: v for k, v in options.items() if k in known}, **own)
    model, loss = fit.args[:2]  # type: ignore[attr-defined]
    allowed = (_parameters(model) - {"in_dim", "n_classes"}) | _parameters(loss) | EVERYWHERE
    _check_settings(base, own, allowed)
    network = _checked(base, model, 8, 2, **{k: v for k, v in own.items() if k in _parameters(model)})
    if ":" in base:
        _obeys(base, network)
    terms, wrappers = [], []
    for part in parts:
        if part not in {*TERMS, *WRAPPERS}:
            raise StudyError(f"{name}: {_unknown(part, [*TERMS, *WRAPPERS])}")
        target = TERMS.get(part) or WRAPPERS[part]
        of_part = dict(settings.get(part, {}))
        _check_settings(part, of_part, _parameters(target) - {"network"})
        if part in TERMS:
            terms.append(_checked(part, target, **of_part))
        else:
            _checked(part, target, _Any(1), **of_part)
            wrappers.append(partial(target, **of_part))
    of_mhim = None
    if masked:
        of_mhim = dict(settings.get("mhim", {}))
        mining = _parameters(MHIM) - {"model", "loss", "teacher", *TRAINING}
        _check_settings("mhim", of_mhim, mining | TRAINING | {"student_init"})
        _checked("mhim", MHIM, network, **{k: v for k, v in of_mhim.items() if k in mining})
    return partial(fit, terms=tuple(terms), wrappers=tuple(wrappers), mhim=of_mhim, **{**options, **own})


def parse(name: str) -> tuple[bool, str, list[str]]:
    """Split a method's name into: whether MHIM trains it, the method itself, and the parts that join it."""
    head, bracket, rest = name.partition("(")
    if not bracket:
        base, *parts = name.split("+")
        return (True, "abmil", parts) if base == "mhim" else (False, base, parts)
    inside, closed, after = rest.partition(")")
    if head != "mhim" or not closed or (after and not after.startswith("+")) or "(" in inside:
        raise StudyError(f"{name}: expected a method, method+part, or mhim(method)+part")
    base, *parts = [*inside.split("+"), *after.split("+")[1:]]
    return True, base, parts


def _checked(owner: str, target: Callable[..., Any], *positional: Any, **settings: Any) -> Any:
    try:
        return target(*positional, **settings)
    except (ValueError, TypeError) as error:
        raise StudyError(f"--set {owner}: {error}") from error


def remark(name: str, bags: Any) -> str:
    """What a reader of the table must know of a method on these bags."""
    base = parse(name)[1]
    if base == "transmil":
        return "order as stored"
    return "order unknown" if base in SCANNING and bags.read(0).coords is None else ""


class _Any(nn.Module):
    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim


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
    return set(inspect.signature(target).parameters) - bound - {"class_weight", "class_counts"}


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


@torch.inference_mode()
def score(model: nn.Module, bags: BagSubset | BagDataset, device: str = "cpu") -> Score:
    """Probabilities of the bags, and scores of their instances from the same pass where the method looks at any."""
    model = model.to(device).eval()
    p, found = [], []
    for bag in bags:
        coords = None if bag.coords is None else bag.coords[None].to(device)
        output, scores = locate(model, bag.x[None].to(device), coords)
        p.append(output.logits[0].float().softmax(-1).cpu().numpy())
        found.append({kind: of.cpu().numpy() for kind, of in scores.items()})
    if isinstance(model, PooledLogistic):
        return Score(np.stack(p))
    kinds = [kind for kind in found[0] if all(kind in scores for scores in found)]
    return Score(np.stack(p), {kind: [scores[kind] for scores in found] for kind in kinds})


def explain(
    model: nn.Module, bags: BagSubset, score: Score, seed: int, device: str = "cpu"
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Test attention as evidence: how much more the prediction changes for the most attended than for any instances.

    ``deletion`` is the mean fall of the predicted class's probability beyond that at random, ``insertion`` the mean
    rise; both are above 0 if attention finds what the prediction rests on.
    """
    curves = deletion_insertion(model, bags, score.instance_scores[ATTENTION], seed, device)
    if not curves:
        return {}, {}
    values = {
        "deletion": float((curves["deletion_random"] - curves["deletion_top"])[1:].mean()),
        "insertion": float((curves["insertion_top"] - curves["insertion_random"])[:-1].mean()),
    }
    return values, curves


def space(name: str) -> dict[str, Any]:
    """Search space of a method and of the parts that join it, ``{"acmil.lr": distribution, ...}``.

    A user's own factory may carry its space as an attribute ``search_space``, without the learning rate and weight
    decay, which every network gets.
    """
    masked, base, parts = parse(name)
    fit = METHODS.get(base)
    if getattr(fit, "func", None) is fit_logistic:
        return {} if base == "prevalence" else {f"{base}.C": loguniform(1e-4, 10)}
    own = dict(SPACES.get(base, {}))
    if ":" in base:
        own = dict(getattr(_own(base).args[0], "search_space", {}))  # type: ignore[attr-defined]
    if getattr(fit, "func", None) is fit_plain or ":" in base:
        own |= {"lr": loguniform(1e-5, 1e-2), "weight_decay": loguniform(1e-6, 1e-2)}
    found = {f"{base}.{key}": values for key, values in own.items()}
    for part in [*parts, *(["mhim"] if masked else [])]:
        found |= {f"{part}.{key}": values for key, values in SPACES.get(part, {}).items()}
    return found


def budget(options: Mapping[str, Any], n_train: int) -> dict[str, int]:
    """Steps of every configuration: those of the epochs asked for, at the batch size asked for."""
    return {"steps": options.get("epochs", EPOCHS) * math.ceil(n_train / options.get("batch_size", 1))}


def cost(
    name: str,
    settings: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any],
    bags: BagDataset,
    sizes: np.ndarray,
) -> tuple[float, float]:
    """Measure what one fit on all bags would take: seconds with one thread, and megabytes on disk.

    Trainings of different length on a few bags of random features, as large as the median bag, give the time of a
    step; it is taken to grow with the mean size of the bags.
    """
    typical = int(np.median(sizes))
    rng = np.random.default_rng(0)
    classes = max(len(bags.classes), 2)
    sources = [
        Source(f"{i}", "memory", bags.sources[0].path, arrays=RawBag(rng.normal(size=(typical, bags.in_dim))))
        for i in range(2 * classes)
    ]
    labels = [i % classes for i in range(2 * classes)]
    made = BagDataset(sources, labels, bags.classes, [source.id for source in sources])
    train, validation = made.subset(range(classes)), made.subset(range(classes, 2 * classes))
    base = parse(name)[1]
    own = dict(settings.get(base, {}))
    wanted = own.pop("epochs", options.get("epochs", EPOCHS))
    taken, lengths = [], (2, 3, 9)  # the first one loads and warms up what the others use
    for epochs in lengths:
        fit = build(name, {**settings, base: own}, {**options, "epochs": epochs, "patience": None})
        started = time.perf_counter()
        model = fit(train, validation, seed=0, device="cpu")
        taken.append(time.perf_counter() - started)
    megabytes = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    if not hasattr(model, "history"):  # not trained in steps
        return taken[-1], megabytes
    per_bag = max(taken[2] - taken[1], 0.0) / (lengths[2] - lengths[1]) / len(train)
    return per_bag * sizes.mean() / typical * len(sizes) * wanted, megabytes


def made_by(bags: BagDataset) -> dict[str, Any]:
    """What the files say of how the features were made: encoder, magnification, patch size."""
    return summarise([provenance(source) for source in bags.sources])


TASK = Task(
    name="mil",
    load=open_bags,
    check=check_bags,
    build=build,
    score=score,
    controls=("prevalence", "bag-size", "lr-mean", "lr-max"),
    default_methods=("mean", "max", "abmil", "acmil", "abmil+aem"),
    unit="bag",
    remark=remark,
    space=space,
    budget=budget,
    cost=cost,
    explain=explain,
    provenance=made_by,
)
