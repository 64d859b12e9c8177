"""The figures of a comparison."""

import io
from typing import TYPE_CHECKING

import numpy as np

from classact.evidence.metrics import bin_of, confidence, decide
from classact.evidence.outcome import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 6  # curves of so many methods, the best ones, and of the strongest control


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: "Figure") -> bytes:
    """Draw a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _order(comparison: Comparison) -> list[str]:
    return [row.method for row in sorted(comparison.rows, key=lambda row: (row.control, -row.auc.effect))]


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)


def fold_figure(comparison: Comparison) -> "Figure":
    """AUC of every fold, the folds of one split joined by a line, with mean and interval of each method."""
    order = _order(comparison)
    rows = {row.method: row for row in comparison.rows}
    figure = new_figure(9, 0.9 + 0.36 * len(order))
    axes = figure.subplots()
    values = np.array([comparison.aucs(method) for method in order])
    y = np.arange(len(order))[:, None] + np.linspace(-0.2, 0.2, values.shape[1])
    axes.plot(values, y, color="0.85", linewidth=0.5, zorder=1)
    for index, method in enumerate(order):
        color = "0.45" if rows[method].control else "C0"
        axes.scatter(values[index], y[index], s=9, color=color, alpha=0.6, zorder=2, linewidth=0)
        interval = rows[method].auc
        if np.isfinite(interval.low):
            error = [[interval.effect - interval.low], [interval.high - interval.effect]]
            axes.errorbar(
                interval.effect, index, xerr=error, color="black", marker="o", markersize=4, capsize=3, zorder=3
            )
    axes.axvline(0.5, color="0.6", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(len(order) - 0.5, -0.5)  # best on top, as in the table
    axes.set_xlabel("AUC of the test part")
    _plain(axes)
    return figure


def decision_figure(comparison: Comparison) -> "Figure":
    """ROC and precision-recall curves (mean over the test parts), reliability, and recall of every class."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    order = _order(comparison)
    methods = [m for m in order if not comparison.is_control(m)][:SHOWN]
    methods += [m for m in order if comparison.is_control(m)][:1]
    figure = new_figure(13, 3.6)
    roc, precision, reliability, recall = figure.subplots(1, 4)
    grid = np.linspace(0, 1, 101)
    wanted = [1] if comparison.binary else range(len(comparison.classes))
    for number, method in enumerate(methods):
        style = {"color": "0.5", "linestyle": "--"} if comparison.is_control(method) else {"color": f"C{number}"}
        found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for cut, arrays in zip(comparison.cuts, comparison.arrays[method], strict=True):
            labels, p = comparison.labels[cut.test], arrays["probabilities"]
            for c in wanted:
                if 0 < (labels == c).sum() < len(labels):
                    false_positive, true_positive, _ = roc_curve(labels == c, p[:, c])
                    exact, found_part, _ = precision_recall_curve(labels == c, p[:, c])
                    found[0].append(np.interp(grid, false_positive, true_positive))
                    found[1].append(np.interp(grid, found_part[::-1], exact[::-1]))
        if found[0]:
            roc.plot(np.r_[0, grid], np.r_[0, np.mean(found[0], axis=0)], linewidth=1.2, label=method, **style)
            precision.plot(grid, np.mean(found[1], axis=0), linewidth=1.2, **style)
        p, labels, *_ = comparison.pooled(method)
        stated, came = confidence(labels, p)
        where = bin_of(stated)
        bins = [where == b for b in np.unique(where)]
        reliability.plot(
            [stated[b].mean() for b in bins],
            [came[b].mean() for b in bins],
            marker="o",
            markersize=3,
            linewidth=1,
            **style,
        )
        hits = np.concatenate(
            [
                decide(arrays["probabilities"], cell["threshold"])
                for cell, arrays in zip(comparison.cells[method], comparison.arrays[method], strict=True)
            ]
        ) == labels  # fmt: skip
        width = 0.8 / len(methods)
        places = np.arange(len(comparison.classes)) + (number - (len(methods) - 1) / 2) * width
        recall.bar(
            places, [hits[labels == c].mean() for c in range(len(comparison.classes))], width, color=style["color"]
        )
    for axes in (roc, reliability):
        axes.plot([0, 1], [0, 1], color="0.7", linestyle=":", linewidth=1)
    of = comparison.classes[1] if comparison.binary else "a class against the rest"
    roc.set(xlabel="1 - specificity", ylabel="sensitivity", title=f"ROC of {of}")
    precision.set(xlabel="recall", ylabel="precision", title="Precision and recall", ylim=(0, 1.03))
    reliability.set(xlabel="predicted probability", ylabel="observed share", title="Reliability")
    recall.set(title="Recall at the frozen threshold", ylim=(0, 1.03))
    recall.set_xticks(range(len(comparison.classes)), comparison.classes)
    roc.legend(fontsize=7, frameon=False)
    for axes in (roc, precision, reliability, recall):
        axes.title.set_fontsize(9)
        _plain(axes)
    return figure


def evidence_figure(comparison: Comparison) -> "Figure | None":
    """Probability of the predicted class as instances are taken away or added, by attention and at random."""
    methods = [m for m in _order(comparison) if any("deletion_top" in a for a in comparison.arrays[m])][:SHOWN]
    if not methods:
        return None
    figure = new_figure(9, 3.2)
    panels = figure.subplots(1, 2, sharey=True)
    ticks = {"deletion": ["0", "5", "10", "20", "50"], "insertion": ["5", "10", "20", "50", "100"]}
    for axes, kind in zip(panels, ticks, strict=True):
        for number, method in enumerate(methods):
            for order, style in (("top", "-"), ("random", ":")):
                curves = [a[f"{kind}_{order}"] for a in comparison.arrays[method] if f"{kind}_{order}" in a]
                label = method if order == "top" else None
                axes.plot(np.mean(curves, axis=0), style, color=f"C{number}", linewidth=1.3, label=label)
        axes.set_xticks(range(5), ticks[kind])
        _plain(axes)
    panels[0].set(xlabel="% of the instances taken out", ylabel="probability of the predicted class")
    panels[1].set(xlabel="% of the instances left")
    panels[0].plot([], [], ":", color="0.5", label="random instances")
    panels[0].legend(fontsize=7, frameon=False)
    return figure


def learning_figure(comparison: Comparison) -> "Figure | None":
    """AUC against the number of groups that a method learned from."""
    fractions = comparison.definition["fractions"]
    if len(fractions) < 2:
        return None
    trained = np.mean([len({comparison.groups[i] for i in (*c.train, *c.validation)}) for c in comparison.cuts])
    figure = new_figure(6, 3.6)
    axes = figure.subplots()
    for number, method in enumerate(_order(comparison)):
        curve = comparison.learning[method]
        control = comparison.is_control(method)
        x = np.array(list(curve)) * trained
        effect, low, high = (np.array([getattr(v, k) for v in curve.values()]) for k in ("effect", "low", "high"))
        color = "0.6" if control else f"C{number}"
        axes.plot(x, effect, "--" if control else "-", color=color, marker="o", markersize=3, label=method)
        if not control and np.isfinite(low).all():
            axes.fill_between(x, low, high, color=color, alpha=0.1, linewidth=0)
    axes.set(xlabel=f"groups to learn from ({comparison.definition['data']['groups']})", ylabel="AUC of the test parts")
    figure.legend(fontsize=7, frameon=False, loc="outside right center")
    _plain(axes)
    return figure


def curve_figure(comparison: Comparison) -> "Figure | None":
    """Training and validation loss of every fold against the epoch, one panel per trained method."""
    trained = [m for m in comparison.methods if any("curve_val_loss" in a for a in comparison.arrays[m])]
    if not trained:
        return None
    columns = min(4, len(trained))
    rows = -(-len(trained) // columns)
    figure = new_figure(3 * columns, 2.4 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat[len(trained) :]:
        panel.set_visible(False)
    for panel, method in zip(axes.flat, trained, strict=False):
        for arrays in comparison.arrays[method]:
            panel.plot(arrays["curve_train_loss"], color="C1", linewidth=0.5, alpha=0.5)
            panel.plot(arrays["curve_val_loss"], color="C0", linewidth=0.5, alpha=0.5)
        best = np.median([cell["best_epoch"] for cell in comparison.cells[method]])
        panel.axvline(best, color="0.5", linestyle=":", linewidth=1)
        panel.set_title(method, fontsize=9)
        _plain(panel)
    axes[0, 0].plot([], [], color="C1", label="training loss (all terms)")
    axes[0, 0].plot([], [], color="C0", label="validation cross-entropy")
    axes[0, 0].legend(fontsize=7, frameon=False)
    figure.supxlabel("epoch (dotted: median of the epochs kept)", fontsize=9)
    return figure
