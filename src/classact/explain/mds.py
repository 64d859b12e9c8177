"""Most discriminative stimuli: clusters of units with the same function, and one stimulus that tells each cluster.

Burg, Zenkel, Vystrčilová, Oesterle, Höfling, Willeke, Lause, Müller, Fahey, Ding, Restivo, Sridhar, Gollisch, Berens,
Tolias, Euler, Bethge, Ecker: Most discriminative stimuli for functional cell type clustering, ICLR 2024,
https://arxiv.org/abs/2401.05342. Code of the authors: https://github.com/ecker-lab/most-discriminative-stimuli.

A model predicts the responses r_i(x) of many units to a stimulus x. By turns, the stimulus x_c of each cluster is
optimised to drive that cluster and no other, and each unit moves to the cluster whose stimulus drives it most. The
stimuli explain the clusters, and they are a test kit: shown to a unit that no model knows, they tell its type.

Departures from the authors' code: all stimuli are optimised as one batch, not cluster by cluster. A split is compared
with the loss at which the present clusters were accepted, not with a new random estimate of it, so that the losses of
accepted splits fall; after splitting, the alternation goes on until it is stable. A split that finds no sub-clusters
leaves everything as it was (there, the stimuli were optimised again and the number of steps was not restored).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional as F

from classact.explain.ascent import ascend, gradient_of
from classact.explain.frozen import frozen
from classact.explain.image_priors import NormClip, laplacian_energy

Responses = Callable[[Tensor], Tensor]
UNIT_NORM = NormClip(1.0)


def cluster_contrast(
    means: Float[Tensor, "s k"],
    cluster: Int[Tensor, " s"],
    temperature: float = 1.6,
    among: Bool[Tensor, " k"] | None = None,
) -> Float[Tensor, " s"]:
    """How far each of S stimuli drives its own cluster more than the others (eq. 1), from the clusters' mean responses.

    ``J_c = rbar_c / tau - log(1/K sum_k exp(rbar_k / tau))``. All K clusters, c among them, are in the sum; the 1/K
    makes values for different K comparable. J is 0 if all means are equal and at most log K. Computed in float32 at
    least.

    Parameters
    ----------
    means : (S, K)
        Mean response rbar of each cluster to each stimulus.
    cluster : (S,) int
        The cluster c that each stimulus is meant for.
    temperature : float
        tau, positive; it divides the means, and J is not multiplied by it again.
    among : (K,) bool, optional
        Leave the other clusters out of the sum, and out of K; a stimulus's own cluster always counts.

    Raises
    ------
    ValueError
        If the temperature is not positive or a shape does not fit.

    Examples
    --------
    >>> cluster_contrast(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0]), temperature=1.0)
    tensor([0.5472])
    """
    _check_temperature(temperature)
    if means.ndim != 2 or cluster.shape != means.shape[:1]:
        raise ValueError(
            f"means, cluster: expected shapes (S, K) and (S,), got {tuple(means.shape)}, {tuple(cluster.shape)}"
        )
    scaled = means.to(torch.promote_types(means.dtype, torch.float32)) / temperature
    counted = F.one_hot(cluster, means.shape[1]).bool()
    if among is None:
        counted = torch.ones_like(counted)
    else:
        if among.shape != means.shape[1:]:
            raise ValueError(f"among: expected shape ({means.shape[1]},), got {tuple(among.shape)}")
        counted = counted | among
    own = scaled.gather(1, cluster.unsqueeze(1)).squeeze(1)
    return own - scaled.masked_fill(~counted, -torch.inf).logsumexp(1) + counted.sum(1).log()


def mds_objective(
    responses: Float[Tensor, "s n"],
    assignment: Int[Tensor, " n"],
    cluster: int | Int[Tensor, " s"],
    temperature: float = 1.6,
    among: Sequence[int] | None = None,
) -> Float[Tensor, " s"]:
    """Objective J_c of S stimuli, as [`cluster_contrast`][classact.explain.cluster_contrast], from responses of units.

    Parameters
    ----------
    responses : (S, n)
        Responses, normalised if units differ in scale: else the means are those of the busiest units.
    assignment : (n,) int
        Cluster of each unit, 0 to K - 1 without gaps.
    cluster : int or (S,) int
        The cluster that each stimulus is meant for.
    temperature : float
        tau, positive.
    among : sequence of int, optional
        Compare with these clusters only.

    Returns
    -------
    (S,)
        J, to be maximised, in float32 at least.

    Raises
    ------
    ValueError
        If a shape does not fit, a cluster is empty or does not exist, or the temperature is not positive.
    """
    if responses.ndim != 2 or assignment.shape != responses.shape[1:]:
        raise ValueError(
            "responses, assignment: expected shapes (S, n) and (n,), "
            f"got {tuple(responses.shape)}, {tuple(assignment.shape)}"
        )
    count = torch.bincount(assignment)
    if not bool(count.all()):
        raise ValueError(f"assignment: expected clusters 0 to K - 1 without gaps, {int(count.argmin())} is empty")
    cluster = torch.as_tensor(cluster, device=responses.device).expand(len(responses))
    chosen = [*cluster.tolist(), *(among or ())]
    if min(chosen) < 0 or max(chosen) >= len(count):
        raise ValueError(f"cluster, among: expected clusters from 0 to {len(count) - 1}, got {chosen}")
    mask = None
    if among is not None:
        mask = torch.zeros(len(count), dtype=torch.bool, device=responses.device)
        mask[list(among)] = True
    return cluster_contrast(_means(responses, _membership(assignment, len(count))), cluster, temperature, mask)


def _membership(assignment: Tensor, k: int) -> Tensor:
    """Rows (K, n) that average over the units of each cluster."""
    member = F.one_hot(assignment, k).T.float()
    return member / member.sum(1, keepdim=True)


def _means(responses: Tensor, membership: Tensor) -> Tensor:
    dtype = torch.promote_types(responses.dtype, torch.float32)
    with torch.autocast(responses.device.type, enabled=False):
        return responses.to(dtype) @ membership.to(dtype).T


class ResponseNormalizer(NamedTuple):
    """Responses of each unit relative to those to a reference set: ``(r - mean) / (max(std, min_std) + 1e-6)``.

    Attributes
    ----------
    mean, std : (n,)
        Of each unit over the reference stimuli, such as natural scenes.
    min_std : float
        Smaller deviations count as this one, so that silent units are not blown up.
    """

    mean: Float[Tensor, " n"]
    std: Float[Tensor, " n"]
    min_std: float = 0.1

    @classmethod
    def from_responses(cls, responses: Float[Tensor, "s n"], min_std: float = 0.1) -> "ResponseNormalizer":
        """Mean and standard deviation of responses (S, n) to S reference stimuli."""
        return cls(responses.detach().mean(0), responses.detach().std(0), min_std)

    def __call__(self, responses: Float[Tensor, "s n"]) -> Float[Tensor, "s n"]:
        """Normalise responses (S, n)."""
        if self.mean.shape != responses.shape[1:] or self.std.shape != responses.shape[1:]:
            raise ValueError(
                f"response_norm: expected mean and std of {responses.shape[1]} units, "
                f"got shapes {tuple(self.mean.shape)} and {tuple(self.std.shape)}"
            )
        mean, std = self.mean.to(responses), self.std.to(responses)
        return (responses - mean) / (std.clamp_min(self.min_std) + 1e-6)


@dataclass(frozen=True)
class Rotations:
    """Responses that do not depend on orientation: the largest one over n rotated copies of a stimulus.

    Orientation is then no difference between types, as in the paper's clustering of macaque V4. (Position is removed
    in the model: give every unit a receptive field at the centre.)

    Parameters
    ----------
    n : int
        Number of copies, turned by multiples of 360 / n degrees, with bicubic interpolation: linear one dampens fine
        gratings between the axes, which then look like a type. Outside is 0.
    """

    n: int = 8

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n: expected at least 1 rotation, got {self.n}")

    def copies(self, x: Float[Tensor, "s ..."]) -> Float[Tensor, "m ..."]:
        """All rotations of stimuli (S, C, H, W) or (S, C, T, H, W), frames alike: first all S, then all turned once."""
        if x.ndim not in (4, 5):
            raise ValueError(f"x: expected shape (S, C, H, W) or (S, C, T, H, W), got {tuple(x.shape)}")
        h, w = x.shape[-2:]
        angle = torch.arange(self.n, dtype=x.dtype, device=x.device) * (2 * torch.pi / self.n)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        # coordinates run from -1 to 1 along both sides, whatever their lengths
        turn = torch.stack([cos, -sin * h / w, zero, sin * w / h, cos, zero], dim=1).view(self.n, 2, 3)
        planes = x.reshape(1, -1, h, w).expand(self.n, -1, -1, -1)
        grid = F.affine_grid(turn, [*planes.shape], align_corners=False)
        return F.grid_sample(planes, grid, "bicubic", align_corners=False).reshape(self.n * len(x), *x.shape[1:])

    def __call__(self, model: Responses) -> Responses:
        """Wrap a model: its responses to the rotation of each stimulus that drives a unit most."""
        return lambda x: model(self.copies(x)).unflatten(0, (self.n, len(x))).amax(0)


@dataclass(frozen=True)
class LossPlateau:
    """Stop optimising when the smoothed objective of no stimulus has improved for more than `patience` steps.

    Parameters
    ----------
    patience : int
        Number of steps.
    weight : float
        Weight of the past in the exponential moving average.
    """

    patience: int = 100
    weight: float = 0.9

    def watch(self) -> Callable[[int, Tensor, Tensor], bool]:
        """Return a fresh observer of one ascent; see [`ascend`][classact.explain.ascent.ascend]."""
        average, best, waited = None, None, None

        def stop(_: int, __: Tensor, values: Tensor) -> bool:
            nonlocal average, best, waited
            average = values if average is None else self.weight * average + (1 - self.weight) * values
            if best is None:
                best, waited = average, torch.zeros_like(average)
                return False
            waited = torch.where(average > best, 0, waited + 1)
            best = torch.maximum(best, average)
            return bool((waited > self.patience).all())

        return stop


@dataclass(frozen=True)
class PixelChange:
    """Stop optimising when no value of any stimulus changes by half a grey level for more than `patience` steps.

    Parameters
    ----------
    low, high : float
        Range of the screen, which shows 255 steps between them.
    patience : int
        Number of steps.
    """

    low: float
    high: float
    patience: int = 50

    def watch(self) -> Callable[[int, Tensor, Tensor], bool]:
        """Return a fresh observer of one ascent; see [`ascend`][classact.explain.ascent.ascend]."""
        before, waited = None, 0

        def stop(_: int, x: Tensor, __: Tensor) -> bool:
            nonlocal before, waited
            if before is not None:
                change = (x - before).abs().max() * 255 / (self.high - self.low)
                waited = 0 if float(change) >= 0.5 else waited + 1
            before = x
            return waited > self.patience

        return stop


class Round(NamedTuple):
    """One round of the alternation: clusters that were optimised, their mean objective, and units that moved."""

    n_clusters: int
    objective: float
    moved: int


class MDSRun(NamedTuple):
    """Where one start of the alternation ended.

    ``labels`` (n,) are the argmax over the rows of ``responses`` (K, n) to ``stimuli`` (K, ...); ``objective`` (K,) is
    J with these labels.
    """

    labels: Int[Tensor, " n"]
    stimuli: Float[Tensor, "k ..."]
    responses: Float[Tensor, "k n"]
    objective: Float[Tensor, " k"]
    history: list[Round]


class MDSClustering(ClusterMixin, BaseEstimator):
    """Cluster the units of a response model, with one most discriminative stimulus per cluster.

    What is fitted is a differentiable model, any callable from stimuli to responses of n units, not a matrix of
    samples and features: the units are the samples, and their features are what the model can be made to answer. So
    scikit-learn's ``check_estimator``, which fits matrices, has nothing to check; parameters, ``clone`` and attributes
    follow its conventions. Empty clusters are removed, and labels are 0 to K - 1 without gaps. Local optima are real:
    of several starts, the one with the highest mean objective is kept.

    Parameters
    ----------
    n_clusters : int
        Clusters at the start, at least 2, at most n; choose more than expected.
    temperature : float
        tau of the objective, positive.
    n_rounds : int
        Largest number of rounds of optimisation and reassignment; a start ends earlier if no unit moves or one cluster
        is left.
    steps : int
        Gradient steps for all stimuli in each round.
    lr : float or pair of float
        Length of a step; a pair goes from the first to the second value within a round.
    normalize_grad : bool
        Scale each stimulus's gradient to L2 norm 1, which makes `lr` a length in stimulus space, a fifth of the norm
        of the stimuli by default. The authors take plain gradients (SGD; lr 100 in their example).
    constraint : callable, optional
        Applied to stimuli (K, ...) at the start and after each step, such as
        [`NormClip`][classact.explain.NormClip]; with None they are free.
    smoothness : float
        Weight of [`laplacian_energy`][classact.explain.laplacian_energy], which is subtracted from the objective.
    precondition : callable, optional
        Applied to the gradient (K, ...) before each step, such as a Gaussian blur.
    stopper : LossPlateau or PixelChange, optional
        Ends the steps of a round early.
    contrast : bool
        With False, the stimuli maximise the mean response ``rbar_c / tau`` of their cluster alone: maximally exciting
        stimuli. ``objective_`` is J in either case.
    warm_start_stimuli : bool
        Go on from the stimuli of the last round instead of from noise.
    split : bool
        After the best start, try to split clusters; see `split_clusters`.
    n_init : int
        Number of starts.
    response_norm : ResponseNormalizer or pair (mean, std), optional
        Normalise the responses.
    invariance : Rotations, optional
        Transform the model into one that ignores a property of the stimulus: any callable from model to model.
    random_state : int, RandomState or None
        Determines first assignments and stimuli.

    Attributes
    ----------
    labels_ : ndarray (n,)
        Cluster of each unit.
    stimuli_ : Tensor (K, ...)
        The stimulus of each cluster.
    responses_ : ndarray (K, n)
        Responses to them, normalised; ``labels_`` is their argmax.
    objective_ : ndarray (K,)
        J of each stimulus.
    n_rounds_ : int
        Rounds of the start that was kept.
    history_ : list of Round
        These rounds.
    restarts_ : list of MDSRun
        All starts.
    split_losses_ : list of float
        Mean loss before splitting and after each split that was accepted; empty if none was tried.

    Examples
    --------
    Half of these units respond to light, half to darkness.

    >>> sign = torch.tensor([1.0, -1.0] * 21)
    >>> model = lambda x: x.mean((1, 2, 3)).unsqueeze(1) * sign
    >>> mds = MDSClustering(n_clusters=5, random_state=0).fit(model, (1, 8, 8))
    >>> len(mds.stimuli_), len(set(mds.labels_[::2])), len(set(mds.labels_[1::2]))
    (2, 1, 1)
    >>> measured = model(mds.stimuli_)[:, :3].numpy()
    >>> bool((mds.assign(measured) == mds.labels_[:3]).all())
    True
    """

    def __init__(
        self,
        n_clusters: int = 10,
        temperature: float = 1.6,
        n_rounds: int = 25,
        steps: int = 30,
        lr: float | tuple[float, float] = 0.2,
        normalize_grad: bool = True,
        constraint: Callable[[Tensor], Tensor] | None = UNIT_NORM,
        smoothness: float = 0.0,
        precondition: Callable[[Tensor], Tensor] | None = None,
        stopper: LossPlateau | PixelChange | None = None,
        contrast: bool = True,
        warm_start_stimuli: bool = True,
        split: bool = False,
        n_init: int = 5,
        response_norm: ResponseNormalizer | tuple[Tensor, Tensor] | None = None,
        invariance: Callable[[Responses], Responses] | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.temperature = temperature
        self.n_rounds = n_rounds
        self.steps = steps
        self.lr = lr
        self.normalize_grad = normalize_grad
        self.constraint = constraint
        self.smoothness = smoothness
        self.precondition = precondition
        self.stopper = stopper
        self.contrast = contrast
        self.warm_start_stimuli = warm_start_stimuli
        self.split = split
        self.n_init = n_init
        self.response_norm = response_norm
        self.invariance = invariance
        self.random_state = random_state

    def fit(
        self, model: nn.Module | Responses, stimulus_shape: Sequence[int], labels: Any | None = None
    ) -> "MDSClustering":
        """Cluster the units of a model.

        Parameters
        ----------
        model : Module or callable
            From stimuli (K, *stimulus_shape) to responses (K, n), sample by sample. A module is evaluated in evaluation
            mode and handed back as it was.
        stimulus_shape : sequence of int
            (C, H, W), (C, T, H, W), or any other shape of one stimulus.
        labels : (n,) int, optional
            First assignment, 0 to K - 1 without gaps, in place of random chunks; `n_clusters` is then not used.

        Returns
        -------
        MDSClustering
            This estimator.

        Raises
        ------
        ValueError
            If a parameter is out of range, or the model does not answer with finite responses (K, n).
        FloatingPointError
            If a gradient is not finite.
        """
        _check_temperature(self.temperature)
        for name in ("n_rounds", "steps", "n_init"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.smoothness < 0:
            raise ValueError(f"smoothness: expected 0 or more, got {self.smoothness}")
        with frozen(model):
            twin = _Twin(model, tuple(stimulus_shape), self)
            n = twin.n_units()
            if labels is None and not 2 <= self.n_clusters <= n:
                raise ValueError(f"n_clusters: expected 2 to {n}, the number of units, got {self.n_clusters}")
            first = None if labels is None else _check_labels(labels, n).to(twin.device)
            self.restarts_ = []
            for _ in range(self.n_init):
                start = twin.chunks(n, self.n_clusters) if first is None else first
                self.restarts_.append(twin.alternate(start, None, self.n_rounds, self.steps))
        self._keep(max(self.restarts_, key=lambda run: float(run.objective.mean())))
        self.split_losses_: list[float] = []
        return self.split_clusters(model) if self.split else self

    def split_clusters(
        self, model: nn.Module | Responses, n_subclusters: int = 2, steps: int = 20, rounds: int = 50, substeps: int = 1
    ) -> "MDSClustering":
        """Split clusters of a fitted estimator where that lowers the mean loss, until no split does.

        The loss, the mean over clusters of -J plus the penalty, is that after `steps` steps from noise. Each cluster's
        units are clustered by themselves; the new clusters join the others, all stimuli are optimised anew, all units
        are reassigned, all stimuli are optimised again. If the loss is then lower, the split stays. If one stays, the
        alternation of `fit` goes on from the new clusters in the end.

        Parameters
        ----------
        model : Module or callable
            The model that was fitted.
        n_subclusters : int
            Sub-clusters to try, at least 2.
        steps : int
            Steps before a loss is compared.
        rounds, substeps : int
            Rounds of the sub-clustering, and gradient steps in each.

        Returns
        -------
        MDSClustering
            This estimator, with new attributes.
        """
        check_is_fitted(self)
        if n_subclusters < 2:
            raise ValueError(f"n_subclusters: expected at least 2, got {n_subclusters}")
        with frozen(model):
            twin = _Twin(model, tuple(self.stimuli_.shape[1:]), self)
            labels = torch.from_numpy(self.labels_).to(twin.device)
            x = twin.ascend(labels, None, steps)
            losses = [twin.loss(labels, x)]
            before = 0
            while before < len(losses):
                before = len(losses)
                for c in range(int(labels.max()) + 1):
                    tried = twin.split(labels, c, n_subclusters, steps, rounds, substeps)
                    if tried is not None and tried[2] < losses[-1]:
                        labels, x = tried[:2]
                        losses.append(tried[2])
            if len(losses) > 1:
                self._keep(twin.alternate(labels, x, self.n_rounds, self.steps))
        self.split_losses_ = losses
        return self

    def assign(self, responses: Any) -> np.ndarray:
        """Assign units by measured responses to ``stimuli_``: no model is needed.

        Parameters
        ----------
        responses : (K, m) or (trials, K, m)
            Responses of m units; trials are averaged. Adding a constant to the responses of a unit or scaling them
            changes nothing.

        Returns
        -------
        ndarray (m,)
            Clusters.

        Raises
        ------
        ValueError
            If there are not K stimuli or a response is not finite.
        """
        check_is_fitted(self)
        measured = torch.as_tensor(responses).detach().cpu().double().numpy()
        k = len(self.stimuli_)
        if measured.ndim not in (2, 3) or measured.shape[-2] != k:
            raise ValueError(f"responses: expected shape ({k}, m) or (trials, {k}, m), got {measured.shape}")
        if not np.isfinite(measured).all():
            raise ValueError("responses: expected finite numbers")
        return (measured.mean(0) if measured.ndim == 3 else measured).argmax(0)

    def response_matrix(self) -> np.ndarray:
        """Mean response (K, K) to stimulus k (row) of the units of cluster c (column), divided by that to their own."""
        check_is_fitted(self)
        means = np.stack([self.responses_[:, self.labels_ == c].mean(1) for c in range(len(self.stimuli_))], axis=1)
        return means / means.diagonal().clip(min=1e-8)

    def _keep(self, run: MDSRun) -> None:
        self.labels_ = run.labels.cpu().numpy()
        self.stimuli_ = run.stimuli
        self.responses_ = run.responses.cpu().numpy()
        self.objective_ = run.objective.cpu().numpy()
        self.history_ = run.history
        self.n_rounds_ = len(run.history)


class _Twin:
    """The model as the clustering sees it, with what is needed to optimise stimuli for its units."""

    def __init__(self, model: Any, shape: tuple[int, ...], settings: MDSClustering) -> None:
        weights = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        weights = [w for w in weights if w.is_floating_point()]
        self.device = weights[0].device if weights else torch.device("cpu")
        self.dtype = weights[0].dtype if weights else torch.float32
        self.model = model if settings.invariance is None else settings.invariance(model)
        norm = settings.response_norm
        self.normalize = None if norm is None else ResponseNormalizer(*norm)
        seed = int(check_random_state(settings.random_state).randint(2**31 - 1))
        self.generator = torch.Generator().manual_seed(seed)
        self.shape, self.settings = shape, settings

    def respond(self, x: Tensor, units: Tensor | None = None) -> Tensor:
        r = self.model(x)
        if not isinstance(r, Tensor) or r.ndim != 2 or len(r) != len(x):
            got = tuple(r.shape) if isinstance(r, Tensor) else type(r).__name__
            raise ValueError(f"model: expected responses of shape ({len(x)}, n) to {len(x)} stimuli, got {got}")
        r = r.to(torch.promote_types(r.dtype, torch.float32))
        r = r if self.normalize is None else self.normalize(r)
        return r if units is None else r[:, units]

    def n_units(self) -> int:
        with torch.no_grad():
            return self._finite(self.respond(self.noise(1))).shape[1]

    @staticmethod
    def _finite(r: Tensor) -> Tensor:
        if not bool(r.isfinite().all()):
            raise ValueError("model: expected finite responses")
        return r

    def noise(self, k: int) -> Tensor:
        # drawn on the CPU, so that a seed gives the same stimuli on every device
        x = torch.randn(k, *self.shape, generator=self.generator).to(self.device, self.dtype)
        return x if self.settings.constraint is None else self.settings.constraint(x)

    def chunks(self, n: int, k: int) -> Tensor:
        """Shuffle units and cut them into chunks of ceil(n / k); the last ones may be missing."""
        labels = torch.empty(n, dtype=torch.long)
        labels[torch.randperm(n, generator=self.generator)] = torch.arange(n) // -(-n // k)
        return labels.to(self.device)

    def objective(self, labels: Tensor, units: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """What the stimuli of all clusters maximise: (K, ...) -> (K,)."""
        k = int(labels.max()) + 1
        membership, cluster = _membership(labels, k), torch.arange(k, device=self.device)
        settings = self.settings

        def value(x: Tensor) -> Tensor:
            means = _means(self.respond(x, units), membership)
            if settings.contrast:
                j = cluster_contrast(means, cluster, settings.temperature)
            else:
                j = means.diagonal() / settings.temperature
            return j - settings.smoothness * laplacian_energy(x) if settings.smoothness else j

        return value

    def ascend(self, labels: Tensor, x: Tensor | None, steps: int, units: Tensor | None = None) -> Tensor:
        """Optimise the stimuli of all clusters at once, from noise where `x` is None."""
        settings = self.settings
        gradient = gradient_of(self.objective(labels, units))

        def direction(x: Tensor) -> tuple[Tensor, Tensor]:
            step, values = gradient(x)
            return (step if settings.precondition is None else settings.precondition(step)), values

        constraint = settings.constraint
        return ascend(
            direction,
            self.noise(int(labels.max()) + 1) if x is None else x,
            steps,
            lr=settings.lr,
            scale="norm" if settings.normalize_grad else None,
            project=None if constraint is None else lambda x, _: constraint(x),
            watch=None if settings.stopper is None else settings.stopper.watch(),
        )

    def loss(self, labels: Tensor, x: Tensor) -> float:
        with torch.no_grad():
            return -float(self.objective(labels)(x).mean())

    def alternate(
        self, labels: Tensor, x: Tensor | None, rounds: int, steps: int, units: Tensor | None = None
    ) -> MDSRun:
        """Optimise the stimuli and reassign the units by turns; `labels` are without gaps."""
        history: list[Round] = []
        x = self.noise(int(labels.max()) + 1) if x is None else x
        for _ in range(rounds):
            k = len(x)
            x = self.ascend(labels, None if history and not self.settings.warm_start_stimuli else x, steps, units)
            with torch.no_grad():
                r = self._finite(self.respond(x, units))
            j = self._contrast(r, labels)
            new = r.argmax(0)
            moved = int((new != labels).sum())
            history.append(Round(k, float(j.mean()), moved))
            used, labels = new.unique(return_inverse=True)
            if len(used) < k:
                x, r = x[used], r[used]
            if moved == 0 or len(used) == 1:
                break
        return MDSRun(labels, x, r, self._contrast(r, labels), history)

    def _contrast(self, r: Tensor, labels: Tensor) -> Tensor:
        cluster = torch.arange(len(r), device=self.device)
        return cluster_contrast(_means(r, _membership(labels, len(r))), cluster, self.settings.temperature)

    def split(
        self, labels: Tensor, c: int, parts: int, steps: int, rounds: int, substeps: int
    ) -> tuple[Tensor, Tensor, float] | None:
        """Split cluster `c`: new labels, stimuli and mean loss; None if it is gone or does not fall apart."""
        units = (labels == c).nonzero().squeeze(1)
        if len(units) < 2:
            return None
        start = self.chunks(len(units), min(parts, len(units)))
        part = self.alternate(start, None, rounds, substeps, units).labels
        if int(part.max()) == 0:
            return None
        labels = labels.clone()
        labels[units] = torch.where(part == 0, c, part + labels.max())
        x = self.ascend(labels, None, steps)
        with torch.no_grad():
            labels = self._finite(self.respond(x)).argmax(0).unique(return_inverse=True)[1]
        x = self.ascend(labels, None, steps)
        return labels, x, self.loss(labels, x)


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")


def _check_labels(labels: Any, n: int) -> Tensor:
    first = torch.as_tensor(labels).long()
    if first.shape != (n,):
        raise ValueError(f"labels: expected shape ({n},), got {tuple(first.shape)}")
    k = int(first.max()) + 1
    if first.unique().tolist() != list(range(k)) or k < 2:
        raise ValueError(
            f"labels: expected clusters 0 to K - 1 without gaps, at least 2, got {first.unique().tolist()}"
        )
    return first
