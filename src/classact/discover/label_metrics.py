"""Distances between labels, and the label that is nearest to a distribution over some of them.

Labels are names, and everything is looked up by name: neither the order in which a classifier knows its classes nor
that of a file of the hierarchy matters. A metric is made from a matrix, a tree, a graph, embeddings or an order; each
kind finds Fréchet means its own way, so that none needs all N x N distances.
"""

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components, dijkstra
from scipy.spatial.distance import cdist
from sklearn.utils import check_random_state
from torch import Tensor

ELEMENTS = 2**24  # numbers that a block of a large table may have: 128 MB
SUM_TOLERANCE = 1e-3
TIES = {torch.float64: 1e-10}  # relative difference below which two sums of rounded numbers are equal; else:
TIES_SINGLE = 1e-5


def first_smallest(parts: Iterable[Float[Tensor, "b _"]]) -> Int[Tensor, " b"]:
    """Column of the smallest non-negative value in every row, the first one among those equal up to rounding.

    Parameters
    ----------
    parts : iterable of (B, n)
        Blocks of columns, of which only one is held at a time.
    """
    best = column = None
    offset = 0
    for part in parts:
        lowest, slack = part.amin(1), 1 + TIES.get(part.dtype, TIES_SINGLE)
        first = (part <= (lowest * slack).unsqueeze(1)).to(torch.uint8).argmax(1) + offset
        if best is None or column is None:
            best, column = lowest, first
        else:
            better = lowest * slack < best
            best, column = torch.where(better, lowest, best), torch.where(better, first, column)
        offset += part.shape[1]
    if column is None:
        raise ValueError("parts: expected at least one block of columns")
    return column


def check_probabilities(probs: Any, classes: int) -> Float[np.ndarray, "b {classes}"]:
    """Probabilities (B, K) as float64 with rows that sum to 1 exactly.

    Raises
    ------
    ValueError
        If the shape does not fit, a value is negative or not finite, or the sum of a row differs from 1 by over 0.001.
    """
    table = np.asarray(probs, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != classes:
        raise ValueError(f"probs: expected shape (B, {classes}), a column for each observed label, got {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError("probs: expected finite numbers, got NaN or infinity")
    if (table < 0).any():
        raise ValueError(f"probs: expected probabilities, got a negative value, {table.min():g}")
    sums = table.sum(1, keepdims=True)
    if (off := abs(sums - 1) > SUM_TOLERANCE).any():
        raise ValueError(f"probs: expected rows that sum to 1, got a row that sums to {sums[off][0]:g}")
    return table / sums


class LabelMetric(ABC):
    """N labels and the distances d between them; made by one of its constructors.

    Attributes
    ----------
    labels : (N,) array
        Names, in the order of all results; where labels are equally good, the first one is taken.

    Examples
    --------
    >>> metric = LabelMetric.from_tree({"cat": "feline", "lion": "feline", "feline": "animal", "dog": "animal"})
    >>> metric
    LabelMetric(tree of 5 labels)
    >>> metric.distances(["cat"], ["lion", "dog"])
    array([[2., 3.]])
    >>> metric.frechet_mean([[0.4, 0.35, 0.25]], observed=["cat", "lion", "dog"])
    array(['feline'], dtype='<U6')
    """

    kind = ""

    def __init__(self, labels: Any) -> None:
        self.labels = as_labels(labels)
        self._position = {name: position for position, name in enumerate(self.labels.tolist())}
        if not len(self.labels):
            raise ValueError("labels: expected at least one")
        if len(self._position) < len(self.labels):
            name, times = Counter(self.labels.tolist()).most_common(1)[0]
            raise ValueError(f"labels: expected different names, got {name!r} {times} times")

    @staticmethod
    def from_matrix(matrix: Any, labels: Any = None, check_triangle: bool = False) -> "LabelMetric":
        """Distances given as a matrix.

        Parameters
        ----------
        matrix : (N, N)
            Symmetric, non-negative, zero on the diagonal.
        labels : sequence of N names, optional
            Names of rows and columns; 0 to N - 1 by default.
        check_triangle : bool
            Also check ``d(a, c) <= d(a, b) + d(b, c)``, in O(N^3). Loki's rule does not need it.

        Raises
        ------
        ValueError
            If any of that does not hold.
        """
        distances = np.array(matrix, dtype=np.float64)
        if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
            raise ValueError(f"matrix: expected a square one, got shape {distances.shape}")
        names = np.arange(len(distances)) if labels is None else as_labels(labels)
        if len(names) != len(distances):
            raise ValueError(f"matrix: expected {len(names)} rows, one for each label, got {len(distances)}")
        if not np.isfinite(distances).all():
            raise ValueError("matrix: expected finite distances, got NaN or infinity")
        tolerance = 1e-6 * (abs(distances).max() if distances.size else 0)
        if distances.min(initial=0) < -tolerance:
            raise ValueError(f"matrix: expected distances, got a negative value, {distances.min():g}")
        if abs(distances - distances.T).max(initial=0) > tolerance:
            i, j = np.unravel_index(abs(distances - distances.T).argmax(), distances.shape)
            raise ValueError(
                f"matrix: expected a symmetric one, got {distances[i, j]:g} from {names[i]} to {names[j]} and"
                f" {distances[j, i]:g} back"
            )
        if abs(distances.diagonal()).max(initial=0) > tolerance:
            raise ValueError(f"matrix: expected zeros on the diagonal, got {abs(distances.diagonal()).max():g}")
        if check_triangle:
            for middle in range(len(distances)):
                if (distances > distances[:, [middle]] + distances[middle] + tolerance).any():
                    raise ValueError(f"matrix: the triangle inequality does not hold for paths over {names[middle]}")
        return _Matrix(names, distances.clip(min=0))

    @staticmethod
    def from_tree(
        parents: Mapping[Any, Any] | Sequence[int] | Int[np.ndarray, " m"],
        labels: Any = None,
        lengths: Mapping[Any, float] | Sequence[float] | Float[np.ndarray, " m"] | None = None,
    ) -> "LabelMetric":
        """Lengths of the paths in a tree.

        Parameters
        ----------
        parents : mapping or (M,) int
            Node -> its parent (the root may be missing, or have None); or the parent of each node 0 to M - 1, -1 for
            the root.
        labels : sequence of names, optional
            The nodes that are labels, such as the leaves; all by default.
        lengths : mapping or (M,), optional
            Positive length of the edge from a node to its parent; 1 by default.

        Raises
        ------
        ValueError
            If this is no tree, or a label is no node.
        """
        if not isinstance(parents, Mapping):
            numbers = np.asarray(parents)
            if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer) or (numbers >= len(numbers)).any():
                raise ValueError("parents: expected for every node the number of another one, or -1 for the root")
            parents = {node: parent if parent >= 0 else None for node, parent in enumerate(numbers.tolist())}
        steps = [(node, parent) for node, parent in parents.items() if parent is not None]
        nodes = list(dict.fromkeys([name for node, parent in parents.items() for name in (parent, node)]))
        nodes = [node for node in nodes if node is not None]
        roots = len(nodes) - len(steps)
        if roots != 1:
            raise ValueError(f"parents: expected a tree with one root, got {roots} nodes without a parent")
        length = [1.0 if lengths is None else float(lengths[node]) for node, _ in steps]
        edges = [(node, parent, step) for (node, parent), step in zip(steps, length, strict=True)]
        return _of_edges(nodes, edges, labels, "parents")

    @staticmethod
    def from_graph(graph: Any, labels: Any = None, weight: str | None = None) -> "LabelMetric":
        """Lengths of the shortest paths in an undirected, connected graph; of a tree if it has no cycle.

        Parameters
        ----------
        graph : networkx graph, iterable of edges, or path
            Edges are pairs of nodes, or triples with a positive length; in a file, one on each line.
        labels : sequence of names, optional
            The nodes that are labels; all by default.
        weight : str, optional
            Edge attribute of a networkx graph that holds the length; all edges have length 1 by default.

        Raises
        ------
        ValueError
            If the graph is not connected (some distances would be infinite), or a label is no node.
        """
        nodes: list[Any] = []
        if hasattr(graph, "nodes") and hasattr(graph, "edges"):
            nodes = list(graph.nodes)
            edges = list(graph.edges(data=weight, default=1)) if weight else list(graph.edges())
        elif isinstance(graph, str | Path):
            edges = [line.split() for line in Path(graph).read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            edges = [tuple(edge) for edge in graph]
        for edge in edges:
            if len(edge) not in (2, 3):
                raise ValueError(f"graph: expected edges of two nodes and perhaps a length, got {edge!r}")
        nodes = list(dict.fromkeys([*nodes, *(name for edge in edges for name in edge[:2])]))
        weighted = [(a, b, float(more[0]) if more else 1.0) for a, b, *more in edges]
        return _of_edges(nodes, weighted, labels, "graph")

    @staticmethod
    def from_embeddings(
        embeddings: Any,
        labels: Any = None,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        normalize: bool = False,
    ) -> "LabelMetric":
        """Distances between embeddings of the labels, such as those of their names, or rows of a classifier.

        Parameters
        ----------
        embeddings : (N, D)
            One for each label. With the Euclidean distance, the Fréchet mean is the label next to the mean embedding.
        labels : sequence of N names, optional
            0 to N - 1 by default.
        distance : {"euclidean", "cosine"}
            The latter is 1 minus the cosine, for which the triangle inequality need not hold.
        normalize : bool
            Scale embeddings to length 1, as the paper does with those of CLIP. The cosine needs no scaling.
        """
        table = np.asarray(
            embeddings.detach().cpu() if isinstance(embeddings, Tensor) else embeddings, dtype=np.float64
        )
        if table.ndim != 2 or not np.isfinite(table).all():
            raise ValueError(f"embeddings: expected finite numbers of shape (N, D), got shape {table.shape}")
        names = np.arange(len(table)) if labels is None else as_labels(labels)
        if len(names) != len(table):
            raise ValueError(f"embeddings: expected {len(names)} rows, one for each label, got {len(table)}")
        if distance not in ("euclidean", "cosine"):
            raise ValueError(f"distance: expected 'euclidean' or 'cosine', got {distance!r}")
        if normalize or distance == "cosine":
            norms = np.linalg.norm(table, axis=1, keepdims=True)
            if not norms.all():
                raise ValueError(f"embeddings: that of {names[norms.argmin()]} is zero and has no direction")
            table = table / norms
        return _Euclidean(names, table) if distance == "euclidean" else _Cosine(names, table)

    @staticmethod
    def from_path(labels: Any, positions: Any = None) -> "LabelMetric":
        """Labels on a line, such as grades: |position - position|. The Fréchet mean is the one next to the mean.

        Parameters
        ----------
        labels : int or sequence of names
            In order; a number N stands for 0 to N - 1.
        positions : sequence of float, optional
            Where they lie; 0, 1, 2, ... by default.
        """
        names = np.arange(labels) if isinstance(labels, int) else as_labels(labels)
        places = np.arange(len(names)) if positions is None else np.asarray(positions, dtype=np.float64)
        if places.shape != (len(names),) or not np.isfinite(places).all():
            raise ValueError(f"positions: expected {len(names)} finite numbers, one for each label, got {positions}")
        return _Euclidean(names, places[:, None].astype(np.float64))

    @staticmethod
    def discrete(labels: Any) -> "LabelMetric":
        """All labels at distance 1 from each other: the Fréchet mean is the most probable one."""
        return _Discrete(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"LabelMetric({self.kind} of {len(self)} labels)"

    def __deepcopy__(self, memo: Any) -> "LabelMetric":
        return self  # nothing changes it, and `sklearn.clone` would copy it with every estimator

    def index(self, labels: Any) -> Int[np.ndarray, " k"]:
        """Positions of labels in ``self.labels``.

        Raises
        ------
        ValueError
            If there is no such label.
        """
        names = as_labels(labels).tolist()
        if unknown := [name for name in names if name not in self._position]:
            known = ", ".join(map(repr, self.labels[:5].tolist()))
            raise ValueError(
                f"labels: unknown label {unknown[0]!r}; the {len(self)} labels of the metric are {known} …"
            )
        return np.array([self._position[name] for name in names], dtype=np.int64)

    def distances(self, a: Any, b: Any = None) -> Float[np.ndarray, "k n"]:
        """Distances between K labels and N others (all by default)."""
        return self._block(self.index(a), self._columns(b))

    def squared(self, a: Any, b: Any) -> Float[np.ndarray, " n"]:
        """Squared distances between labels in pairs, such as predicted and true ones."""
        first, second = self.index(a), self.index(b)
        if len(first) != len(second):
            raise ValueError(f"a, b: expected as many labels, got {len(first)} and {len(second)}")
        (rows, row), (columns, column) = (np.unique(part, return_inverse=True) for part in (first, second))
        found, step = np.empty(len(first)), max(1, ELEMENTS // max(1, len(columns)))
        for start in range(0, len(rows), step):
            chosen = (row >= start) & (row < start + step)
            found[chosen] = self._block(rows[start : start + step], columns)[row[chosen] - start, column[chosen]]
        return found**2

    def expected_squared(self, probs: Any, observed: Any, labels: Any = None) -> Float[np.ndarray, "b n"]:
        """``sum_i P_i d^2(y, lambda_i)`` for every label y.

        Parameters
        ----------
        probs : (B, K)
            Probabilities P of the observed labels.
        observed : sequence of K names
            The labels lambda that the columns stand for.
        labels : sequence of N names, optional
            The labels y; all by default.
        """
        rows = self._rows(observed)
        return self._expected(check_probabilities(probs, len(rows)), rows, self._columns(labels))

    def frechet_mean(self, probs: Any, observed: Any, labels: Any = None) -> np.ndarray:
        """Of `labels`, the one with the smallest expected squared distance, for each row of `probs`: (B,) names.

        Arguments are those of ``expected_squared``, of whose table only blocks are made, of at most 128 MB.
        """
        rows, columns = self._rows(observed), self._columns(labels)
        return self.labels[columns[self._frechet(check_probabilities(probs, len(rows)), rows, columns)]]

    def center(self) -> Any:
        """Label with the smallest mean squared distance to all: the best constant answer if all are as frequent."""
        return self.frechet_mean(np.full((1, len(self)), 1 / len(self)), self.labels).tolist()[0]

    def scrambled(self, random_state: Any = None) -> "LabelMetric":
        """The same distances with the names permuted, to see what is gained without knowing who is near whom.

        The rule also gains by moving from the extremes to the centre; geometry is shown only by what it gains over
        the scrambled metric, judged by the true one.
        """
        other = copy.copy(self)
        LabelMetric.__init__(other, self.labels[check_random_state(random_state).permutation(len(self))])
        return other

    def _rows(self, observed: Any) -> Int[np.ndarray, " k"]:
        rows = self.index(observed)
        if len(np.unique(rows)) < len(rows):
            raise ValueError("observed: expected different labels, got one twice")
        return rows

    def _columns(self, labels: Any) -> Int[np.ndarray, " n"]:
        return np.arange(len(self)) if labels is None else self.index(labels)

    @abstractmethod
    def _block(self, rows: np.ndarray, columns: np.ndarray) -> Float[np.ndarray, "k n"]:
        """Distances between labels, given by position."""

    def _expected(self, probs: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> Float[np.ndarray, "b n"]:
        return probs @ self._block(rows, columns) ** 2

    def _steps(self, rows: int, columns: int) -> tuple[int, int]:  # noqa: ARG002
        """How many samples and how many labels to look at together."""
        return 4096, max(1, ELEMENTS // (rows + 4096))

    def _frechet(self, probs: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> Int[np.ndarray, " b"]:
        samples, labels = self._steps(len(rows), len(columns))
        found = [
            first_smallest(
                torch.from_numpy(self._expected(probs[i : i + samples], rows, columns[j : j + labels]))
                for j in range(0, len(columns), labels)
            )
            for i in range(0, len(probs), samples)
        ]
        return torch.cat(found).numpy() if found else np.zeros(0, dtype=np.int64)


def as_labels(labels: Any) -> np.ndarray:
    """Names as a one-dimensional array: of strings or numbers, or of objects if they are anything else."""
    if isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "biufU":
        return labels.copy()
    names = labels.tolist() if isinstance(labels, np.ndarray | Tensor) else list(labels)
    names = [name.item() if isinstance(name, np.generic) else name for name in names]
    kinds = {type(name) for name in names}
    return np.array(names) if kinds in ({str}, {int}) else np.fromiter(names, dtype=object, count=len(names))


class _Matrix(LabelMetric):
    kind = "matrix"

    def __init__(self, labels: Any, matrix: Float[np.ndarray, "n n"]) -> None:
        super().__init__(labels)
        self._matrix = matrix

    def _block(self, rows: np.ndarray, columns: np.ndarray) -> Float[np.ndarray, "k n"]:
        return self._matrix[np.ix_(rows, columns)]


class _Discrete(LabelMetric):
    kind = "discrete metric"

    def _block(self, rows: np.ndarray, columns: np.ndarray) -> Float[np.ndarray, "k n"]:
        return (rows[:, None] != columns).astype(np.float64)


class _Cosine(LabelMetric):
    kind = "cosine distances"

    def __init__(self, labels: Any, embeddings: Float[np.ndarray, "n d"]) -> None:
        super().__init__(labels)
        self._embeddings = embeddings

    def _block(self, rows: np.ndarray, columns: np.ndarray) -> Float[np.ndarray, "k n"]:
        distances = 1 - self._embeddings[rows] @ self._embeddings[columns].T
        return np.where(rows[:, None] == columns, 0.0, distances.clip(min=0))


class _Euclidean(LabelMetric):
    """``sum_i P_i |y - e_i|^2 = |y - b|^2 + sum_i P_i |b - e_i|^2`` with the mean embedding b."""

    kind = "Euclidean embedding"

    def __init__(self, labels: Any, embeddings: Float[np.ndarray, "n d"]) -> None:
        super().__init__(labels)
        self._embeddings = embeddings

    def _block(self, rows: np.ndarray, columns: np.ndarray) -> Float[np.ndarray, "k n"]:
        return cdist(self._embeddings[rows], self._embeddings[columns])

    def _expected(self, probs: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> Float[np.ndarray, "b n"]:
        observed, others = self._embeddings[rows], self._embeddings[columns]
        center = observed.mean(0)  # subtracted first: squares of large coordinates would cancel badly
        observed, others = observed - center, others - center
        mean, spread = probs @ observed, probs @ (observed**2).sum(1)
        expected = spread[:, None] - 2 * mean @ others.T + (others**2).sum(1)
        return expected.clip(min=0)

    def _steps(self, rows: int, columns: int) -> tuple[int, int]:  # noqa: ARG002
        return 4096, max(1, ELEMENTS // (self._embeddings.shape[1] + 4096))


class _Graph(LabelMetric):
    """Searches from a label when it is first asked for; its distances to all nodes are kept, 4 bytes each."""

    kind = "graph"

    def __init__(self, labels: Any, adjacency: csr_matrix, nodes: Int[np.ndarray, " n"]) -> None:
        super().__init__(labels)
        self._adjacency, self._nodes = adjacency, nodes
        self._known: dict[int, Float[np.ndarray, " n"]] = {}

    def _block(self, rows: np.ndarray, columns: np.ndarray) -> Float[np.ndarray, "k n"]:
        missing = [row for row in np.unique(rows).tolist() if row not in self._known]
        search = _hops if (self._adjacency.data == 1).all() else _shortest
        step = max(1, ELEMENTS // self._adjacency.shape[0])
        for start in range(0, len(missing), step):
            sources = missing[start : start + step]
            found = search(self._adjacency, self._nodes[sources])[:, self._nodes]
            self._known.update(zip(sources, found.astype(np.float32), strict=True))
        return np.stack([self._known[row][columns] for row in rows.tolist()]).astype(np.float64)


def _shortest(adjacency: csr_matrix, sources: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k m"]:
    return dijkstra(adjacency, indices=sources)


def _hops(adjacency: csr_matrix, sources: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k m"]:
    """Breadth-first search from all sources at once: one bit for each of them at every node."""
    nodes, k = adjacency.shape[0], len(sources)
    reached = np.zeros((nodes, -(-k // 64)), np.uint64)
    np.bitwise_or.at(reached, (sources, np.arange(k) // 64), np.uint64(1) << (np.arange(k, dtype=np.uint64) % 64))
    hops = np.zeros((nodes, k), np.float32)
    while True:
        open_bits = np.unpackbits((~reached).view(np.uint8), axis=1, bitorder="little")[:, :k]
        if not open_bits.any():
            return hops.T
        hops += open_bits
        reached = reached | np.bitwise_or.reduceat(reached[adjacency.indices], adjacency.indptr[:-1], axis=0)


class _Rooted:
    """A tree whose nodes are in breadth-first order: every level is a range of numbers, and so are the children."""

    def __init__(self, parent: Int[np.ndarray, " m"], length: Float[np.ndarray, " m"]) -> None:
        self.parent, self.length = parent, length
        self.levels: list[tuple[int, int]] = []
        end = 1
        while end < len(parent):
            start, end = end, int(np.searchsorted(parent, end))
            self.levels.append((start, end))

    def sum_up(self, weight: Float[np.ndarray, "m b"], distance: Float[np.ndarray, "m b"] | None = None) -> None:
        """Add to every node the weights below it, and to `distance` their distances times weight."""
        for start, end in reversed(self.levels):
            parents = self.parent[start:end]
            first = np.flatnonzero(np.r_[True, parents[1:] != parents[:-1]])
            if distance is not None:
                below = distance[start:end] + self.length[start:end, None] * weight[start:end]
                distance[parents[first]] += np.add.reduceat(below, first, axis=0)
            weight[parents[first]] += np.add.reduceat(weight[start:end], first, axis=0)

    def moments(
        self, probs: Float[np.ndarray, "b k"], nodes: Int[np.ndarray, " k"]
    ) -> tuple[Float[np.ndarray, "m b"], Float[np.ndarray, "m b"]]:
        """Expected distances and squared distances from random nodes to every node."""
        depth = np.zeros(len(self.parent))
        for start, end in self.levels:
            depth[start:end] = depth[self.parent[start:end]] + self.length[start:end]
        weight = np.zeros((len(self.parent), len(probs)))
        weight[nodes] = probs.T
        below = np.zeros_like(weight)
        self.sum_up(weight, below)
        first, second = np.empty_like(weight), np.empty_like(weight)
        first[0], second[0] = probs @ depth[nodes], probs @ depth[nodes] ** 2
        for start, end in self.levels:
            parents, length = self.parent[start:end], self.length[start:end, None]
            inside = below[start:end] + length * weight[start:end]  # of those below, seen from the parent
            first[start:end] = first[parents] + length * (1 - 2 * weight[start:end])
            second[start:end] = second[parents] + length * (2 * first[parents] + length - 4 * inside)
        return first, second


class TreeMetric(LabelMetric):
    """Expected squared distances by passing sums of P, P d and P d^2 up and down the tree.

    That is done on the part of the tree that has observed labels below it. A label at height h over its node s has
    ``E d^2(y) = E d^2(s) + 2 h E d(s) + h^2``, so that of all that hang on s only the lowest can be a Fréchet mean.
    """

    kind = "tree"

    def __init__(self, labels: Any, adjacency: csr_matrix, nodes: Int[np.ndarray, " n"]) -> None:
        super().__init__(labels)
        order, before = breadth_first_order(adjacency, 0, directed=False)
        number = np.empty(len(order), np.int64)
        number[order] = np.arange(len(order))
        self._nodes = number[nodes]
        edges, length = adjacency.tocoo(), np.zeros(len(order))
        up = before[edges.row] == edges.col
        length[number[edges.row[up]]] = edges.data[up]
        self._tree = _Rooted(np.r_[-1, number[before[order[1:]]]], length)

    @property
    def every_node(self) -> bool:
        """Whether all nodes are labels."""
        return len(self) == len(self._tree.parent)

    def _around(
        self, rows: np.ndarray, columns: np.ndarray
    ) -> tuple[_Rooted, Int[np.ndarray, " k"], Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """The part of the tree with observed nodes below, these, the nodes that labels hang on, and at what height."""
        tree, nodes = self._tree, self._nodes[rows]
        count = np.zeros((len(tree.parent), 1))
        count[nodes] = 1
        tree.sum_up(count)
        kept = count[:, 0] > 0
        hung, height = np.arange(len(kept)), np.zeros(len(kept))
        for start, end in tree.levels:
            off = start + np.flatnonzero(~kept[start:end])
            hung[off] = hung[tree.parent[off]]
            height[off] = height[tree.parent[off]] + tree.length[off]
        number = np.cumsum(kept) - 1
        part = _Rooted(np.r_[-1, number[tree.parent[kept][1:]]], tree.length[kept])
        return part, number[nodes], number[hung[self._nodes[columns]]], height[self._nodes[columns]]

    def _block(self, rows: np.ndarray, columns: np.ndarray) -> Float[np.ndarray, "k n"]:
        # each observed label for certain: the expected distance is the distance
        unique, inverse = np.unique(rows, return_inverse=True)
        found, step = np.empty((len(unique), len(columns))), max(1, ELEMENTS // (4 * len(self._tree.parent)))
        for start in range(0, len(unique), step):
            sources = unique[start : start + step]
            part, nodes, hung, height = self._around(sources, columns)
            found[start : start + step] = part.moments(np.eye(len(sources)), nodes)[0][hung].T + height
        return np.where(rows[:, None] == columns, 0.0, found[inverse].clip(min=0))

    def _expected(self, probs: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> Float[np.ndarray, "b n"]:
        around = self._around(rows, columns)
        found, step = np.empty((len(probs), len(columns))), max(1, ELEMENTS // (4 * len(around[0].parent)))
        for start in range(0, len(probs), step):
            found[start : start + step] = _hanging(probs[start : start + step], *around)
        return found

    def _frechet(self, probs: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> Int[np.ndarray, " b"]:
        part, nodes, hung, height = self._around(rows, columns)
        order = np.lexsort((height, hung))  # stable: of those equally low the first column
        lowest = np.sort(order[np.r_[True, np.diff(hung[order]) > 0]])
        step = max(1, ELEMENTS // (4 * len(part.parent)))
        found = [
            first_smallest(
                [torch.from_numpy(_hanging(probs[i : i + step], part, nodes, hung[lowest], height[lowest]))]
            ).numpy()
            for i in range(0, len(probs), step)
        ]
        return lowest[np.concatenate(found)] if found else np.zeros(0, dtype=np.int64)

    def spanned(self, rows: Int[np.ndarray, " k"]) -> np.ndarray:
        """Which labels lie on a path between two of `rows`, by position: (N,) bool."""
        tree = self._tree
        count = np.zeros((len(tree.parent), 1))
        count[self._nodes[rows]] = 1
        inside = count[:, 0] > 0
        tree.sum_up(count)
        crossed = (count[:, 0] > 0) & (count[:, 0] < len(rows))  # edges to the parent that such a path goes over
        inside |= crossed
        inside[tree.parent[crossed]] = True
        return inside[self._nodes]

    def leaves(self) -> np.ndarray:
        """Which labels are nodes with a single neighbour: (N,) bool."""
        parent = self._tree.parent
        neighbours = np.bincount(parent[1:], minlength=len(parent)) + (parent >= 0)
        return neighbours[self._nodes] <= 1


def _hanging(
    probs: np.ndarray, part: _Rooted, nodes: np.ndarray, hung: np.ndarray, height: np.ndarray
) -> Float[np.ndarray, "b n"]:
    first, second = part.moments(probs, nodes)
    return (second[hung] + height[:, None] * (2 * first[hung] + height[:, None])).T.clip(min=0)


def _of_edges(nodes: list[Any], edges: list[tuple[Any, Any, float]], labels: Any, argument: str) -> LabelMetric:
    number = {name: position for position, name in enumerate(nodes)}
    names = as_labels(nodes if labels is None else labels)
    if unknown := [name for name in names.tolist() if name not in number]:
        raise ValueError(f"labels: {unknown[0]!r} is no node of {argument}")
    ends = np.array([(number[a], number[b]) for a, b, _ in edges], dtype=np.int64).reshape(-1, 2)
    length = np.array([step for _, _, step in edges], dtype=np.float64)
    if not (np.isfinite(length) & (length > 0)).all():
        raise ValueError(f"{argument}: expected positive lengths of the edges, got {length.min():g}")
    ends.sort(axis=1)
    by_length = np.lexsort((length, ends[:, 1], ends[:, 0]))  # of several edges between two nodes the shortest
    ends, length = ends[by_length], length[by_length]
    keep = (ends[:, 0] != ends[:, 1]) & np.r_[True, (ends[1:] != ends[:-1]).any(1)][: len(ends)]
    (a, b), length = ends[keep].T, length[keep]
    whole = (np.r_[length, length], (np.r_[a, b], np.r_[b, a]))
    adjacency = coo_matrix(whole, (len(nodes), len(nodes))).tocsr()
    parts, part = connected_components(adjacency, directed=False)
    if parts != 1:
        apart = nodes[int(np.flatnonzero(part != part[0])[0])] if nodes else None
        raise ValueError(
            f"{argument}: expected a connected graph, got {parts} parts; no path leads from {nodes[:1]} to {apart!r}"
        )
    where = np.array([number[name] for name in names.tolist()], dtype=np.int64)
    return TreeMetric(names, adjacency, where) if len(length) == len(nodes) - 1 else _Graph(names, adjacency, where)
