"""Experiments of multitasking Hebbian networks: regimes, learning, growth with N, controls, losses, real images.

Settings fixed before the evidence. All couplings and temperatures are as in ``classact.rules.hebbian``: not divided by
1 - d, both protocols with the factor 1/R; temperatures are given as t = T / (1 - d). Overlaps of simulations are
divided by the part of the pattern that is not blank and multiplied by 1 - d, because that part fluctuates by
1/sqrt(N). Numbers of examples are odd, so that their mean is never 0 at a site that is not blank.

With K = 3 patterns, errors of equilibrium are judged away (0.05) from dilutions where a weak pattern vanishes or the
regime changes: there an infinite network is critical, and one of 100,000 spins is not yet like it.

Chosen after pilots (seeds below 100): settled states of both protocols have to agree for 101 examples, and for 51 in
the largest network, where the archetypes are stable; they need not for 15, where both networks leave the archetypes,
each in its own way.

Real images: T-shirts, trousers and sneakers of Fashion-MNIST, three classes as in the theory's low storage; entries are
the signs of standardised pixels, blank up to 0.25. Of these and (trousers, sneakers, bags), and of thresholds 0, 0.25,
0.5 and 1, they were the best for the networks' accuracy on a pilot (seed 0; baselines hardly depend on them). With
all ten classes, whose archetypes are far from independent, relaxed states of both protocols fall into three attractors.
The sharpness of the softmax network does not matter (4, 16 and 64 gave the same).
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import erf, softmax
from scipy.stats import spearmanr

from classact.evidence.experiment import Cells, Experiment, Values
from classact.rules.hebbian import (
    MultitaskingHebbian,
    diluted_patterns,
    hierarchical_amplitudes,
    hierarchical_state,
    learning_threshold,
    mattis_overlaps,
    noisy_examples,
    one_step,
    one_step_gaussian,
    parallel_dilution,
    quadratic_losses,
    self_consistency,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

K = 3
T = 0.2
DILUTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95)
EDGES = (T, math.sqrt(T), parallel_dilution(K, T))  # below d^(mu - 1) = t the warmth erases pattern mu; d*
MILD = (0.1, 0.2, 0.3, 0.4)
D, QUALITY = 0.25, 0.3
EXAMPLES = (1, 3, 7, 11, 15, 21, 31, 51, 101, 301)
SIZES, SIZE_EXAMPLES = (1000, 4000, 16_000, 64_000), 51
NETWORKS, STORED, CAPACITY_D = (100, 400, 1600, 6400, 25_600, 102_400), 12, 0.4
PROTOCOLS = ("supervised", "unsupervised")
CLASSES = (0, 1, 7)  # T-shirts, trousers, sneakers
BLANK, SHARPNESS = 0.25, 16.0


def relative(s: np.ndarray, xi: np.ndarray) -> np.ndarray:
    """Overlaps in units of the part of each pattern that is not blank."""
    return mattis_overlaps(s, xi) / (xi != 0).mean(1)


def flipped(s: np.ndarray, part: float, rng: np.random.Generator) -> np.ndarray:
    """States with a random part of the spins turned over."""
    return np.where(rng.random(s.shape) < part, -s, s).astype(np.int8)


def _name(d: float) -> str:
    return f"d{round(1000 * d):03d}"


def run_phases(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """Equilibrium at t = 0.2 from the hierarchical state, for mild to strong dilution; the hierarchy at T = 0."""
    N, sweeps, iterations = (4000, 10, 300) if scale == "smoke" else (100_000, 30, 10_000)
    values: Values = {}
    for number, d in enumerate(DILUTIONS):
        xi = diluted_patterns(K, N, d, 1000 * seed + number)
        beta = 1 / (T * (1 - d))
        model = MultitaskingHebbian(beta=beta, max_sweeps=sweeps, random_state=seed).fit(xi)
        seen = model.run(hierarchical_state(xi, seed), xi).overlaps
        assert seen is not None
        found = np.sort(seen[sweeps // 2 :].mean(0) / (xi != 0).mean(1))[::-1] * (1 - d)
        theory = np.sort(self_consistency(K, d, beta, max_iterations=iterations).m)[::-1]
        values[_name(d)] = {
            **{f"m{mu + 1}": float(found[mu]) for mu in range(K)},
            **{f"theory{mu + 1}": float(theory[mu]) for mu in range(K)},
            "error": float(np.abs(found - theory).max()),
            "spread": float(1 - found[-1] / found[0]),
            "theory_spread": float(1 - theory[-1] / theory[0]),
        }
    spread = np.array([values[_name(d)]["spread"] for d in DILUTIONS])
    last = int(np.flatnonzero(spread > 0.1)[-1])
    after = min(last + 1, len(DILUTIONS) - 1)
    values["boundary"] = {
        "found": float(np.interp(-0.1, -spread[[last, after]], np.array(DILUTIONS)[[last, after]])),
        "theory": EDGES[-1],
    }
    away = [values[_name(d)]["error"] for d in DILUTIONS if min(abs(d - edge) for edge in EDGES) > 0.05]
    values["away"] = {"error": max(away)}
    rng = np.random.default_rng((3, seed))
    for number, d in enumerate(MILD):
        xi = diluted_patterns(K, N, d, 1000 * seed + 500 + number)
        cue = flipped(hierarchical_state(xi, seed), 0.1, rng)
        m = relative(MultitaskingHebbian(random_state=seed).fit(xi).run(cue).state, xi) * (1 - d)
        values[f"cold_{_name(d)}"] = {
            **{f"m{mu + 1}": float(m[mu]) for mu in range(K)},
            "first": float(m[0] / (1 - d)),
            "ratio2": float(m[1] / m[0] / d),
            "ratio3": float(m[2] / m[1] / d),
        }
    curve = np.linspace(0.05, 0.95, 10 if scale == "smoke" else 91)
    lines = [self_consistency(K, d, 1 / (T * (1 - d)), tolerance=1e-6, max_iterations=300).m for d in curve]
    return values, {"theory": np.column_stack([curve, lines]).astype(np.float32)}


def learn(xi: np.ndarray, M: int, seed: int, protocol: str, **settings: Any) -> MultitaskingHebbian:
    """Learn from M examples of each pattern; the examples are the same for both protocols."""
    X = noisy_examples(xi, M, QUALITY, seed).reshape(-1, xi.shape[1])
    model = MultitaskingHebbian(protocol, random_state=seed, **settings)  # type: ignore[arg-type]
    return model.fit(X, np.repeat(np.arange(len(xi)), M))


def _learned(xi: np.ndarray, M: int, seed: int, protocol: str) -> dict[str, float]:
    """Overlaps after one update of all spins from the archetype state, and when nothing changes any more."""
    start = hierarchical_state(xi, seed)
    model = learn(xi, M, seed, protocol, dynamics="parallel", max_sweeps=1)
    stepped = relative(model.run(start).state, xi) * (1 - D)
    settled = relative(model.set_params(dynamics="sequential", max_sweeps=50).run(start).state, xi) * (1 - D)
    return {f"m{mu + 1}": float(stepped[mu]) for mu in range(K)} | {
        f"settled{mu + 1}": float(settled[mu]) for mu in range(K)
    }


def crossing(m: np.ndarray, level: float) -> float:
    """Number of examples at which amplitudes rise through a level, between the numbers tried on a logarithmic scale."""
    above = np.flatnonzero(m >= level)
    if not len(above):
        return math.nan
    if above[0] == 0:
        return float(EXAMPLES[0])
    pair = slice(above[0] - 1, above[0] + 1)
    return float(np.exp(np.interp(level, m[pair], np.log(EXAMPLES)[pair])))


def run_learning(seed: int, scale: str) -> Values:
    """Both protocols on the same examples: overlaps with the archetypes for 1 to 301 examples, and for four sizes."""
    N = 1000 if scale == "smoke" else 20_000
    xi = diluted_patterns(K, N, D, seed)
    values: Values = {}
    for M in EXAMPLES:
        exact, gaussian = one_step(K, D, QUALITY, M), one_step_gaussian(K, D, QUALITY, M)
        settled = self_consistency(K, D, r=QUALITY, M=M).m
        values[f"theory_m{M}"] = (
            {f"m{mu + 1}": float(exact[mu]) for mu in range(K)}
            | {f"gaussian{mu + 1}": float(gaussian[mu]) for mu in range(K)}
            | {f"settled{mu + 1}": float(settled[mu]) for mu in range(K)}
        )
        for protocol in PROTOCOLS:
            values[f"{protocol}_m{M}"] = _learned(xi, M, seed, protocol)
    for name in ("theory", *PROTOCOLS):
        curve = np.array([values[f"{name}_m{M}"]["m1"] for M in EXAMPLES]) / (1 - D)
        values[name] = {
            f"threshold{label}": crossing(curve, float(erf(theta)))
            for label, theta in (("", 1 / math.sqrt(2)), ("_strict", 1.0))
        }
    values["gaussian"] = {
        f"threshold{label}": learning_threshold(K, D, QUALITY, theta)
        for label, theta in (("", 1 / math.sqrt(2)), ("_strict", 1.0))
    }
    for size in SIZES:
        larger = diluted_patterns(K, size // 32 if scale == "smoke" else size, D, 10_000 + seed)
        for protocol in PROTOCOLS:
            values[f"{protocol}_n{size}"] = _learned(larger, SIZE_EXAMPLES, seed, protocol)
    return values


def recalled(s: np.ndarray, xi: np.ndarray) -> int:
    """Patterns in order of strength, up to the first that fewer than 95 % of its free spins follow."""
    free = np.ones(xi.shape[1], bool)
    for number, pattern in enumerate(xi):
        own = free & (pattern != 0)
        if not own.any() or (pattern[own] * s[own]).mean() < 0.9:
            return number
        free &= pattern == 0
    return len(xi)


def run_capacity(seed: int, scale: str) -> Values:
    """How many of 12 patterns are recalled together by networks of 100 to 102,400 spins, at T = 0."""
    values: Values = {}
    counts = []
    networks = NETWORKS[:3] if scale == "smoke" else NETWORKS
    for N in networks:
        found: list[int] = []
        dense: list[int] = []
        for draw in range(6 if scale == "smoke" or N > 10_000 else 30):
            for d, into in ((CAPACITY_D, found), (0.0, dense)):
                xi = diluted_patterns(STORED, N, d, 1000 * seed + draw)
                state = MultitaskingHebbian(random_state=seed).fit(xi).run(hierarchical_state(xi, draw)).state
                into.append(recalled(state, xi))
        counts.append(float(np.mean(found)))
        values[f"n{N}"] = {"recalled": counts[-1], "dense": float(np.mean(dense))}
    slope = np.polyfit(np.log(networks), counts, 1)[0]
    values["growth"] = {"slope": float(slope), "relative": float(slope * 2 * math.log(1 / CAPACITY_D))}
    return values


def _recall(s: np.ndarray, patterns: np.ndarray) -> dict[str, float]:
    m = np.abs(relative(s, patterns))
    noise = 1 / np.sqrt(np.count_nonzero(patterns, axis=1))
    return {"first": float(m[0]), "second": float(m[1:].max()), "signals": float((m > 5 * noise).sum())}


def _cued(N: int, seed: int) -> Values:
    """Networks of five patterns that are cued with the first, a tenth of it wrong."""
    rng = np.random.default_rng((3, seed))
    xi, dense = diluted_patterns(5, N, 0.4, seed), diluted_patterns(5, N, 0.0, seed)
    coin = rng.choice(np.array([-1, 1], np.int8), N)  # where the pattern is blank nothing is known
    cue, dense_cue = (flipped(start, 0.1, rng) for start in (np.where(xi[0] != 0, xi[0], coin), dense[0]))
    settle = MultitaskingHebbian(random_state=seed)
    values = {
        "multitasking": _recall(settle.fit(xi).run(cue).state, xi),
        "dense": _recall(settle.fit(dense).run(dense_cue).state, dense),
    }
    kept = np.triu(rng.random((N, N), dtype=np.float32) < ((xi.T.astype(np.float32) @ xi) != 0).mean(), 1)
    J = (dense.T.astype(np.float32) @ dense) * (kept | kept.T)
    s = dense_cue.astype(np.float32)
    for _ in range(20):
        for block in np.array_split(rng.permutation(N), 40):
            h = J[block] @ s
            s[block] = np.where(h == 0, s[block], np.sign(h))
    values["diluted_couplings"] = _recall(s, dense)
    s = cue.astype(np.float32)
    for _ in range(20):
        h = softmax(N * mattis_overlaps(s, xi)) @ xi
        s = np.where(np.abs(h) < 1e-9, s, np.sign(h))
    values["softmax"] = _recall(s, xi)
    return values


def run_retrieval(seed: int, scale: str) -> Values:
    """What a network that is cued with one pattern recalls of the others; and where random starts end."""
    N, draws = (400, 2) if scale == "smoke" else (1000, 20)
    found = [_cued(N, 1000 * seed + draw) for draw in range(draws)]
    values = {
        arm: {metric: float(np.mean([cell[arm][metric] for cell in found])) for metric in found[0][arm]}
        for arm in found[0]
    }
    few = diluted_patterns(K, 2 * N, 0.3, seed)
    starts = np.random.default_rng((3, seed)).choice(np.array([-1, 1], np.int8), (200, 2 * N))
    end = MultitaskingHebbian(random_state=seed).fit(few).run(starts).state
    sorted_m = np.sort(np.abs(relative(end, few)), axis=1)[:, ::-1] * (1 - 0.3)
    hierarchy = np.abs(sorted_m - hierarchical_amplitudes(K, 0.3)).max(1) < 0.05
    values["random_starts"] = {"hierarchical": float(hierarchy.mean()), "mixture": float(1 - hierarchy.mean())}
    return values


def run_losses(seed: int, scale: str) -> tuple[Values, dict[str, np.ndarray]]:
    """Hamiltonian and squared errors on the way down at T = 0, 2 % of the spins at a time, and their minima."""
    N, ways = (500, 2) if scale == "smoke" else (4000, 10)
    rng = np.random.default_rng((3, seed))
    values: Values = {}
    arrays: dict[str, np.ndarray] = {}
    for name, d in (("hierarchical", 0.25), ("parallel", 0.95)):
        xi = diluted_patterns(K, N, d, seed)
        model = MultitaskingHebbian(random_state=seed).fit(xi)
        majority = np.sign(xi.sum(0))  # where the sum of the squared errors is least; ties count equally
        least = float(quadratic_losses(xi, np.where(majority == 0, 1, majority)).plus.sum())
        correlation, left = [], []
        for _ in range(ways):
            s = flipped(hierarchical_state(xi, int(rng.integers(2**31))), 0.4, rng)
            energy, loss = [], []
            for _ in range(4):
                for block in np.array_split(rng.permutation(N), 50):
                    h = model.fields(s)[block]
                    new = np.where(h == 0, s[block], np.sign(h))
                    if (new != s[block]).any():
                        s[block] = new
                        energy.append(float(model.energy(s)))
                        loss.append(float(quadratic_losses(xi, s).plus.sum()))
            # rounded, so that equal values are ties and no matter of the last bits
            correlation.append(float(spearmanr(np.round(energy, 6), np.round(loss, 9)).statistic))
            arrays.setdefault(name, np.column_stack([energy, loss]) / [N, 1])  # the first way down
            left.append((loss[-1] - least) / (loss[0] - least))
        start = np.where(majority == 0, rng.choice([-1, 1], N), majority)
        end = model.run(start).state
        settled = float(quadratic_losses(xi, end).plus.sum())
        arrays[f"{name}_minimum"] = np.array([model.energy(end) / N, settled])
        counted = (xi != 0).any(0)
        values[name] = {
            "spearman": float(np.mean(correlation)),
            "left": float(np.mean(left)),
            "moved": float((end != start)[counted & (majority != 0)].mean()),
            "energy": float(model.energy(end) / model.energy(hierarchical_state(xi))),
        }
    return values, arrays


def run_images(seed: int, scale: str) -> Values:
    """Fashion-MNIST: classes from the overlaps of relaxed test images, both protocols and baselines."""
    from sklearn.cluster import KMeans

    from classact.data.images import fashion_mnist

    per_class, tested = (20, 50) if scale == "smoke" else (100, 1000)
    rng = np.random.default_rng((3, seed))
    images, labels = fashion_mnist("train")
    every = images[rng.choice(len(images), 2000, replace=False)].reshape(2000, -1)  # of all ten classes
    chosen = np.concatenate([rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in CLASSES])
    x, y = images[chosen].reshape(len(chosen), -1).astype(np.float64), np.repeat(range(len(CLASSES)), per_class)
    test_images, test_labels = fashion_mnist("test")
    drawn = rng.choice(np.flatnonzero(np.isin(test_labels, CLASSES)), tested, replace=False)
    mean, deviation = every.mean(0), every.std(0) + 8.0
    x, test = ((part - mean) / deviation for part in (x, test_images[drawn].reshape(tested, -1)))
    x, test = (np.sign(part) * (np.abs(part) > BLANK) for part in (x, test))
    target = np.searchsorted(CLASSES, test_labels[drawn])

    archetypes = np.stack([x[y == c].mean(0) for c in range(len(CLASSES))])
    unit = archetypes / np.linalg.norm(archetypes, axis=1, keepdims=True)

    def accuracy(states: np.ndarray) -> float:
        return float(((states @ unit.T).argmax(1) == target).mean())

    values: Values = {"nearest_archetype": {"accuracy": accuracy(test)}}
    for protocol in PROTOCOLS:
        model = MultitaskingHebbian(protocol, random_state=seed)  # type: ignore[arg-type]
        cue = test.astype(np.int8)
        settled = model.fit(x, y).run(cue).state
        stepped = model.set_params(dynamics="parallel", max_sweeps=1).run(cue).state
        values[protocol] = {
            "accuracy": accuracy(settled),
            "one_step": accuracy(stepped),
            "states": float(len(np.unique(settled, axis=0))),
        }
    weights = softmax(SHARPNESS * test @ unit.T / np.linalg.norm(test, axis=1, keepdims=True), axis=1)
    values["softmax"] = {"accuracy": accuracy(weights @ unit)}
    clusters = KMeans(len(CLASSES), n_init=4, random_state=seed).fit(x)
    named = np.array(
        [np.bincount(y[clusters.labels_ == c], minlength=len(CLASSES)).argmax() for c in range(len(CLASSES))]
    )
    values["k_means"] = {"accuracy": float((named[clusters.predict(test)] == target).mean())}
    return values


def _band(axes: "Axes", x: Any, values: np.ndarray, **style: Any) -> None:
    """Means over seeds (first axis) with their standard deviation."""
    axes.errorbar(x, values.mean(0), values.std(0, ddof=1) if len(values) > 1 else None, capsize=2, **style)


def draw_phases(cells: Cells) -> "Figure":
    """Amplitudes against dilution, at t = 0.2 with the mean-field lines and at T = 0 on a logarithmic scale."""
    from matplotlib.figure import Figure

    figure = Figure((10.5, 4), layout="constrained")
    warm, cold = figure.subplots(1, 2)
    for mu in range(1, K + 1):
        theory = next(iter(cells.arrays.values()))["theory"]
        warm.plot(theory[:, 0], theory[:, mu], color=f"C{mu - 1}", linewidth=1)
        found = np.stack([cells.metric(_name(d), f"m{mu}") for d in DILUTIONS], 1)
        _band(warm, DILUTIONS, found, fmt="o", markersize=4, color=f"C{mu - 1}", label=f"pattern {mu}")
    boundary = cells.metric("boundary", "theory")[0]
    warm.axvline(boundary, color="grey", linestyle=":", linewidth=1)
    warm.annotate("parallel", (boundary, 0.5), xytext=(4, 0), textcoords="offset points", fontsize=9)
    warm.annotate("hierarchical", (boundary, 0.5), xytext=(-4, 0), textcoords="offset points", fontsize=9, ha="right")
    warm.set(xlabel="dilution d", ylabel="overlap $m_\\mu$", title=f"t = {T}: simulation (points), mean field (lines)")
    warm.legend(frameon=False, loc="upper right", fontsize=9)
    for index, d in enumerate(MILD):
        found = np.stack([cells.metric(f"cold_{_name(d)}", f"m{mu}") for mu in range(1, K + 1)], 1)
        cold.plot(range(1, K + 1), hierarchical_amplitudes(K, d), color=f"C{index}", linewidth=1)
        _band(cold, range(1, K + 1), found, fmt="o", markersize=4, color=f"C{index}", label=f"d = {d}")
    cold.set_yscale("log")
    cold.set_xticks(range(1, K + 1))
    cold.set(xlabel="pattern $\\mu$", ylabel="overlap $m_\\mu$", title="T = 0: lines are $(1-d)\\,d^{\\mu-1}$")
    cold.legend(frameon=False, fontsize=9)
    for axes in (warm, cold):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_learning(cells: Cells) -> "Figure":
    """Overlaps against the number of examples for both protocols, after one step and settled; and against N."""
    from matplotlib.figure import Figure

    figure = Figure((13, 4), layout="constrained")
    stepped, settled, sizes = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    for axes, metric, title in ((stepped, "m", "one step"), (settled, "settled", "settled")):
        for mu in range(1, K + 1):
            exact = [cells.metric(f"theory_m{M}", f"{metric}{mu}")[0] for M in EXAMPLES]
            axes.plot(EXAMPLES, exact, color=f"C{mu - 1}", linewidth=1)
            if metric == "m":
                gaussian = [cells.metric(f"theory_m{M}", f"gaussian{mu}")[0] for M in EXAMPLES]
                axes.plot(EXAMPLES, gaussian, color=f"C{mu - 1}", linewidth=0.8, linestyle=":")
            for protocol, marker, fill in (("supervised", "o", f"C{mu - 1}"), ("unsupervised", "s", "none")):
                found = np.stack([cells.metric(f"{protocol}_m{M}", f"{metric}{mu}") for M in EXAMPLES], 1)
                label = f"{protocol}, pattern {mu}" if metric == "m" else None
                style = {"fmt": marker, "markerfacecolor": fill, "color": f"C{mu - 1}", "markersize": 4}
                _band(axes, EXAMPLES, found, label=label, **style)
        axes.set_xscale("log")
        axes.set(xlabel="examples of each pattern M", ylabel="overlap with the archetype", ylim=(-0.05, 0.8))
        axes.set_title(f"{title}; lines: N to infinity" + (", dotted: Gaussian" if metric == "m" else ""), fontsize=10)
    stepped.axvline(cells.metric("gaussian", "threshold")[0], color="grey", linestyle=":", linewidth=1)
    stepped.legend(frameon=False, fontsize=7, loc="upper left")
    there = [size for size in SIZES if f"supervised_n{size}" in cells.arms]
    for mu in range(1, K + 1):
        gap = np.stack(
            [
                cells.metric(f"supervised_n{size}", f"settled{mu}")
                - cells.metric(f"unsupervised_n{size}", f"settled{mu}")
                for size in there
            ],
            1,
        )
        _band(sizes, there, gap, marker="o", markersize=4, label=f"pattern {mu}")
    sizes.axhline(0, color="grey", linewidth=0.8)
    sizes.set_xscale("log")
    sizes.set(xlabel="spins N", ylabel="supervised - unsupervised")
    sizes.set_title(f"settled, M = {SIZE_EXAMPLES}", fontsize=10)
    sizes.legend(frameon=False, fontsize=8)
    for axes in (stepped, settled, sizes):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_capacity(cells: Cells) -> "Figure":
    """Patterns recalled together against the size of the network."""
    from matplotlib.figure import Figure

    figure = Figure((5, 3.8), layout="constrained")
    axes = figure.subplots()
    networks = [N for N in NETWORKS if f"n{N}" in cells.arms]
    found = np.stack([cells.metric(f"n{N}", "recalled") for N in networks], 1)
    _band(axes, networks, found, fmt="o", label=f"multitasking, d = {CAPACITY_D}")
    dense = np.stack([cells.metric(f"n{N}", "dense") for N in networks], 1)
    _band(axes, networks, dense, fmt="s", label="Hopfield network, d = 0")
    line = np.log(networks) / (2 * math.log(1 / CAPACITY_D))
    offset = found.mean() - line.mean()
    axes.plot(networks, line + offset, color="C0", linewidth=1, label="slope 1 / (2 log(1/d))")
    axes.set_xscale("log")
    axes.set(xlabel="spins N", ylabel=f"patterns recalled of {STORED}", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_bars(cells: Cells, panels: dict[str, tuple[str, tuple[str, ...]]]) -> "Figure":
    """One panel for each metric, with a bar for each arm and a point for each seed."""
    from matplotlib.figure import Figure

    figure = Figure((3.6 * len(panels), 3.6), layout="constrained")
    for axes, (metric, (label, arms)) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True
    ):
        for index, arm in enumerate(arms):
            found = cells.metric(arm, metric)
            axes.bar(index, found.mean(), color=f"C{index}", alpha=0.4)
            axes.scatter(np.full(len(found), index), found, color=f"C{index}", s=10)
        axes.set_xticks(range(len(arms)), [arm.replace("_", "\n") for arm in arms], fontsize=8)
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_retrieval(cells: Cells) -> "Figure":
    """Recall of the cued pattern and number of patterns with a signal."""
    arms = ("multitasking", "dense", "diluted_couplings", "softmax")
    return draw_bars(
        cells, {"first": ("overlap with the cued pattern", arms), "signals": ("patterns above 5 sigma, of 5", arms)}
    )


def draw_losses(cells: Cells) -> "Figure":
    """Energy and loss on a way down in every cell, and where the network settles from the minimum of the loss."""
    from matplotlib.figure import Figure

    figure = Figure((9, 3.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("hierarchical", "parallel"), strict=True):
        for number, arrays in enumerate(cells.arrays.values()):
            axes.plot(
                *arrays[name].T, color="C0", linewidth=1, alpha=0.6, label=None if number else "way down at T = 0"
            )
            axes.plot(*arrays[name][-1], "o", color="C0", markersize=4, label=None if number else "its end")
            label = None if number else "from the minimum of the loss"
            axes.plot(*arrays[f"{name}_minimum"], "x", color="C1", markersize=6, label=label)
        axes.locator_params(axis="x", nbins=5)
        axes.set(xlabel="energy per spin H / N", ylabel="summed loss $\\sum_\\mu L_\\mu^+$", title=f"{name} regime")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_images(cells: Cells) -> "Figure":
    """Accuracy of networks and baselines."""
    figure = draw_bars(cells, {"accuracy": ("accuracy on Fashion-MNIST", tuple(cells.arms))})
    figure.set_size_inches(5.5, 3.6)
    return figure


SEEDS = {"smoke": range(2), "cpu": range(100, 110)}
EXPERIMENTS = {
    "phases": Experiment(run_phases, SEEDS, draw_phases),
    "learning": Experiment(run_learning, SEEDS, draw_learning),
    "capacity": Experiment(run_capacity, SEEDS, draw_capacity),
    "retrieval": Experiment(run_retrieval, SEEDS, draw_retrieval),
    "losses": Experiment(run_losses, SEEDS, draw_losses),
    "images": Experiment(run_images, SEEDS, draw_images),
}
