"""MambaMIL: selective state spaces over the instances, which are scanned in two orders.

Yang, Wang, Chen: MambaMIL: Enhancing Long Sequence Modeling with Sequence Reordering in Computational Pathology, MICCAI
2024, https://arxiv.org/abs/2403.06800. Code of the authors: isyangshu/MambaMIL. The block around the scan is that of
Gu, Dao: Mamba, 2023, https://arxiv.org/abs/2312.00752.

In a Mamba block every instance learns from those before it, at a cost linear in their number. MambaMIL adds a second
scan with weights of its own: the sequence is written in rows of R and read column by column, so that instances R apart
become neighbours. Where R is the width of the grid of patches, the first scan is the horizontal one and the second the
vertical one. Attention pools what comes out.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from classact.mil.attention import ACTIVATIONS, Activation, AttentionPool
from classact.mil.model import MILLoss, MILModel, MILOutput, check_bags, embedding_width
from classact.nn import selective_scan

Mode = Literal["reorder", "plain", "bidirectional"]
Pad = Literal["skip", "zero"]


def sequence_reorder(
    size: Int[Tensor, " n"], length: int, rate: int | Int[Tensor, " n"], pad: Pad = "skip"
) -> tuple[Int[Tensor, "n l"], Int[Tensor, "n l"]]:
    """Order in which N sequences, written in rows of R positions, are read column by column.

    Parameters
    ----------
    size : (N,)
        Number of real positions of every sequence; they stand in front, and what follows them keeps its place.
    length : int
        Length L of the sequences, padding included.
    rate : int or (N,)
        R, at least 1, for all sequences or each. R = 1 and R = L change nothing.
    pad : {"skip", "zero"}
        ``"skip"`` reorders the real positions alone. ``"zero"`` fills up the last row with zeros, which are scanned,
        as in the authors' code; orders then have length ``R * ceil(L / R)``.

    Returns
    -------
    index, inverse : (N, L)
        The position that each step reads, and the step that reads each position.

    Raises
    ------
    ValueError
        If `rate` is less than 1, or differs between sequences while `pad` is ``"zero"``.

    Examples
    --------
    >>> import torch
    >>> index, inverse = sequence_reorder(torch.tensor([7]), 7, rate=3)
    >>> index
    tensor([[0, 3, 6, 1, 4, 2, 5]])
    >>> sequence_reorder(torch.tensor([7]), 7, rate=3, pad="zero")[0]
    tensor([[0, 3, 6, 1, 4, 7, 2, 5, 8]])
    """
    size = size.unsqueeze(1)
    if isinstance(rate, Tensor):
        if pad == "zero":
            raise ValueError("rate: pad='zero' needs one number for all sequences, got one for each")
        rate = rate.unsqueeze(1)
    elif rate < 1:
        raise ValueError(f"rate: expected at least 1, got {rate}")
    elif pad == "zero":
        length = rate * math.ceil(length / rate)
    position = torch.arange(length, device=size.device)
    row, column = position // rate, position % rate
    if pad == "zero":
        height = (size + rate - 1) // rate
        read, before = height * rate, column * height
    else:
        read, before = size, column * (size // rate) + torch.minimum(column, size % rate)  # first columns are longer
    inverse = torch.where(position < read, before + row, position)
    return _invert(inverse), inverse


def reverse_order(size: Int[Tensor, " n"], length: int) -> Int[Tensor, "n l"]:
    """Order in which the real positions, the first `size` of `length`, are read from the last on: its own inverse.

    Examples
    --------
    >>> import torch
    >>> reverse_order(torch.tensor([3, 5]), 5)
    tensor([[2, 1, 0, 3, 4],
            [4, 3, 2, 1, 0]])
    """
    size, position = size.unsqueeze(1), torch.arange(length, device=size.device)
    return torch.where(position < size, size - 1 - position, position)


def raster_order(
    mask: Bool[Tensor, "n k"] | None, coords: Float[Tensor, "n k 2"] | Int[Tensor, "n k 2"] | None
) -> Int[Tensor, "n k"]:
    """Positions of the instances row by row, top to bottom, real ones first; without coords as they are stored.

    Examples
    --------
    >>> import torch
    >>> coords = torch.tensor([[[5, 0], [0, 5], [0, 0]]])
    >>> raster_order(None, coords)
    tensor([[2, 0, 1]])
    """
    if coords is None and mask is None:
        raise ValueError("mask, coords: expected at least one of them, got neither")
    keys = [] if coords is None else [coords[..., 0], grid_rows(coords, mask)]
    if mask is not None:
        keys.append(~mask)
    order = keys[0].argsort(dim=1, stable=True)
    for key in keys[1:]:
        order = _sort_by(key, order)
    return order


def _sort_by(key: Tensor, order: Tensor) -> Tensor:
    return order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))


def grid_rows(
    coords: Float[Tensor, "n k 2"] | Int[Tensor, "n k 2"], mask: Bool[Tensor, "n k"] | None = None
) -> Float[Tensor, "n k"]:
    """Row of every instance, counted from the top of its bag.

    Pieces of tissue often have grids of their own, a part of a patch apart. So a row is as high as a patch, and a patch
    is the median step from an instance to the next of exactly its height. Where no two are of one height, every
    height is a row of its own.

    Examples
    --------
    >>> import torch
    >>> grid_rows(torch.tensor([[[0, 10], [8, 10], [40, 13], [48, 13], [0, 18]]]))
    tensor([[0., 0., 0., 0., 1.]], dtype=torch.float64)
    """
    x, y = coords.double().unbind(-1)
    if mask is not None:  # out of the way
        x, y = x.masked_fill(~mask, torch.inf), y.masked_fill(~mask, torch.inf)
    order = _sort_by(y, x.argsort(dim=1, stable=True))
    across, down = x.gather(1, order).diff(), y.gather(1, order).diff()
    patch = F.pad(torch.where((down == 0) & (across > 0), across, torch.nan), (0, 1), value=torch.nan)
    patch = patch.nanmedian(1, keepdim=True).values
    row = ((y - y.amin(1, keepdim=True)) / patch + 0.1).floor()  # steps such as 112.3 leave it a little below a number
    return torch.where(patch > 0, row, y)


def modal_row_length(row: Float[Tensor, "n k"] | Int[Tensor, "n k"], size: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Length of the rows in which most instances lie; `row` in raster order, the first `size` of each bag are real.

    Examples
    --------
    >>> import torch
    >>> modal_row_length(torch.tensor([[0, 0, 0, 1, 2, 2, 2]]), torch.tensor([7]))
    tensor([3])
    """
    real = (torch.arange(row.shape[1], device=row.device) < size.unsqueeze(1)).long()
    row = F.pad((row[:, 1:] != row[:, :-1]).long(), (1, 0)).cumsum(1)
    length = torch.zeros_like(row).scatter_add(1, row, real).gather(1, row)
    return row.new_zeros(len(row), row.shape[1] + 1).scatter_add(1, length, real).argmax(1)


def _invert(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )


def _take(x: Tensor, index: Tensor) -> Tensor:
    """``x[i, index[i]]`` for every sequence i."""
    n, length, _ = x.shape
    rows = index + length * torch.arange(n, device=x.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, (n, -1))


class SelectiveSSM(nn.Module):
    """One scan: causal depthwise convolution, SiLU, the selective scan, and the gate (Mamba, section 3.4).

    `A_log` and `D` carry ``_no_weight_decay = True``, as in mamba_ssm, for optimisers that heed it.
    [`LitMIL`][classact.mil.LitMIL] does not, nor does the MambaMIL code.

    Parameters
    ----------
    inner : int
        Number Di of channels.
    state : int
        States S of every channel.
    conv : int
        Width of the convolution.
    dt_rank : int, optional
        Rank of the step sizes; ``inner / 32`` rounded up by default.

    Raises
    ------
    ValueError
        If a number is not positive.

    Examples
    --------
    >>> import torch
    >>> SelectiveSSM(inner=32)(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 32])
    """

    def __init__(self, inner: int, state: int = 16, conv: int = 4, dt_rank: int | None = None) -> None:
        super().__init__()
        dt_rank = math.ceil(inner / 32) if dt_rank is None else dt_rank
        for name, value in (("inner", inner), ("state", state), ("conv", conv), ("dt_rank", dt_rank)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.sizes = [dt_rank, state, state]
        self.conv1d = nn.Conv1d(inner, inner, conv, groups=inner, padding=conv - 1)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(dt_rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        for p in (self.A_log, self.D):
            p._no_weight_decay = True  # type: ignore[attr-defined]  # noqa: SLF001
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(dt_rank**-0.5), dt_rank**-0.5)
            step = torch.empty(inner).uniform_(math.log(1e-3), math.log(0.1)).exp()
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step

    def forward(self, xz: Float[Tensor, "n l i"]) -> Float[Tensor, "n l o"]:
        """Scan; the first half of the 2 Di channels is the input, the second the gate."""
        x, z = xz.chunk(2, dim=-1)
        u = F.silu(self.conv1d(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        delta, B, C = self.x_proj(u).split(self.sizes, dim=-1)
        delta = F.linear(delta, self.dt_proj.weight)
        A = -torch.exp(self.A_log)
        return selective_scan(u, delta, A, B, C, self.D, z, self.dt_proj.bias, delta_softplus=True)


class MambaBlock(SelectiveSSM):
    """Mamba block with one scan, or two whose outputs, back in the given order, are added.

    The first scan's weights, with `in_proj` and `out_proj`, bear the names of mamba_ssm, mambapy and transformers, so
    that the state dict of their block loads into a plain one. Those of the second scan are in `second`.

    Parameters
    ----------
    dim : int
        Width D of the instances.
    state, conv, expand : int
        States of a channel, width of the convolution, and channels of a scan as a multiple of `dim`.
    mode : {"reorder", "plain", "bidirectional"}
        Order of the second scan: column by column, none, or from the last instance to the first.
    rate : int
        Length R of the rows for ``"reorder"``.
    pad : {"skip", "zero"}
        What happens at the end of the last row; see [`sequence_reorder`][classact.mil.sequence_reorder].

    Raises
    ------
    ValueError
        If a number is not positive, or `mode` or `pad` is unknown.

    Examples
    --------
    >>> import torch
    >>> MambaBlock(dim=16, rate=8)(torch.randn(2, 100, 16)).shape
    torch.Size([2, 100, 16])
    """

    def __init__(
        self,
        dim: int,
        state: int = 16,
        conv: int = 4,
        expand: int = 2,
        mode: Mode = "reorder",
        rate: int = 10,
        pad: Pad = "skip",
    ) -> None:
        for name, value in (("dim", dim), ("expand", expand), ("rate", rate)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if mode not in ("reorder", "plain", "bidirectional"):
            raise ValueError(f"mode: expected 'reorder', 'plain' or 'bidirectional', got {mode!r}")
        if pad not in ("skip", "zero"):
            raise ValueError(f"pad: expected 'skip' or 'zero', got {pad!r}")
        inner, dt_rank = expand * dim, math.ceil(dim / 16)
        super().__init__(inner, state, conv, dt_rank)
        self.mode, self.rate, self.pad = mode, rate, pad
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.second = None if mode == "plain" else SelectiveSSM(inner, state, conv, dt_rank)

    def forward(
        self, h: Float[Tensor, "n l d"], size: Int[Tensor, " n"] | None = None, rate: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n l d"]:
        """Mix the instances of N bags.

        Parameters
        ----------
        h : (N, L, D)
            Instances in the order of the first scan, real ones in front: what follows them cannot change them.
        size : (N,), optional
            Number of real instances of every bag; L by default.
        rate : (N,), optional
            R of every bag, instead of the one for all.
        """
        n, length, _ = h.shape
        xz = self.in_proj(h)
        y = super().forward(xz)
        if self.second is not None:
            if size is None:
                size = torch.full((n,), length, device=h.device)
            if self.mode == "bidirectional":
                index = inverse = reverse_order(size, length)
            else:
                index, inverse = sequence_reorder(size, length, self.rate if rate is None else rate, self.pad)
            if self.pad == "zero":
                real = torch.arange(length, device=h.device) < size.unsqueeze(1)
                xz = F.pad(xz.masked_fill(~real.unsqueeze(-1), 0), (0, 0, 0, index.shape[1] - length))
            y = y + _take(self.second(_take(xz, index)), inverse[:, :length])
        return self.out_proj(y)


class MambaMIL(MILModel):
    """Mamba blocks between the embedding of the instances and their attention pooling.

    The order of the instances matters: with `coords` they are scanned row by row, see `grid_rows`, without as they are
    stored. Train it with the cross-entropy of the bag, or for survival with as many classes as there are time bins and
    [`NLLSurvivalLoss`][classact.mil.NLLSurvivalLoss].

    Parameters
    ----------
    in_dim, n_classes : int
        Width of the instance features and number of classes.
    dim : int, optional
        Width D of the instance embedding; 512 in the paper. Default: the family's
        [`embedding_width`][classact.mil.model.embedding_width].
    layers : int
        Number of blocks.
    state, conv, expand : int
        Of the blocks, see [`MambaBlock`][classact.mil.MambaBlock].
    mode : {"reorder", "plain", "bidirectional"}
        Order of the second scan: column by column (the paper), none (Mamba), or from the last instance to the first.
    rate : int or "auto"
        Length R of the rows that are read column by column; 10 by default in the authors' code, 5 in their scripts.
        ``"auto"`` takes of every bag the length of the rows in which most instances lie, or the rounded root of the
        number of instances where there are no coords.
    pad : {"skip", "zero"}
        ``"skip"`` leaves the last row as short as it is, ``"zero"`` fills it up with zeros, which disturb the states,
        as in the authors' code.
    init : {"mamba", "official"}
        ``"mamba"`` keeps Mamba's initialisation, by which step sizes begin between 0.001 and 0.1. ``"official"`` draws
        all linear layers from Xavier's normal distribution and sets their biases to 0, as the authors' code does; step
        sizes then begin near 0.7.
    hidden : int
        Width of the attention network.
    dropout : float
        Dropout on the embedded instances; 0 for subtyping in the authors' scripts.
    activation : {"relu", "gelu", "tanh"}
        Of the instance embedding.

    Raises
    ------
    ValueError
        If a number is not positive (`layers` may be 0), a word is unknown, or ``rate="auto"`` meets ``pad="zero"``.

    Examples
    --------
    >>> import torch
    >>> model = MambaMIL(in_dim=384, n_classes=2, rate="auto")
    >>> output = model(torch.randn(1, 500, 384))
    >>> output.logits.shape, output.attention.shape
    (torch.Size([1, 2]), torch.Size([1, 500]))
    """

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        dim: int | None = None,
        layers: int = 2,
        state: int = 16,
        conv: int = 4,
        expand: int = 2,
        mode: Mode = "reorder",
        rate: int | Literal["auto"] = 10,
        pad: Pad = "skip",
        init: Literal["mamba", "official"] = "mamba",
        hidden: int = 128,
        dropout: float = 0.0,
        activation: Activation = "relu",
    ) -> None:
        super().__init__(
            in_dim,
            n_classes,
            dim=dim,
            layers=layers,
            state=state,
            conv=conv,
            expand=expand,
            mode=mode,
            rate=rate,
            pad=pad,
            init=init,
            hidden=hidden,
            dropout=dropout,
            activation=activation,
        )
        if layers < 0:
            raise ValueError(f"layers: expected 0 or more, got {layers}")
        if hidden < 1:
            raise ValueError(f"hidden: expected at least 1, got {hidden}")
        if isinstance(rate, str) and rate != "auto":
            raise ValueError(f"rate: expected a number or 'auto', got {rate!r}")
        if rate == "auto" and pad == "zero":
            raise ValueError("rate: pad='zero' needs one number for all bags, got 'auto'")
        if init not in ("mamba", "official"):
            raise ValueError(f"init: expected 'mamba' or 'official', got {init!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected {', '.join(ACTIVATIONS)}, got {activation!r}")
        dim = dim or embedding_width(in_dim)
        self.rate, self.activation = rate, activation
        self.reduce = nn.Linear(in_dim, dim)
        self.dropout = nn.Dropout(dropout)
        fixed = 1 if rate == "auto" else rate
        self.blocks = nn.ModuleList(MambaBlock(dim, state, conv, expand, mode, fixed, pad) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.attention = AttentionPool(dim, hidden)
        self.classifier = nn.Linear(dim, n_classes)
        if init == "official":
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_normal_(layer.weight)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)

    def embed(self, x: Float[Tensor, "n k d"]) -> Float[Tensor, "n k h"]:
        """Linear layer, activation, dropout."""
        return self.dropout(ACTIVATIONS[self.activation](self.reduce(x)))

    def pool(
        self,
        h: Float[Tensor, "n k h"],
        mask: Bool[Tensor, "n k"] | None = None,
        coords: Float[Tensor, "n k 2"] | Int[Tensor, "n k 2"] | None = None,
    ) -> tuple[Float[Tensor, "n h"], Float[Tensor, "n k"]]:
        """Run the blocks in raster order, or as stored without `coords`, and pool; the attention is as stored."""
        n, k, _ = h.shape
        size = torch.full((n,), k, device=h.device) if mask is None else mask.sum(1)
        sort = mask is not None or coords is not None
        if sort:
            order = raster_order(mask, coords)
            h = _take(h, order)
        rate = None
        if self.rate == "auto" and coords is not None:
            rate = modal_row_length(grid_rows(coords, mask).gather(1, order), size).clamp(min=1)
        elif self.rate == "auto":
            rate = size.float().sqrt().round().long().clamp(min=1)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            h = h + block(norm(h), size, rate)
        h = self.norm(h)
        real = None if mask is None else torch.arange(k, device=h.device) < size.unsqueeze(1)
        logits = self.attention(h, real)
        z = (logits.softmax(-1) @ h).squeeze(1)
        logits = logits.squeeze(1)
        return z, logits.gather(1, _invert(order)) if sort else logits

    def forward(
        self,
        x: Float[Tensor, "n k d"],
        mask: Bool[Tensor, "n k"] | None = None,
        coords: Float[Tensor, "n k 2"] | Int[Tensor, "n k 2"] | None = None,
    ) -> MILOutput:
        """Classify N bags; see [`MILModel`][classact.mil.MILModel].

        Raises
        ------
        ValueError
            If a shape or dtype does not fit.
        """
        check_bags(x, mask, self.in_dim)
        if coords is not None and coords.shape != (*x.shape[:2], 2):
            raise ValueError(f"coords: expected shape {(*x.shape[:2], 2)}, got {tuple(coords.shape)}")
        z, attention_logits = self.pool(self.embed(x), mask, coords)
        return MILOutput(self.head(z), attention_logits, z)


class DiscreteHazards(NamedTuple):
    """A discrete survival model of N patients over C time bins.

    Attributes
    ----------
    hazards : (N, C)
        Probability of the event in a bin, given that it has not happened before.
    survival : (N, C)
        Probability that the event happens after a bin.
    risk : (N,)
        Minus the sum of the survival: the score for the concordance index.
    """

    hazards: Float[Tensor, "n c"]
    survival: Float[Tensor, "n c"]
    risk: Float[Tensor, " n"]


def discrete_hazards(logits: Float[Tensor, "n c"]) -> DiscreteHazards:
    """Read the C scores of any model of the family as the logits of the hazards of C time bins.

    Examples
    --------
    >>> import torch
    >>> discrete_hazards(torch.zeros(1, 4)).survival
    tensor([[0.5000, 0.2500, 0.1250, 0.0625]])
    """
    survival = F.logsigmoid(-logits).cumsum(1).exp()
    return DiscreteHazards(logits.sigmoid(), survival, -survival.sum(1))


def survival_bins(
    time: Float[Tensor, " n"], censored: Bool[Tensor, " n"] | Int[Tensor, " n"], bins: int = 4
) -> Float[Tensor, " edges"]:
    """Edges between the time bins: quantiles of the times of the patients whose event was seen.

    Parameters
    ----------
    time : (n,)
        Time of the event or of the last visit.
    censored : (n,)
        1 or True where the event was not seen.
    bins : int
        Number C of bins, at least 2. Bins hold their lower edge.

    Returns
    -------
    (C - 1,)
        Edges for ``torch.bucketize(time, edges, right=True)``.

    Raises
    ------
    ValueError
        If shapes differ, `bins` is less than 2, or no event was seen.

    Examples
    --------
    >>> import torch
    >>> time, censored = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 9.0]), torch.tensor([0, 0, 0, 0, 0, 1])
    >>> edges = survival_bins(time, censored)
    >>> edges
    tensor([2., 3., 4.])
    >>> torch.stack([torch.bucketize(time, edges, right=True), censored], dim=1).tolist()
    [[0, 0], [1, 0], [2, 0], [3, 0], [3, 0], [3, 1]]
    """
    if time.shape != censored.shape:
        raise ValueError(f"time, censored: expected equal shapes, got {tuple(time.shape)}, {tuple(censored.shape)}")
    if bins < 2:
        raise ValueError(f"bins: expected at least 2, got {bins}")
    seen = time[censored == 0]
    if len(seen) == 0:
        raise ValueError("censored: expected at least one patient whose event was seen, got none")
    return seen.quantile(torch.arange(1, bins, dtype=time.dtype, device=time.device) / bins)


class NLLSurvivalLoss(MILLoss):
    """Negative log-likelihood of a discrete survival model, by the hazards of time bins (survival part of the code).

    A patient whose event falls into bin y contributes the probability to survive the bins before and of the event in
    y; one censored in y, the probability to survive y. Computed from the logits, without the code's clamps.

    Parameters
    ----------
    alpha : float
        How much less the censored count, in [0, 1]; 0 in the authors' scripts.
    """

    def __init__(self, alpha: float = 0.0) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
        self.alpha = alpha

    def forward(self, output: Any, target: Int[Tensor, "n 2"], progress: float = 0.0) -> Float[Tensor, ""]:  # noqa: ARG002
        """Return the mean loss; a row of the target is the bin, from 0, and 1 where the patient is censored, else 0.

        Raises
        ------
        ValueError
            If the target has another shape.
        """
        logits = output.logits
        if target.shape != (len(logits), 2):
            raise ValueError(
                f"target: expected shape {(len(logits), 2)}, bin and censorship, got {tuple(target.shape)}"
            )
        event, censored = target[:, :1], target[:, 1] == 1
        survives = F.logsigmoid(-logits).cumsum(1).gather(1, event).squeeze(1)  # up to and with bin y
        logit = logits.gather(1, event).squeeze(1)  # log h - log(1 - h)
        return -torch.where(censored, (1 - self.alpha) * survives, survives + logit).mean()
