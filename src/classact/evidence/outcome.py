"""What a comparison found: the table, the differences, and what they mean in sentences."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from classact.data.bags import Problem
from classact.evidence.metrics import (
    POINTS,
    POOLED,
    auc,
    confusion_metric,
    decide,
)
from classact.evidence.splits import Split
from classact.evidence.statistics import (
    Interval,
    bootstrap_groups,
    corrected_interval,
    detectable_effect,
    holm,
)
from classact.evidence.validation import bootstrap_pooled

if TYPE_CHECKING:
    import pandas as pd

    from classact.evidence.comparison import Task


class Effect(NamedTuple):
    """Main effect of a level of a factor against another, over all levels of the other factor."""

    factor: str
    level: str
    versus: str
    difference: Interval
    p: float


@dataclass(frozen=True)
class Row:
    """One method in the table.

    `ranking` holds means over test parts with corrected intervals, `pooled` metrics of pooled predictions with
    intervals from a bootstrap over groups; `evidence` says whether instance scores are evidence.
    """

    method: str
    remark: str
    control: bool
    ranking: dict[str, Interval]
    missing: int
    difference: Interval | None
    p: float
    p_adjusted: float
    pooled: dict[str, Interval]
    pooled_differences: dict[str, Interval]
    group_auc: Interval | None
    group_metrics: dict[str, Interval]
    evidence: dict[str, Interval]
    instance_auc: float | None
    agreement: dict[str, float]
    parameters: int | None
    steps: float

    @property
    def auc(self) -> Interval:
        """Mean AUC of the test parts."""
        return self.ranking["auc"]

    def estimates(self) -> dict[str, list[float | None]]:
        """Effect and ends of the interval of every metric, for JSON."""
        found = {**self.ranking, **self.pooled, **{f"group_{k}": v for k, v in self.group_metrics.items()}}
        if self.group_auc is not None:
            found["group_auc"] = self.group_auc
        return {
            name: [float(v) if np.isfinite(v) else None for v in (of.effect, of.low, of.high)]
            for name, of in found.items()
        }


@dataclass(frozen=True)
class Comparison:
    """The outcome of a comparison: `.table`, `.summary`, and the report in `.folder`."""

    task: "Task"
    definition: dict[str, Any]
    methods: list[str]
    encoders: list[str]
    reference: str
    cuts: list[Split]
    labels: np.ndarray
    groups: list[str]
    ids: list[str]
    classes: list[str]
    sizes: np.ndarray
    excluded: list[Problem]
    cells: dict[str, list[dict[str, Any]]]
    arrays: dict[str, list[dict[str, np.ndarray]]]
    parts: dict[tuple[str, float], list[dict[str, Any]]]
    seconds: dict[str, float]
    remarks: dict[str, str]
    command: str
    folder: Path

    @property
    def ratio(self) -> float:
        """Mean size of a test part divided by that of what was trained on, validation part included."""
        return float(np.mean([len(c.test) / (len(c.train) + len(c.validation)) for c in self.cuts]))

    @property
    def by_group(self) -> bool:
        """Whether a group holds more than one item."""
        return len(set(self.groups)) < len(self.ids)

    @property
    def binary(self) -> bool:
        """Whether there are two classes."""
        return len(self.classes) == 2

    @property
    def tuned(self) -> int:
        """Number of configurations of a tuned method; 0 if nothing was tuned."""
        return max((len(drawn) for drawn in self.definition["tune"].values()), default=0)

    def base(self, arm: str) -> str:
        """Method of an arm without its encoder."""
        return arm.rpartition("@")[0] if self.encoders else arm

    def is_control(self, arm: str) -> bool:
        """Whether an arm is one of the task's controls."""
        return self.base(arm) in self.task.controls

    @property
    def controls(self) -> list[str]:
        """The arms that are controls."""
        return [m for m in self.methods if self.is_control(m)]

    def values(self, method: str, name: str) -> np.ndarray:
        """One number of every fold; NaN where there is none."""
        return np.array([np.nan if c.get(name) is None else c[name] for c in self.cells[method]])

    def aucs(self, method: str) -> np.ndarray:
        """AUC of every fold; NaN where its test part lacks a class."""
        return self.values(method, "auc")

    def predictions(self, method: str) -> "pd.DataFrame":
        """Out-of-fold predictions, one row per item and repeat."""
        import pandas as pd

        parts = []
        for cut, cell, arrays in zip(self.cuts, self.cells[method], self.arrays[method], strict=True):
            p = arrays["probabilities"]
            part = pd.DataFrame({"id": [self.ids[i] for i in cut.test], "group": [self.groups[i] for i in cut.test]})
            part["repeat"], part["fold"] = cut.repeat, cut.fold
            part["label"] = [self.classes[k] for k in self.labels[cut.test]]
            part["predicted"] = [self.classes[k] for k in decide(p, cell["threshold"])]
            part["threshold"] = cell["threshold"]
            for k, name in enumerate(self.classes):
                part[f"p({name})"] = p[:, k]
            parts.append(part)
        return pd.concat(parts, ignore_index=True)

    @cached_property
    def _group_index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(dict.fromkeys(self.groups))}

    @property
    def _repeats(self) -> int:
        return 1 + max(c.repeat for c in self.cuts)

    def _confusion(self, method: str) -> np.ndarray:
        """Confusion matrices (groups, repeats, C, C) of the pooled predictions, by group and repeat."""
        size = len(self.classes)
        counts = np.zeros((len(self._group_index), self._repeats, size, size))
        for cut, cell, arrays in zip(self.cuts, self.cells[method], self.arrays[method], strict=True):
            predicted = decide(arrays["probabilities"], cell["threshold"])
            members = [self._group_index[self.groups[i]] for i in cut.test]
            np.add.at(counts[:, cut.repeat], (np.array(members), self.labels[cut.test], predicted), 1)
        return counts

    def pooled(self, method: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Pooled out-of-fold predictions (m, C) with label, group number, repeat and fold of each, (m,)."""
        parts = [arrays["probabilities"] for arrays in self.arrays[method]]
        items = np.concatenate([cut.test for cut in self.cuts])
        members = np.array([self._group_index[self.groups[i]] for i in items])
        repeat, fold = (
            np.concatenate([np.full(len(cut.test), getattr(cut, name)) for cut in self.cuts])
            for name in ("repeat", "fold")
        )
        return np.concatenate(parts), self.labels[items], members, repeat, fold

    def _pooled_metrics(self, method: str) -> dict[str, Interval]:
        confusion = self._confusion(method)
        found = {name: bootstrap_groups(confusion, confusion_metric(name)) for name in POOLED}
        p, label, member, repeat, _ = self.pooled(method)
        return found | bootstrap_pooled(confusion, label, p, member, repeat, self.classes)

    def _group_scores(self, method: str) -> tuple[np.ndarray, np.ndarray]:
        """AUC per fold, and confusion matrices, where each group is one item with its mean probability.

        Groups whose items have different classes are left out.
        """
        size = len(self.classes)
        counts = np.zeros((len(self._group_index), self._repeats, size, size))
        aucs = []
        for cut, cell, arrays in zip(self.cuts, self.cells[method], self.arrays[method], strict=True):
            member = np.array([self._group_index[self.groups[i]] for i in cut.test])
            label = self.labels[cut.test]
            groups = [g for g in np.unique(member) if len(set(label[member == g])) == 1]
            if not groups:
                aucs.append(np.nan)
                continue
            p = np.stack([arrays["probabilities"][member == g].mean(0) for g in groups])
            y = np.array([label[member == g][0] for g in groups])
            aucs.append(auc(y, p))
            np.add.at(counts[:, cut.repeat], (groups, y, decide(p, cell["threshold"])), 1)
        return np.array(aucs), counts

    @cached_property
    def rows(self) -> list[Row]:
        """One row per method, as in the table."""
        reference_aucs = self.aucs(self.reference)
        reference_counts = self._confusion(self.reference)
        differences = {
            m: None if m == self.reference else corrected_interval(self.aucs(m) - reference_aucs, self.ratio)
            for m in self.methods
        }
        p = [d.p_value() if d is not None else float("nan") for d in differences.values()]
        rows = []
        names = ("auc", "auprc", *(POINTS if self.binary else ()))
        for m, raw, adjusted in zip(self.methods, p, holm(p), strict=True):
            paired = np.stack([self._confusion(m), reference_counts], axis=1)
            group_auc, group_metrics = None, {}
            if self.by_group:
                by_group, group_counts = self._group_scores(m)
                group_auc = _within_unit(corrected_interval(by_group, self.ratio))
                group_metrics = {k: bootstrap_groups(group_counts, confusion_metric(k)) for k in POOLED}
            instance = [c["instance_auc"] for c in self.cells[m] if c.get("instance_auc") is not None]
            tests = [k for k in ("deletion", "insertion") if any(c.get(k) is not None for c in self.cells[m])]
            rows.append(
                Row(
                    method=m,
                    remark=self.remarks[m],
                    control=self.is_control(m),
                    ranking={k: _within_unit(corrected_interval(self.values(m, k), self.ratio)) for k in names},
                    missing=int(np.isnan(self.aucs(m)).sum()),
                    difference=differences[m],
                    p=raw,
                    p_adjusted=adjusted,
                    pooled=self._pooled_metrics(m),
                    pooled_differences={} if m == self.reference else {
                        k: bootstrap_groups(paired, _paired(k)) for k in POOLED
                    },
                    group_auc=group_auc,
                    group_metrics=group_metrics,
                    evidence={k: corrected_interval(self.values(m, k), self.ratio) for k in tests},
                    instance_auc=float(np.mean(instance)) if instance else None,
                    agreement=self._agreement(m),
                    parameters=self.cells[m][0].get("parameters"),
                    steps=float(np.mean([c.get("steps", 0) for c in self.cells[m]])),
                )
            )  # fmt: skip
        return rows

    def _agreement(self, method: str) -> dict[str, float]:
        """Mean rank correlation, over items, of the instance scores of models that had not trained on the item."""
        tested: dict[int, dict[int, np.ndarray]] = {}
        watched: dict[int, list[np.ndarray]] = {}
        for cut, cell, arrays in zip(self.cuts, self.cells[method], self.arrays[method], strict=True):
            if "instance_counts" not in arrays:
                continue
            ends = np.cumsum(arrays["instance_counts"])[:-1]
            parts = np.split(arrays[f"score:{cell['score_kinds'][0]}"], ends)
            for item, scores in zip(cut.test, parts, strict=True):
                tested.setdefault(cut.repeat, {})[int(item)] = scores
            if "validation" in arrays:
                ends = np.cumsum(arrays["validation_counts"])[:-1]
                for item, scores in zip(arrays["validation"], np.split(arrays["validation_scores"], ends), strict=True):
                    watched.setdefault(int(item), []).append(scores)
        first = tested.get(0, {})
        pairs = {
            "folds": [(first[i], other) for i, others in watched.items() if i in first for other in others],
            "seeds": [(first[i], other) for i, other in tested.get(1, {}).items() if i in first],
        }
        found = {name: [_rank_correlation(a, b) for a, b in of] for name, of in pairs.items()}
        return {name: float(np.nanmean(of)) for name, of in found.items() if np.isfinite(of).any()}

    @property
    def candidates(self) -> list[str]:
        """The methods that are not controls; the controls where nothing else was compared."""
        return [m for m in self.methods if not self.is_control(m)] or self.methods

    @cached_property
    def versus_best(self) -> tuple[str, dict[str, tuple[Interval, float]]]:
        """The method with the highest mean AUC, and every other's difference to it with its Holm-adjusted p."""
        best = max(self.candidates, key=lambda m: np.nanmean(self.aucs(m)))
        gaps = {m: corrected_interval(self.aucs(m) - self.aucs(best), self.ratio) for m in self.candidates if m != best}
        adjusted = holm([gap.p_value() for gap in gaps.values()])
        return best, {m: (gap, p) for (m, gap), p in zip(gaps.items(), adjusted, strict=True)}

    @cached_property
    def versus_controls(self) -> dict[str, float]:
        """For every method, the p value of "it beats every control": the largest of all, Holm-adjusted over methods."""
        largest = []
        for m in self.candidates:
            gaps = [corrected_interval(self.aucs(m) - self.aucs(c), self.ratio) for c in self.controls]
            largest.append(max((gap.p_value() if gap.effect > 0 else 1.0 for gap in gaps), default=float("nan")))
        return dict(zip(self.candidates, holm(largest), strict=True))

    @cached_property
    def main_effects(self) -> list[Effect]:
        """Of the encoders over all methods, and of the methods over all encoders; p is Holm-adjusted."""
        if len(self.encoders) < 2:
            return []
        methods = list(dict.fromkeys(self.base(m) for m in self.candidates))
        by = {(m, e): self.aucs(f"{m}@{e}") for m in methods for e in self.encoders}
        first, reference = self.encoders[0], self.base(self.reference)
        pairs = [("encoder", e, first, [by[m, e] - by[m, first] for m in methods]) for e in self.encoders[1:]]
        if reference in methods:
            pairs += [
                ("method", m, reference, [by[m, e] - by[reference, e] for e in self.encoders])
                for m in methods
                if m != reference
            ]
        gaps = [corrected_interval(np.mean(values, axis=0), self.ratio) for *_, values in pairs]
        adjusted = holm([gap.p_value() for gap in gaps])
        return [Effect(*pair[:3], gap, p) for pair, gap, p in zip(pairs, gaps, adjusted, strict=True)]

    @cached_property
    def learning(self) -> dict[str, dict[float, Interval]]:
        """Mean AUC of every method by the fraction of the training groups that it saw."""
        found: dict[str, dict[float, Interval]] = {}
        for m in self.methods:
            for f in self.definition["fractions"]:
                cells = self.cells[m] if f == 1 else self.parts[m, f]
                values = np.array([np.nan if c["auc"] is None else c["auc"] for c in cells])
                found.setdefault(m, {})[f] = _within_unit(corrected_interval(values, self.ratio))
        return found

    @cached_property
    def summary(self) -> list[str]:
        """What the study says, in sentences; the most important first."""
        best, gaps = self.versus_best
        rows = {row.method: row for row in self.rows}
        effect = {m: row.auc.effect for m, row in rows.items()}
        lines = []
        if not self.is_control(best) and self.controls:
            winners = [m for m, p in self.versus_controls.items() if p < 0.05]
            if winners:
                lines.append(f"Better than every control: {', '.join(sorted(winners, key=lambda m: -effect[m]))}.")
            else:
                strongest = max(self.controls, key=lambda m: effect[m])
                gap = corrected_interval(self.aucs(best) - self.aucs(strongest), self.ratio)
                lines.append(
                    f"No method beats the controls beyond doubt: {strongest} reaches AUC {effect[strongest]:.3f}, "
                    f"{best} {effect[best]:.3f} (difference {_text(gap)}, before the adjustment for several methods)."
                )
        same = [m for m, (_, p) in gaps.items() if not p < 0.05]
        if same:
            lines.append(
                f"Not distinguishable from the best ({best}, AUC {effect[best]:.3f}): "
                f"{', '.join(f'{m} ({effect[m]:.3f})' for m in sorted(same, key=lambda m: -effect[m]))}."
            )
        elif gaps:
            lines.append(f"{best} (AUC {effect[best]:.3f}) differs from every other method.")
        smallest = [detectable_effect(gap) for gap, _ in gaps.values()]
        smallest = [value for value in smallest if np.isfinite(value)]
        if smallest:
            lines.append(
                f"Differences in AUC below about {np.median(smallest):.3f} would most likely have been missed "
                "(80 % power, before the adjustment for several comparisons)."
            )
        lines += self._decision_lines(rows[best])
        lines += [
            f"{e.factor} {e.level} against {e.versus}, over all {'methods' if e.factor == 'encoder' else 'encoders'}: "
            f"AUC {_text(e.difference)}, p = {e.p:.3f} (Holm)."
            for e in self.main_effects
        ]
        lines += self._learning_lines(best)
        lines += self._data_lines()
        changed = [f"{m}.{k} = {v}" for m, own in self.definition["settings"].items() for k, v in own.items()]
        changed += [f"{k} = {v} for all" for k, v in self.definition["options"].items()]
        but = f", but {', '.join(changed)}" if changed else ""
        if self.tuned:
            lines.append(
                f"Tuned: every method had {self.tuned} configurations (the paper's defaults{but}, and random draws "
                "from its search space), chosen on the validation part of every fold, with equal numbers of steps."
            )
        else:
            lines.append(f"Untuned, paper defaults{but}.")
        return lines

    def _decision_lines(self, row: Row) -> list[str]:
        error = row.pooled["calibration_error"]
        if self.binary:
            target = self.definition["target_sensitivity"]
            how = f"aimed at sensitivity {target:g}" if target else "chosen for balanced accuracy"
            line = (
                f"{row.method} with its frozen threshold ({how} on validation): sensitivity "
                f"{_interval(row.pooled['sensitivity'])} for {self.classes[1]}, specificity "
                f"{_interval(row.pooled['specificity'])}; its probabilities are off by {error.effect:.3f} on average "
                "(calibration error)."
            )
            return [line]
        return [f"The probabilities of {row.method} are off by {error.effect:.3f} on average (calibration error)."]

    def _learning_lines(self, best: str) -> list[str]:
        curve = self.learning[best]
        if len(curve) < 2:
            return []
        before, last = sorted(curve)[-2:]
        full, less = (
            self.aucs(best),
            np.array([np.nan if c["auc"] is None else c["auc"] for c in self.parts[best, before]]),
        )
        gap = corrected_interval(full - less, self.ratio)
        verdict = "more data would most likely help" if gap.low > 0 else "a gain from more data is not shown"
        points = ", ".join(f"{f:g}: {value.effect:.3f}" for f, value in curve.items())
        return [
            f"AUC of {best} by fraction of the groups: {points}; from {before:g} to {last:g} {_text(gap)}: {verdict}."
        ]

    def _data_lines(self) -> list[str]:
        lines = []
        if missing := max(row.missing for row in self.rows):
            lines.append(f"{missing} of {len(self.cuts)} test parts lack a class and give no AUC.")
        if self.excluded:
            by_class = {c: sum(e.label == c for e in self.excluded) for c in self.classes}
            known = ", ".join(f"{n} {c}" for c, n in by_class.items() if n)
            n = len(self.excluded)
            unit = f"{self.task.unit}{'s' * (n > 1)}"
            lines.append(f"Left out: {n} {unit}{f' ({known})' if known else ''}; see excluded.csv.")
        if self.by_group:
            label_sets: dict[str, set[int]] = {}
            for group, label in zip(self.groups, self.labels, strict=True):
                label_sets.setdefault(group, set()).add(int(label))
            mixed = sum(len(labels) > 1 for labels in label_sets.values())
            if mixed:
                lines.append(
                    f"{mixed} groups hold {self.task.unit}s of different classes; group figures leave them out."
                )
        return lines

    @property
    def table(self) -> "pd.DataFrame":
        """One row per method: every metric with its 95 % interval, and the differences to the reference."""
        import pandas as pd

        records = []
        for row in self.rows:
            record: dict[str, Any] = {"method": row.method, "control": row.control}
            pairs: list[tuple[str, Interval | None]] = [("auc", row.auc), ("auc_difference", row.difference)]
            pairs += [(k, v) for k, v in row.ranking.items() if k != "auc"]
            pairs += list(row.pooled.items())
            pairs += [(f"{k}_difference", row.pooled_differences.get(k)) for k in POOLED]
            if self.by_group:
                pairs += [("group_auc", row.group_auc), *((f"group_{k}", v) for k, v in row.group_metrics.items())]
            pairs += list(row.evidence.items())
            for name, interval in pairs:
                record[name] = interval.effect if interval else np.nan
                record[f"{name}_low"] = interval.low if interval else np.nan
                record[f"{name}_high"] = interval.high if interval else np.nan
            record |= {"p": row.p, "p_holm": row.p_adjusted, "folds_without_auc": row.missing}
            record |= {f"agreement_of_{name}": value for name, value in row.agreement.items()}
            if row.instance_auc is not None:
                record["instance_auc"] = row.instance_auc
            record |= {"parameters": row.parameters, "steps": row.steps, "remark": row.remark}
            records.append(record)
        return pd.DataFrame(records).set_index("method")

    def save(self, path: str | Path) -> None:
        """Write the table as .csv, .tex or .html, by suffix."""
        path = Path(path)
        writers = {".csv": self.table.to_csv, ".tex": self.table.to_latex, ".html": self.table.to_html}
        if path.suffix not in writers:
            raise ValueError(f"{path}: expected one of {', '.join(writers)}")
        writers[path.suffix](path)


def _within_unit(interval: Interval) -> Interval:
    """Cut the ends of an interval of a share to [0, 1]."""
    return replace(interval, low=max(interval.low, 0.0), high=min(interval.high, 1.0))


def _paired(name: str) -> Any:
    metric = confusion_metric(name)
    return lambda counts: metric(counts[:, 0]) - metric(counts[:, 1])


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import rankdata

    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def _text(gap: Interval) -> str:
    return f"{gap.effect:+.3f}, 95 % interval {gap.low:+.3f} to {gap.high:+.3f}"


def _interval(of: Interval) -> str:
    return f"{of.effect:.2f} [{of.low:.2f}, {of.high:.2f}]"


def counts_by_class(labels: Sequence[int] | np.ndarray, classes: Sequence[str]) -> str:
    """Say how many there are of each class: ``26 tumor, 32 normal``."""
    return ", ".join(f"{int((np.asarray(labels) == k).sum())} {name}" for k, name in enumerate(classes))
