"""Multitasking Hebbian networks: associative memories that recall several diluted patterns at once.

Agliari, Alessandrelli, Barra, Ricci-Tersenghi: Parallel Learning by Multitasking Neural Networks, Journal of
Statistical Mechanics 2023, https://arxiv.org/abs/2308.04106. No code of the authors is known.

N Ising spins s_i = +-1 store K archetypes with entries xi_i^mu in {-1, 0, 1}, blank with probability d and of either
sign with (1 - d) / 2. With the Mattis overlaps ``m_mu = sum_i xi_i^mu s_i / N``,

    H(s) = -(N/2) sum_mu m_mu^2,   h_i = sum_mu xi_i^mu m_mu without the self-interaction.

Spins that one pattern leaves free are used by the next. For mild dilution the amplitudes fall as a power law,
``(1 - d) d^(mu - 1)`` at zero temperature (hierarchical regime); for strong dilution, 1 - d below about the scaled
temperature ``t = T / (1 - d)``, all are equal (parallel regime). Archetypes can also be learned from M noisy examples
``eta^(mu,a) = xi^mu chi^(mu,a)`` each, P(chi = 1) = (1 + r) / 2 for quality r, and with
``R = r^2 + (1 - r^2) / M = r^2 (1 + rho)``

    supervised    J_ij = 1/(N R) sum_mu ebar_i^mu ebar_j^mu,  ebar the mean of the examples of an archetype,
    unsupervised  J_ij = 1/(N R M) sum_(mu,a) eta_i^(mu,a) eta_j^(mu,a).

Conventions: these couplings have their critical temperature at 1 - d (or 1 with ``normalize=True``, which divides them
by 1 - d), and both protocols have the same factor 1/R, so that temperatures compare. For N to infinity an example
enters a site only through the mean of the examples there, in both protocols, which is why their thresholds agree; at
finite N the unsupervised network has the load K M / N of an ordinary Hopfield network on top.

Theory is for N to infinity: [`self_consistency`][classact.rules.self_consistency] for equilibrium,
[`one_step`][classact.rules.one_step] for a single update of all spins. Both sum over the binomial distribution of the
examples; [`one_step_gaussian`][classact.rules.one_step_gaussian] is the usual signal-to-noise estimate.

>>> xi = diluted_patterns(K=3, N=4000, d=0.25, seed=0)
>>> model = MultitaskingHebbian(random_state=0).fit(xi)
>>> cue = np.where(np.arange(4000) < 2000, hierarchical_state(xi), 0)  # of the other half nothing is known
>>> model.overlaps(model.run(cue).state).round(2).tolist()
[0.75, 0.2, 0.04]
>>> hierarchical_amplitudes(3, 0.25).round(3).tolist()
[0.75, 0.188, 0.047]
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int8, Num, Shaped
from scipy import stats
from scipy.optimize import brentq
from scipy.special import erf
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_is_fitted, validate_data

Protocol = Literal["store", "supervised", "unsupervised"]
Dynamics = Literal["sequential", "parallel"]
MOST_PATTERNS = 12  # 3^12 configurations of the entries of a site
MOST_TERMS = 2**21
TIE = 1e-12
REPLICAS = 512  # that share their updates; as many again make a chunk for another thread


def diluted_patterns(K: int, N: int, d: float, seed: int) -> Int8[np.ndarray, "k n"]:
    """Draw K archetypes: entries are 0 with probability d, else 1 or -1.

    Examples
    --------
    >>> diluted_patterns(2, 8, 0.5, seed=0).shape
    (2, 8)
    """
    _check_counts(K=K, N=N)
    _check_dilution(d)
    u = np.random.default_rng(seed).random((K, N))
    return (u < (1 - d) / 2).astype(np.int8) - (u >= (1 + d) / 2).astype(np.int8)


def noisy_examples(xi: Num[np.ndarray, "k n"], M: int, r: float, seed: int) -> Int8[np.ndarray, "k m n"]:
    """M examples of each archetype: every entry is kept with probability (1 + r) / 2, else its sign is flipped.

    Parameters
    ----------
    xi : (K, N)
        Archetypes with entries -1, 0 and 1; blanks stay blank.
    M : int
        Number of examples of each.
    r : float
        Quality in (0, 1]; 1 gives copies.
    """
    _check_ternary("xi", xi)
    _check_examples(r, M)
    rng = np.random.default_rng((1, seed))  # not the stream of diluted_patterns for the same seed
    kept = rng.random((len(xi), M, xi.shape[1]), dtype=np.float32) < (1 + r) / 2
    return (2 * kept.view(np.int8) - np.int8(1)) * xi[:, None].astype(np.int8)


def hierarchical_state(xi: Num[np.ndarray, "k n"], seed: int = 0) -> Int8[np.ndarray, " n"]:
    """State in which every spin follows the first pattern that is not blank there; a coin is thrown if all are."""
    _check_ternary("xi", xi)
    state = np.random.default_rng((2, seed)).choice(np.array([-1, 1], np.int8), xi.shape[1])
    for pattern in xi[::-1]:
        state = np.where(pattern != 0, pattern, state).astype(np.int8)
    return state


def mattis_overlaps(s: Num[np.ndarray, "*r n"], xi: Num[np.ndarray, "k n"]) -> Float[np.ndarray, "*r k"]:
    """Mattis overlaps ``s . xi^mu / N`` of states and patterns."""
    if s.shape[-1] != xi.shape[1]:
        raise ValueError(f"s, xi: expected the same number of spins, got {s.shape[-1]} and {xi.shape[1]}")
    return s.astype(np.float64) @ xi.T.astype(np.float64) / xi.shape[1]


class QuadraticLosses(NamedTuple):
    """``||xi^mu - s||^2 / (2N)`` and ``||xi^mu + s||^2 / (2N)`` of every state and pattern."""

    plus: Float[np.ndarray, "*r k"]
    minus: Float[np.ndarray, "*r k"]


def quadratic_losses(xi: Num[np.ndarray, "k n"], s: Num[np.ndarray, "*r n"]) -> QuadraticLosses:
    """Sum-of-squares losses of states as reconstructions of the patterns and of their negatives.

    With ``1 - d_mu`` the part of pattern mu that is not blank, ``L_plus, L_minus = (2 - d_mu) / 2 -+ m_mu``, so that
    ``H / N = -1/2 sum_mu [((2 - d_mu) / 2)^2 - L_plus L_minus]``: the products have the minima of the Hamiltonian. The
    plain sum of L_plus does not: it is linear in s, and least where every spin follows the majority of its patterns.

    Examples
    --------
    >>> quadratic_losses(np.array([[1, 0, -1, 1]]), np.array([1, 1, -1, -1]))
    QuadraticLosses(plus=array([0.625]), minus=array([1.125]))
    """
    _check_ternary("xi", xi)
    m = mattis_overlaps(s, xi)
    half = (1 + np.count_nonzero(xi, axis=1) / xi.shape[1]) / 2
    return QuadraticLosses(half - m, half + m)


class Relaxation(NamedTuple):
    """A run of the dynamics, R replicas of it or a single one without the axis R.

    Attributes
    ----------
    state : (R, N)
        Last state.
    energy : (T + 1, R)
        H at the start and after each of the T sweeps.
    overlaps : (T + 1, R, K), optional
        With the patterns that were given.
    converged : (R,)
        Whether the last sweep changed nothing; with noise that is chance.
    """

    state: Int8[np.ndarray, "*r n"]
    energy: Float[np.ndarray, "t *r"]
    overlaps: Float[np.ndarray, "t *r k"] | None
    converged: Bool[np.ndarray, "*r"]


class MultitaskingHebbian(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Hebbian network of N spins that stores archetypes or learns them from examples.

    The N x N couplings are never formed: a sweep of R replicas costs O(R N P) for P stored rows (archetypes, or all
    examples for the unsupervised protocol). Sequential updates are exact, but not done one by one: within a block of
    spins the effect of the earlier ones on the later is found by repeating the update of all until nothing changes.

    Parameters
    ----------
    protocol : {"store", "supervised", "unsupervised"}
        Rows of ``fit`` are archetypes; or examples that are averaged by label; or examples that all count by
        themselves.
    beta : float
        Inverse temperature, positive; infinite for updates without noise.
    normalize : bool
        Divide the couplings by the part of entries that are not blank, so that 1 / beta is the scaled temperature t.
    dynamics : {"sequential", "parallel"}
        Glauber updates, ``P(s_i = 1) = 1 / (1 + exp(-2 beta h_i))``, of one spin after the other, in a new random
        order in each sweep (the same for all replicas), or of all at once.
    max_sweeps : int
        Number of sweeps, at least 1. Without noise it ends earlier if nothing changes any more.
    r : float, optional
        Quality of the examples, for R. If not given, R is estimated from examples with labels (the mean square of
        their mean where it is not blank).
    blank : float, optional
        Entries of ``fit`` and ``transform`` up to this size count as blank, larger ones by their sign. If not given,
        all must be -1, 0 or 1.
    n_jobs : int, optional
        Threads; each takes 512 replicas at a time. The result does not depend on it.
    random_state : int, RandomState or None
        Of order and noise.

    Attributes
    ----------
    patterns_ : (P, N)
        Archetypes, means of the examples of each label, or all examples.
    weights_ : (P,)
        w_p in ``J_ij = 1/N sum_p w_p patterns_pi patterns_pj``.
    classes_ : (K,)
        Labels of the rows of ``patterns_``, for the supervised protocol.

    Examples
    --------
    >>> xi = diluted_patterns(K=2, N=1000, d=0.3, seed=0)
    >>> examples = noisy_examples(xi, M=80, r=0.4, seed=1)
    >>> model = MultitaskingHebbian("supervised", random_state=0)
    >>> _ = model.fit(examples.reshape(160, 1000), np.repeat(["cat", "dog"], 80))
    >>> model.transform(examples[:, 0]).argmax(1)
    array([0, 1])
    """

    def __init__(
        self,
        protocol: Protocol = "store",
        beta: float = math.inf,
        normalize: bool = False,
        dynamics: Dynamics = "sequential",
        max_sweeps: int = 50,
        r: float | None = None,
        blank: float | None = None,
        n_jobs: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.protocol = protocol
        self.beta = beta
        self.normalize = normalize
        self.dynamics = dynamics
        self.max_sweeps = max_sweeps
        self.r = r
        self.blank = blank
        self.n_jobs = n_jobs
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "MultitaskingHebbian":
        """Store the rows of X.

        Parameters
        ----------
        X : (n, N)
            Archetypes or examples with entries -1, 0 and 1.
        y : (n,), optional
            Archetype of every example. The supervised protocol needs it; the unsupervised one only takes the numbers
            M and R from it (without it the weight of every example is 1/n), and storing ignores it.

        Raises
        ------
        ValueError
            If a setting or an entry is out of range, or labels are missing.
        """
        self._check_settings()
        if self.protocol == "supervised" and y is None:
            raise ValueError("y: the supervised protocol needs the archetype of every example, got None")
        labelled = y is not None and self.protocol != "store"
        if labelled:
            X, y = validate_data(self, X, y)
        else:
            X = validate_data(self, X)
        X = self._ternary(X)
        rows, count = X, np.ones(len(X), int)
        weights = np.full(len(X), 1.0 if self.protocol == "store" else 1 / len(X))
        if labelled:
            classes, which, M = np.unique(y, return_inverse=True, return_counts=True)
            R = np.empty(len(classes))
            sums = np.empty((len(classes), X.shape[1]), np.int32)
            for k, number in enumerate(M):
                of_class = X[which == k]
                sums[k] = of_class.sum(0)
                sites = np.count_nonzero(of_class.any(0))
                if self.r is None:
                    R[k] = np.square(sums[k] / number).sum() / sites if sites and sums[k].any() else 1.0
                else:
                    R[k] = self.r**2 + (1 - self.r**2) / number
            if self.protocol == "supervised":
                self.classes_, rows, weights, count = classes, sums, 1 / R, M
            else:
                weights = (1 / (R * M))[which]
        if self.normalize:
            filled = np.count_nonzero(X) / X.size
            if not filled:
                raise ValueError("X: expected an entry that is not 0, got only blanks")
            weights = weights / filled
        self.patterns_ = rows / count[:, None] if self.protocol == "supervised" else rows
        self.weights_ = weights
        self._n_features_out = len(rows)
        # sums of integers, so that a field that should be 0 is; factors that differ among rows are kept apart
        integer_weights = weights / np.square(count)
        self._gain = float(integer_weights[0]) / self.n_features_in_
        self._relative = None if np.ptp(integer_weights) == 0 else integer_weights / integer_weights[0]
        self._sites = np.ascontiguousarray(rows.T)
        largest = self.n_features_in_ * np.square(np.abs(rows).max(1).astype(np.float64)).sum()
        self._dtype = np.float64 if math.isinf(self.beta) and largest >= 2**24 else np.float32
        return self

    def _check_settings(self) -> None:
        if self.protocol not in ("store", "supervised", "unsupervised"):
            raise ValueError(f"protocol: expected store, supervised or unsupervised, got {self.protocol!r}")
        if self.dynamics not in ("sequential", "parallel"):
            raise ValueError(f"dynamics: expected sequential or parallel, got {self.dynamics!r}")
        _check_beta(self.beta)
        _check_counts(max_sweeps=self.max_sweeps)
        if self.r is not None:
            _check_examples(self.r, 1)

    def energy(self, s: Num[np.ndarray, "*r n"]) -> Float[np.ndarray, "*r"]:
        """H of states, with the constant self-interaction as in the paper: -(N/2) sum_p w_p m_p^2."""
        return np.asarray(-0.5 * self.n_features_in_ * (np.square(self.overlaps(s)) @ self.weights_))

    def fields(self, s: Num[np.ndarray, "*r n"]) -> Float[np.ndarray, "*r n"]:
        """Local fields ``h_i = sum_(j != i) J_ij s_j`` of states."""
        of_itself = self.weights_ @ np.square(self.patterns_, dtype=np.float64) / self.n_features_in_
        return (self.overlaps(s) * self.weights_) @ self.patterns_ - of_itself * s

    def overlaps(
        self, s: Num[np.ndarray, "*r n"], xi: Num[np.ndarray, "k n"] | None = None
    ) -> Float[np.ndarray, "*r k"]:
        """Mattis overlaps of states with patterns, by default the stored ones."""
        check_is_fitted(self)
        return mattis_overlaps(s, self.patterns_ if xi is None else xi)

    def run(self, s0: Num[np.ndarray, "*r n"], xi: Num[np.ndarray, "k n"] | None = None) -> Relaxation:
        """Follow the dynamics.

        Parameters
        ----------
        s0 : (N,) or (R, N)
            One or several states to start from. Spins that are 0 are unknown: they act on no other before they are
            updated, and get a random sign if they feel no field in the first sweep.
        xi : (K, N), optional
            Record the overlaps with these.
        """
        check_is_fitted(self)
        self._check_settings()
        _check_ternary("s0", s0)
        if s0.ndim not in (1, 2) or s0.shape[-1] != self.n_features_in_ or not len(s0):
            raise ValueError(f"s0: expected shape (N,) or (R, N) with N = {self.n_features_in_}, got {s0.shape}")
        seed = check_random_state(self.random_state).randint(2**31)
        states = np.atleast_2d(s0)
        chunks = [states[first : first + REPLICAS] for first in range(0, len(states), REPLICAS)]
        runs = Parallel(n_jobs=self.n_jobs, prefer="threads")(
            delayed(self._run)(chunk, xi, (seed, number)) for number, chunk in enumerate(chunks)
        )
        sweeps = max(len(energy) for _, energy, _, _ in runs)

        def together(part: int) -> np.ndarray:  # a chunk that ended earlier stayed where it was
            padded = [found[part] + found[part][-1:] * (sweeps - len(found[part])) for found in runs]
            return np.concatenate([np.array(steps) for steps in padded], axis=1)

        state, energy = np.concatenate([found[0] for found in runs]), together(1)
        overlaps = None if xi is None else together(2)
        converged = ~np.concatenate([found[3] for found in runs])
        if s0.ndim == 2:
            return Relaxation(state, energy, overlaps, converged)
        return Relaxation(state[0], energy[:, 0], None if overlaps is None else overlaps[:, 0], converged[0, ...])

    def _run(self, s0: np.ndarray, xi: np.ndarray | None, seed: tuple[int, int]) -> tuple[Any, list, list, Any]:
        """One chunk of replicas; all chunks update the spins in the same order."""
        order = np.random.default_rng(seed[0])
        noise = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed)))
        coin = order.choice([-1, 1], self.n_features_in_)
        S = np.array(s0.T, self._dtype, order="C")
        Q = self._sums(S)
        energy, overlaps = [self._energy(Q)], [] if xi is None else [mattis_overlaps(S.T, xi)]
        for sweep in range(self.max_sweeps):
            changed = self._sweep(S, Q, order, noise)
            if sweep == 0 and (unknown := (S == 0).any(0)).any():
                changed |= unknown
                S[:] = np.where(S == 0, coin[:, None], S)
                Q[:] = self._sums(S)
            energy.append(self._energy(Q))
            if xi is not None:
                overlaps.append(mattis_overlaps(S.T, xi))
            if math.isinf(self.beta) and not changed.any():
                break
        return S.T.astype(np.int8), energy, overlaps, changed

    def _sums(self, S: Float[np.ndarray, "n r"]) -> Float[np.ndarray, "p r"]:
        Q = np.zeros((self._sites.shape[1], S.shape[1]), S.dtype)
        for block in _blocks(np.arange(len(S)), 4096):
            Q += self._sites[block].T.astype(S.dtype) @ S[block]
        return Q

    def _energy(self, Q: Float[np.ndarray, "p r"]) -> Float[np.ndarray, " r"]:
        squares = np.square(Q, dtype=np.float64)
        return -0.5 * self._gain * (squares.sum(0) if self._relative is None else self._relative @ squares)

    def _sweep(
        self,
        S: Float[np.ndarray, "n r"],
        Q: Float[np.ndarray, "p r"],
        order: np.random.Generator,
        noise: np.random.Generator,
    ) -> Bool[np.ndarray, " r"]:
        """Update every spin once, in place, and tell which replicas changed.

        Fields are in units of the gain, where those of equally weighted rows are integers.
        """
        (n, r), p = S.shape, len(Q)
        sequential, noisy = self.dynamics == "sequential", not math.isinf(self.beta)
        by_sums = r < 16 and p <= 32  # else by the couplings within a block
        size = (1024 if by_sums else min(max(16384 // r, 32), 128)) if sequential else max(32768 // r, 32)
        frozen = Q if sequential else Q.copy()
        moved = np.zeros(r, S.dtype)
        for block in _blocks(order.permutation(n) if sequential else np.arange(n), size):
            W, old = self._sites[block].astype(S.dtype), S[block]
            weighted = W if self._relative is None else W * self._relative.astype(S.dtype)
            own = np.einsum("np,np->n", weighted, W)[:, None]
            h = weighted @ frozen
            h -= own * old
            if noisy:  # a spin is up if its field exceeds a logistic variable
                h -= self._logistic(noise, h.shape)
            new, assumed = _decide(h, old, noisy), old
            if sequential and not by_sums and not np.array_equal(new, old):
                earlier = np.tril(weighted @ W.T, -1)
            # each update assumes those before it; repeated until the assumed ones are the ones that were found
            while sequential and not np.array_equal(new, assumed):
                assumed, delta = new, new - old
                if by_sums:
                    until = np.cumsum(W[:, :, None] * delta[:, None], axis=0)
                    new = _decide(h + np.einsum("np,npr->nr", weighted, until) - own * delta, old, noisy)
                else:
                    new = _decide(h + earlier @ delta, old, noisy)
            S[block] = new
            new = new - old
            Q += W.T @ new
            moved += np.einsum("nr,nr->r", new, new)
        return moved > 0

    def _logistic(self, noise: np.random.Generator, shape: tuple[int, ...]) -> Float[np.ndarray, "b r"]:
        """Logistic noise in the unit of the fields, -log(1/u - 1) / (2 beta gain)."""
        u = noise.random(shape, np.float32)
        with np.errstate(divide="ignore"):
            np.reciprocal(u, out=u)
            u -= 1
            np.log(u, out=u)
        u *= np.float32(-0.5 / (self.beta * self._gain))
        return u

    def transform(self, X: Any) -> Float[np.ndarray, "b p"]:
        """Overlaps with the stored patterns after relaxing from each row of X; blanks are unknown spins."""
        check_is_fitted(self)
        X = self._ternary(validate_data(self, X, reset=False))
        return self.overlaps(self.run(X).state)

    def _ternary(self, X: np.ndarray) -> Int8[np.ndarray, "b n"]:
        if self.blank is not None:
            if not self.blank >= 0:
                raise ValueError(f"blank: expected a number from 0, got {self.blank}")
            X = np.sign(X) * (np.abs(X) > self.blank)
        _check_ternary("X", X)
        return X.astype(np.int8)


def _blocks(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (order[first : first + size] for first in range(0, len(order), size))


def _decide(h: np.ndarray, old: np.ndarray, noisy: bool) -> np.ndarray:
    if noisy:
        return np.copysign(h.dtype.type(1), h)
    new = np.sign(h)
    np.copyto(new, old, where=new == 0)
    return new


def dataset_entropy(r: float, M: int) -> float:
    """``rho = (1 - r^2) / (M r^2)``: noise-to-signal variance of the mean of M examples of quality r.

    It falls with the bits that the examples leave unknown of an entry,
    [`unknown_bits`][classact.rules.hebbian.unknown_bits].

    Examples
    --------
    >>> round(dataset_entropy(0.2, 100), 6)
    0.24
    """
    _check_examples(r, M)
    return (1 - r**2) / (M * r**2)


def unknown_bits(r: float, M: int) -> float:
    """Conditional entropy in bits of the sign of an entry, given the M examples of it.

    Examples
    --------
    >>> unknown_bits(1.0, 1), round(unknown_bits(0.3, 10), 3)
    (0.0, 0.531)
    """
    _check_examples(r, M)
    if r == 1:
        return 0.0
    k = np.arange(M + 1)
    evidence = (2 * k - M) * math.log((1 + r) / (1 - r))  # log odds of the right sign, which k examples show
    return float(stats.binom.pmf(k, M, (1 + r) / 2) @ np.logaddexp(0, -evidence)) / math.log(2)


def hierarchical_amplitudes(K: int, d: float) -> Float[np.ndarray, " k"]:
    """``(1 - d) d^(mu - 1)``: overlaps of the hierarchical state, a solution at T = 0 below the critical dilution."""
    _check_counts(K=K)
    _check_dilution(d)
    return (1 - d) * float(d) ** np.arange(K)


def critical_dilution(K: int) -> float:
    """Dilution d_c from which the hierarchical state is no solution at T = 0: the root of ``1 - 2d + d^K`` below 1.

    It is 1 for one or two patterns, and falls to 1/2 for many.

    Examples
    --------
    >>> round(critical_dilution(3), 6)
    0.618034
    """
    _check_counts(K=K)
    return 1.0 if K <= 2 else float(brentq(lambda d: 1 - 2 * d + d**K, 0.5, 1 - 1 / K, xtol=1e-15))


def symmetric_amplitude(K: int, d: float, beta: float = math.inf) -> float:
    """Overlap with each of K patterns in the symmetric state, ``m = E[xi^1 tanh(beta m sum_nu xi^nu)]``.

    0 at and above the critical temperature 1 - d.

    Examples
    --------
    >>> symmetric_amplitude(3, 0.5), round(symmetric_amplitude(1, 0.0, beta=2.0), 6)
    (0.3125, 0.957504)
    """
    _check_counts(K=K)
    _check_dilution(d)
    _check_beta(beta)
    p = np.ones(1)
    for _ in range(K - 1):
        p = np.convolve(p, [(1 - d) / 2, d, (1 - d) / 2])
    total = 1 + np.arange(1 - K, K)
    if math.isinf(beta):
        return float((1 - d) * (p @ np.sign(total)))
    if beta * (1 - d) <= 1:
        return 0.0

    def excess(m: float) -> float:
        return float((1 - d) * (p @ np.tanh(beta * m * total))) / m - 1

    return float(brentq(excess, 1e-12, 1.0, xtol=1e-15)) if excess(1e-12) > 0 else 0.0


class MeanField(NamedTuple):
    """Solution of the self-consistency equations.

    Attributes
    ----------
    m, n : (K,)
        Overlaps with the archetypes, and with the means of their examples (equal when archetypes are stored).
    residual : float
        Largest difference between n and the right-hand side.
    """

    m: Float[np.ndarray, " k"]
    n: Float[np.ndarray, " k"]
    residual: float


def self_consistency(
    K: int,
    d: float,
    beta: float = math.inf,
    m0: Sequence[float] | Float[np.ndarray, " k"] | None = None,
    r: float | None = None,
    M: int | None = None,
    *,
    samples: int | None = None,
    seed: int = 0,
    max_iterations: int = 10_000,
    tolerance: float = 1e-11,
) -> MeanField:
    """Overlaps at equilibrium for N to infinity, by iteration from a start.

    ``n_nu = E[xi^nu c^nu tanh(beta/R sum_l xi^l c^l n_l)]`` and ``m_nu = E[xi^nu tanh(...)]``, where c is the mean of
    M signs chi, summed exactly over its binomial distribution; without examples c = R = 1. It is the same for both
    protocols. The right-hand side is the gradient of a convex function of n, so that iteration without damping ascends
    the difference of that function and ``|n|^2 / 2``, and cannot oscillate.

    Parameters
    ----------
    K, d, beta
        Number of patterns, dilution and inverse temperature (infinite for T = 0, where a vanishing field counts 0).
    m0 : (K,), optional
        Overlaps with the archetypes to start from, by default those of the hierarchical state.
    r, M : float and int, optional
        Quality and number of the examples of each archetype.
    samples, seed
        Average over so many random sites instead of all configurations of a site.
    max_iterations, tolerance
        End when no n changes by more than the tolerance, or after so many iterations.

    Raises
    ------
    ValueError
        If an argument is out of range, or the configurations are too many (more than 12 patterns, or 2^21 values of
        the field of the other patterns) and `samples` is not given.

    Examples
    --------
    >>> self_consistency(3, d=0.8, beta=25.0).m.round(5).tolist()
    [0.18256, 0.16455, 0.1446]
    """
    m, respond, quality = _prepare(K, d, beta, m0, r, M, samples, seed)
    n = quality * m
    for _ in range(max_iterations):
        m, wanted = respond(n)
        residual = float(np.abs(wanted - n).max())
        if residual <= tolerance:
            break
        n = wanted
    return MeanField(m, n, residual)


def one_step(
    K: int,
    d: float,
    r: float | None = None,
    M: int | None = None,
    m0: Sequence[float] | Float[np.ndarray, " k"] | None = None,
    beta: float = math.inf,
    *,
    samples: int | None = None,
    seed: int = 0,
) -> Float[np.ndarray, " k"]:
    """Overlaps with the archetypes after all spins are updated once, for N to infinity and either protocol.

    Exact sums over the blanks of all patterns and the binomial distribution of their examples. Arguments as in
    [`self_consistency`][classact.rules.self_consistency]; `m0` are the overlaps of the state before.

    Examples
    --------
    >>> one_step(1, 0.0, r=0.3, M=31).round(6).tolist()
    [0.915258]
    """
    m, respond, quality = _prepare(K, d, beta, m0, r, M, samples, seed)
    return respond(quality * m)[0]


def _prepare(
    K: int, d: float, beta: float, m0: Any, r: float | None, M: int | None, samples: int | None, seed: int
) -> tuple[np.ndarray, Any, float]:
    """Overlaps at the start, the map n -> (m, n) of one update, and the quality."""
    _check_counts(K=K)
    _check_dilution(d)
    _check_beta(beta)
    if (r is None) != (M is None):
        raise ValueError(f"r, M: expected both or neither, got {r} and {M}")
    quality, number = (1.0, 1) if r is None or M is None else (float(r), M)
    _check_examples(quality, number)
    if samples is not None:
        _check_counts(samples=samples)
    elif K > MOST_PATTERNS:
        raise ValueError(f"K: expected at most {MOST_PATTERNS} for the exact sum, got {K}; give `samples`")
    m = hierarchical_amplitudes(K, d) if m0 is None else np.asarray(m0, np.float64)
    if m.shape != (K,):
        raise ValueError(f"m0: expected {K} overlaps, got shape {m.shape}")
    k = np.arange(number + 1)
    c, p = (2 * k - number) / number, stats.binom.pmf(k, number, (1 + quality) / 2)
    values = np.append(c, 0.0)  # of xi c
    weights = np.append((1 - d) / 2 * (p + p[::-1]), d)
    values, weights = values[weights > 0], weights[weights > 0]
    c, p = c[p > 0], p[p > 0]
    slope = beta / (quality**2 + (1 - quality**2) / number)
    drawn = None if samples is None else np.random.default_rng(seed).choice(values, (samples, K), p=weights)

    def respond(n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        m, wanted = np.empty(K), np.empty(K)
        for mu in range(K):
            others = n * (np.arange(K) != mu)
            if drawn is None:
                y, q = _sum_of(others, values, weights)
            else:
                y, q = drawn @ others, np.full(len(drawn), 1 / len(drawn))
            of_mean = _mean_response(c * n[mu], y, q, slope)
            m[mu], wanted[mu] = (1 - d) * (p @ of_mean), (1 - d) * (p @ (c * of_mean))
        return m, wanted

    return m, respond, quality


def _sum_of(n: np.ndarray, values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and probabilities of ``sum_nu n_nu x_nu``, x independent with the given distribution."""
    y, q = np.zeros(1), np.ones(1)
    for factor in n[n != 0]:
        if len(y) * len(values) > MOST_TERMS:
            raise ValueError(f"K, M: more than {MOST_TERMS} values of the field of the other patterns; give `samples`")
        y, q = np.add.outer(y, factor * values).ravel(), np.multiply.outer(q, weights).ravel()
    return y, q


def _mean_response(x: np.ndarray, y: np.ndarray, q: np.ndarray, slope: float) -> np.ndarray:
    """``E_y tanh(slope (x + y))`` for every x; the sign of x + y for an infinite slope."""
    if math.isinf(slope):
        order = np.argsort(y)
        y, below = y[order], np.concatenate([[0.0], np.cumsum(q[order])])
        return below[-1] - below[np.searchsorted(y, TIE - x)] - below[np.searchsorted(y, -TIE - x)]
    rows = max(1, MOST_TERMS // len(y))
    parts = [np.tanh(slope * np.add.outer(x[i : i + rows], y)) @ q for i in range(0, len(x), rows)]
    return np.concatenate(parts)


def stability(m: Sequence[float] | Float[np.ndarray, " k"], d: float, beta: float) -> float:
    """Largest eigenvalue of ``beta E[xi xi^T (1 - tanh^2(beta xi . m))]``: the state m is stable below 1.

    At T = 0 it is 0, or infinite if a site that is not all blank feels no field, as in the symmetric state of two or
    more patterns.

    Examples
    --------
    >>> m = symmetric_amplitude(3, 0.8, beta=25.0)
    >>> round(stability([m] * 3, 0.8, beta=25.0), 4)
    1.2037
    """
    m = np.asarray(m, np.float64)
    _check_dilution(d)
    _check_beta(beta)
    if not 1 <= len(m) <= MOST_PATTERNS:
        raise ValueError(f"m: expected 1 to {MOST_PATTERNS} overlaps, got {len(m)}")
    xi = np.stack(np.meshgrid(*[[-1.0, 0.0, 1.0]] * len(m), indexing="ij"), -1).reshape(-1, len(m))
    filled = np.count_nonzero(xi, axis=1)
    p = ((1 - d) / 2) ** filled * float(d) ** (len(m) - filled)
    h = xi @ m
    if math.isinf(beta):
        return math.inf if ((np.abs(h) < TIE) & (filled > 0) & (p > 0)).any() else 0.0
    weight = beta * p * (1 - np.tanh(beta * h) ** 2)
    return float(np.linalg.eigvalsh((xi * weight[:, None]).T @ xi)[-1])


def parallel_dilution(K: int, t: float) -> float:
    """Dilution d* above which the symmetric state of K patterns is stable at scaled temperature t.

    Examples
    --------
    >>> round(parallel_dilution(3, 0.2), 3)
    0.842
    """
    if K < 2:
        raise ValueError(f"K: expected at least 2, got {K}")
    if not 0 < t < 1:
        raise ValueError(f"t: expected a number in (0, 1), got {t}")

    def excess(d: float) -> float:
        beta = 1 / (t * (1 - d))
        return stability([symmetric_amplitude(K, d, beta)] * K, d, beta) - 1

    # from above, because mixtures of an odd number of dense patterns are stable again
    grid = np.linspace(0.999, 0.0, 50)
    unstable = next((i for i, d in enumerate(grid) if excess(d) > 0), None)
    return 0.0 if unstable is None else float(brentq(excess, grid[unstable], grid[unstable - 1], xtol=1e-10))


class PhaseDiagram(NamedTuple):
    """What K patterns do at every dilution and scaled temperature.

    Attributes
    ----------
    d, t : (D,), (T,)
        The grid.
    m : (D, T, K)
        Overlaps that are reached from the hierarchical state.
    stability : (D, T)
        Of the symmetric state; it is stable below 1.
    phase : (D, T)
        "ergodic" (no recall, t at least 1), "parallel" (the hierarchical state gives way to the symmetric one) or
        "hierarchical". Where an odd number of nearly dense patterns is stable as a mixture, it does not count.
    """

    d: Float[np.ndarray, " d"]
    t: Float[np.ndarray, " t"]
    m: Float[np.ndarray, "d t k"]
    stability: Float[np.ndarray, "d t"]
    phase: Shaped[np.ndarray, "d t"]


def phase_diagram(K: int, d: Sequence[float] | np.ndarray, t: Sequence[float] | np.ndarray) -> PhaseDiagram:
    """Solve the self-consistency equations of stored patterns on a grid of dilutions and scaled temperatures T/(1-d).

    Examples
    --------
    >>> phase_diagram(2, [0.3, 0.95], [0.2, 1.1]).phase.tolist()
    [['hierarchical', 'ergodic'], ['parallel', 'ergodic']]
    """
    grid_d, grid_t = np.asarray(d, np.float64), np.asarray(t, np.float64)
    if not (grid_t > 0).all() or not ((grid_d >= 0) & (grid_d < 1)).all():
        raise ValueError(f"d, t: expected dilutions in [0, 1) and positive temperatures, got {d} and {t}")
    m, eigenvalue = np.zeros((len(grid_d), len(grid_t), K)), np.empty((len(grid_d), len(grid_t)))
    for i, dilution in enumerate(map(float, grid_d)):
        for j, scaled in enumerate(map(float, grid_t)):
            beta = 1 / (scaled * (1 - dilution))
            if scaled < 1:
                m[i, j] = self_consistency(K, dilution, beta).m
            eigenvalue[i, j] = stability([symmetric_amplitude(K, dilution, beta)] * K, dilution, beta)
    equal = np.ptp(m, axis=-1) < 0.01 * m[..., 0]
    phase = np.where(grid_t >= 1, "ergodic", np.where(equal, "parallel", "hierarchical"))
    return PhaseDiagram(grid_d, grid_t, m, eigenvalue, phase)


def one_step_gaussian(K: int, d: float, r: float, M: int) -> Float[np.ndarray, " k"]:
    """Signal-to-noise estimate of the overlaps after one step from the hierarchical state.

    ``(1 - d) d^(mu - 1) erf(1 / sqrt(2 (rho + (1 + rho) g_mu)))``, the noise taken as Gaussian and only the sites
    counted that the patterns before leave blank. The exact amplitudes of weak patterns are larger: where the examples
    of a stronger pattern disagree, the weak ones decide.

    Examples
    --------
    >>> one_step_gaussian(1, 0.0, r=0.2, M=100).round(6).tolist()
    [0.958773]
    """
    rho = dataset_entropy(r, M)
    noise = rho + (1 + rho) * _interference(K, d)
    with np.errstate(divide="ignore"):
        return hierarchical_amplitudes(K, d) * erf(1 / np.sqrt(2 * noise))


def learning_threshold(K: int, d: float, r: float, theta: float = 1 / math.sqrt(2), mu: int = 1) -> float:
    """Number M_c of examples from which pattern mu is learned: `erf(theta)` of its sites are right after one step.

    ``M_c = (1 - r^2) / r^2 (1 + g) / (1 / (2 theta^2) - g)`` with the interference ``g = d^2 (1 - d^(2 (K - mu))) /
    (1 + d)`` of the weaker patterns; infinite if that alone is too strong. Gaussian estimate; the same for both
    protocols.

    Parameters
    ----------
    K, d, r
        Number of patterns, dilution, quality of the examples.
    theta : float
        Confidence, positive; 1/sqrt(2) asks for 68 % net agreement.
    mu : int
        Pattern, 1 for the strongest to K.

    Examples
    --------
    >>> round(learning_threshold(1, 0.0, r=0.3), 2), round(learning_threshold(3, 0.25, r=0.3, theta=1.0), 2)
    (10.11, 23.58)
    """
    _check_examples(r, 1)
    if not theta > 0:
        raise ValueError(f"theta: expected a positive number, got {theta}")
    interference = _interference(K, d)
    if not 1 <= mu <= K:
        raise ValueError(f"mu: expected 1 to K = {K}, got {mu}")
    g = float(interference[mu - 1])
    room = 1 / (2 * theta**2) - g
    return (1 - r**2) / r**2 * (1 + g) / room if room > 0 else math.inf


def _interference(K: int, d: float) -> Float[np.ndarray, " k"]:
    _check_counts(K=K)
    _check_dilution(d)
    return d**2 * (1 - float(d) ** (2 * np.arange(K - 1, -1, -1))) / (1 + d)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def _check_dilution(d: float) -> None:
    if not 0 <= d <= 1:
        raise ValueError(f"d: expected a number in [0, 1], got {d}")


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta: expected a positive number, got {beta}")


def _check_examples(r: float, M: int) -> None:
    if not 0 < r <= 1:
        raise ValueError(f"r: expected a number in (0, 1], got {r}")
    _check_counts(M=M)


def _check_ternary(name: str, x: np.ndarray) -> None:
    bad = (x != 0) & (np.abs(x) != 1)
    if bad.any():
        raise ValueError(f"{name}: expected entries -1, 0 and 1, got {x[bad].flat[0]}")
