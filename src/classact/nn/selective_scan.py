"""Selective scan: the recurrence of Mamba, with transitions that depend on the input.

Gu, Dao: Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023, https://arxiv.org/abs/2312.00752,
algorithm 2. Code of the authors: state-spaces/mamba.

Every channel c of a sequence drives S states of its own, h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, and is read
from them, y_t = C_t h_t + D u_t.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

STEP, BLOCK = 2**13, 2**17  # states that advance together, and in a block of time steps: about


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_last_state: Literal[False] = False,
    backend: Literal["auto", "loop", "chunked", "cuda"] = "auto",
) -> Tensor: ...
@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    return_last_state: Literal[True],
    backend: Literal["auto", "loop", "chunked", "cuda"] = "auto",
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Float[Tensor, "n l d"],
    delta: Float[Tensor, "n l d"],
    A: Float[Tensor, "d s"],
    B: Float[Tensor, "n l s"],
    C: Float[Tensor, "n l s"],
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "n l d"] | None = None,
    delta_bias: Float[Tensor, " d"] | None = None,
    delta_softplus: bool = False,
    mask: Bool[Tensor, "n l"] | None = None,
    initial_state: Float[Tensor, "n d s"] | None = None,
    return_last_state: bool = False,
    backend: Literal["auto", "loop", "chunked", "cuda"] = "auto",
) -> Float[Tensor, "n l d"] | tuple[Float[Tensor, "n l d"], Float[Tensor, "n d s"]]:
    """Run the recurrence over N sequences of length L, Di channels with S states each.

    Note the layout: channels last, where the authors' CUDA kernel has them before the time steps.

    Parameters
    ----------
    u : (N, L, Di)
        Input.
    delta : (N, L, Di)
        Step sizes, not negative after bias and softplus.
    A : (Di, S)
        Rates, negative or zero. The sign is checked on the CPU in eager mode only: on other devices the check would
        have to wait for the values, and in a compiled graph there are none.
    B, C : (N, L, S)
        How the input enters the states, and how they are read.
    D : (Di,), optional
        Weight of the input in the output.
    z : (N, L, Di), optional
        Gate: the output is multiplied by SiLU(z).
    delta_bias : (Di,), optional
        Added to `delta`.
    delta_softplus : bool
        Pass `delta`, after the bias, through softplus.
    mask : (N, L) bool, optional
        True = real. A padded step leaves the states as they are whatever the other arguments hold there; its output
        is 0.
    initial_state : (N, Di, S), optional
        States before the first step; 0 by default.
    return_last_state : bool
        Return the states after the last step, too: as the next call's `initial_state` they continue the sequence.
    backend : {"auto", "loop", "chunked", "cuda"}
        ``"loop"`` takes one step after the other under autograd, the plain definition. ``"chunked"`` walks through
        blocks of time steps that stay in the cache, and recomputes the states in the backward pass: it keeps
        O(L Di) numbers. ``"cuda"`` is the kernel of the package mamba-ssm, which knows neither `initial_state` nor
        gradients of the last state. ``"auto"`` is that kernel where it can do what is asked, else ``"chunked"``.

    Returns
    -------
    (N, L, Di), or that and (N, Di, S)
        Output in the dtype of `u`, and the last states. States are float32, or float64 if `u` is, autocast or not.

    Raises
    ------
    ValueError
        If a shape or dtype does not fit, L or another size is 0, `A` is positive somewhere, or the backend is unknown
        or cannot do what is asked.
    ImportError
        If `backend` is ``"cuda"`` and mamba-ssm cannot be imported.

    Examples
    --------
    >>> import torch
    >>> u, delta = torch.tensor([[[1.0], [2.0], [-1.0]]]), torch.tensor([[[0.5], [1.0], [2.0]]])
    >>> A, B, C = torch.tensor([[-1.0]]), torch.ones(1, 3, 1), torch.ones(1, 3, 1)
    >>> y, state = selective_scan(u, delta, A, B, C, return_last_state=True)
    >>> y.flatten()
    tensor([ 0.5000,  2.1839, -1.7044])
    >>> state
    tensor([[[-1.7044]]])
    """
    _check(u, delta, A, B, C, D, z, delta_bias, mask, initial_state)
    if backend not in ("auto", "loop", "chunked", "cuda"):
        raise ValueError(f"backend: expected 'auto', 'loop', 'chunked' or 'cuda', got {backend!r}")
    stateful = initial_state is not None or return_last_state
    if backend == "cuda" and stateful:
        raise ValueError("backend: 'cuda' knows neither initial_state nor return_last_state, expected 'chunked'")
    out_dtype, precise = u.dtype, torch.promote_types(u.dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        u, delta, A, B, C = (x.to(precise) for x in (u, delta, A, B, C))
        z = None if z is None else z.to(precise)
        if mask is not None:
            padded = ~mask.unsqueeze(-1)
            u, delta, B, C = (x.masked_fill(padded, 0) for x in (u, delta, B, C))
            z = None if z is None else z.masked_fill(padded, 0)
        if delta_bias is not None:
            delta = delta + delta_bias.to(precise)
        if delta_softplus:
            delta = F.softplus(delta)
        if mask is not None:
            delta = delta.masked_fill(padded, 0)  # again, after bias and softplus
        if initial_state is None:
            initial_state = u.new_zeros(u.shape[0], *A.shape)
        initial_state = initial_state.to(precise)
        if backend == "loop":
            y, last_state = _loop(u, delta, A, B, C, initial_state)
        elif backend == "cuda" or (backend == "auto" and not stateful and u.is_cuda and _has_kernel(precise)):
            y, last_state = _kernel(u, delta, A, B, C), initial_state
        else:
            y, last_state, _ = _chunked(u, delta, A, B, C, initial_state)
        if D is not None:
            y = y + D.to(precise) * u
        if z is not None:
            y = y * F.silu(z)
    y = y.to(out_dtype)
    return (y, last_state) if return_last_state else y


def _loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    h, y = initial_state, []
    # autograd of u[:, t] would fill a gradient of full length for every t
    for u_t, delta_t, B_t, C_t in zip(*(x.unbind(1) for x in (u, delta, B, C)), strict=True):
        h = torch.exp(delta_t.unsqueeze(2) * A) * h + (delta_t * u_t).unsqueeze(2) * B_t.unsqueeze(1)
        y.append((h * C_t.unsqueeze(1)).sum(2))
    return torch.stack(y, 1), h


def _has_kernel(dtype: torch.dtype) -> bool:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # noqa: F401
    except ImportError:
        return False
    return dtype == torch.float32


def _kernel(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        raise ImportError("backend: 'cuda' needs the package mamba-ssm; 'chunked' runs without it") from error
    y: Tensor = selective_scan_fn(*(x.transpose(1, 2) for x in (u, delta)), A, *(x.transpose(1, 2) for x in (B, C)))
    return y.transpose(1, 2)


# The chunked scan. A block is a few time steps of a group of channels, small enough for all its states to stay in the
# cache, (T, N, K, S, D): what can be done for its steps at once is done at once, h_t += a_t h_{t-1} alone step by step.
# K is 1, unless a time step has so few states that time is cut into K chunks, which advance in parallel: a first walk
# from 0 finds the end of every chunk, and with the decay over the chunk follows where the next one starts. Exponents
# are never positive and nothing is ever divided, so nothing overflows.


class _Layout(NamedTuple):
    chunks: int
    length: int  # of a chunk
    blocks: list[slice]  # time steps in a chunk
    groups: list[slice]  # channels


def _layout(u: Tensor, A: Tensor) -> _Layout:
    (n, length, channels), states = u.shape, A.shape[1]
    width = min(channels, max(16, STEP // (n * states)))
    step = n * states * width
    chunks = 1 if 4 * step >= STEP else max(1, min(STEP // step, length // 64))
    chunk = -(-length // chunks)
    # the states before every block are kept: with S steps and more to a block they are no more than u
    steps = max(states, BLOCK // (step * chunks))
    blocks = [slice(t, min(t + steps, chunk)) for t in range(0, chunk, steps)]
    groups = [slice(c, min(c + width, channels)) for c in range(0, channels, width)]
    return _Layout(chunks, chunk, blocks, groups)


def _cut(x: Tensor, layout: _Layout) -> Tensor:
    """(N, L, D) to (Q, N, K, D); zeros fill up the last chunk, and leave its states as they are."""
    missing = layout.chunks * layout.length - x.shape[1]
    x = F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    return x.unflatten(1, (layout.chunks, layout.length)).movedim(2, 0)


def _join(x: Tensor, length: int) -> Tensor:
    return x.movedim(0, 2).flatten(1, 2)[:, :length].contiguous()


def _transitions(delta: Tensor, A: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mul(delta.unsqueeze(-2), A / math.log(2), out=out).exp2_()  # much faster than exp on a CPU


def _links(to: Tensor, factor: Tensor, origin: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Views of every step, made once for all blocks: making them takes as long as the step itself."""
    return list(zip(to.unbind(0), factor.unbind(0), origin.unbind(0), strict=True))


def _recur(links: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
    for to, factor, origin in links:
        to.addcmul_(factor, origin)


def _carry(start: Tensor, ends: Tensor, decay: Tensor) -> Tensor:
    """Where the chunks start that end at `ends` (N, K, S, D) when started from 0."""
    starts = [start]
    for end, factor in zip(ends.unbind(1)[:-1], decay.unbind(1)[:-1], strict=True):
        starts.append(end + factor * starts[-1])
    return torch.stack(starts, 1)


@torch.library.custom_op("classact::selective_scan", mutates_args=())
def _chunked(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last states, and the states before every block, from which the backward pass computes the others."""
    layout, length = _layout(u, A), u.shape[1]
    kept = u.new_empty(len(layout.blocks), u.shape[0], layout.chunks, A.shape[1], u.shape[2])
    last_state = u.new_empty(initial_state.shape)
    delta, x, B, C = (_cut(t, layout) for t in (delta, delta * u, B, C))
    y = torch.empty_like(delta)
    for c in layout.groups:
        start = initial_state[:, c].transpose(1, 2)
        last = _forward(layout, delta[..., c], x[..., c], A[c].t(), B, C, start, y[..., c], kept[..., c])
        last_state[:, c] = last.transpose(1, 2)
    return _join(y, length), last_state, kept


def _forward(
    layout: _Layout,
    delta: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    start: Tensor,
    y: Tensor,
    kept: Tensor,
) -> Tensor:
    """Fill `y` and `kept` for a group of channels, and return the last states (N, S, D)."""
    shape, A = kept.shape[1:], A.contiguous()
    a, h = (kept.new_empty(layout.blocks[0].stop + more, *shape) for more in (0, 1))
    links = _links(h[1:], a, h[:-1])

    def advance(t: slice) -> Tensor:
        """Fill h[1:], the states of a block, from h[0], those before it."""
        size = t.stop - t.start
        _transitions(delta[t], A, out=a[:size])
        torch.mul(x[t].unsqueeze(3), B[t].unsqueeze(4), out=h[1 : size + 1])
        _recur(links[:size])
        return h[1 : size + 1]

    if layout.chunks == 1:
        h[0] = start.unsqueeze(1)
    else:
        h[0] = 0
        for t in layout.blocks:
            h[0] = advance(t)[-1]
        h[0] = _carry(start, h[0], _transitions(delta.sum(0), A))
    for i, t in enumerate(layout.blocks):
        kept[i] = h[0]
        states = advance(t)
        y[t] = torch.mul(states, C[t].unsqueeze(4), out=a[: len(states)]).sum(3)
        h[0] = states[-1]
    return h[0, :, -1]


@_chunked.register_fake
def _(
    u: Tensor,
    delta: Tensor,  # noqa: ARG001
    A: Tensor,
    B: Tensor,  # noqa: ARG001
    C: Tensor,  # noqa: ARG001
    initial_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = _layout(u, A)
    kept = u.new_empty(len(layout.blocks), u.shape[0], layout.chunks, A.shape[1], u.shape[2])
    return u.new_empty(u.shape), u.new_empty(initial_state.shape), kept


@torch.library.custom_op("classact::selective_scan_backward", mutates_args=())
def _chunked_backward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, kept: Tensor, grad_y: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout, length = _layout(u, A), u.shape[1]
    grad_A, grad_start = A.new_empty(A.shape), grad_last.new_empty(grad_last.shape)
    u, delta, x, B, C, grad_y = (_cut(t, layout) for t in (u, delta, delta * u, B, C, grad_y))
    grad_u, grad_delta, grad_B, grad_C = (torch.zeros_like(t) for t in (u, delta, B, C))
    for c in layout.groups:
        rates, first = _reverse(
            layout,
            *(u[..., c], delta[..., c], x[..., c], kept[..., c], grad_y[..., c], grad_u[..., c], grad_delta[..., c]),
            *(A[c].t(), B, C, grad_B, grad_C),
            grad_last[:, c].transpose(1, 2),
        )
        grad_A[c], grad_start[:, c] = rates.t(), first.transpose(1, 2)
    grad_u, grad_delta, grad_B, grad_C = (_join(t, length) for t in (grad_u, grad_delta, grad_B, grad_C))
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_start


def _reverse(
    layout: _Layout,
    u: Tensor,
    delta: Tensor,
    x: Tensor,
    kept: Tensor,
    grad_y: Tensor,
    grad_u: Tensor,
    grad_delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    grad_B: Tensor,
    grad_C: Tensor,
    grad_last: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fill or add to the gradients of a group of channels; return those of A (S, D) and of the start (N, S, D).

    All of what h_t does is in g_t = C_t grad_y_t + a_{t+1} g_{t+1}, which is walked through from the end.
    """
    shape, A = (layout.blocks[0].stop, *kept.shape[1:]), A.contiguous()
    a, g, rates = kept.new_empty(shape), kept.new_empty(shape), kept.new_zeros(shape)
    h = kept.new_empty(shape[0] + 1, *shape[1:])
    links, links_back = _links(h[1:], a, h[:-1]), _links(g[:-1], a[1:], g[1:])

    def retreat(t: slice, later: Tensor) -> Tensor:
        """Fill g, given what later blocks add to its last step; return what it adds to the block before."""
        size = t.stop - t.start
        _transitions(delta[t], A, out=a[:size])
        torch.mul(grad_y[t].unsqueeze(3), C[t].unsqueeze(4), out=g[:size])
        g[size - 1] += later
        _recur(reversed(links_back[: size - 1]))
        return a[0] * g[0]

    if layout.chunks == 1:
        later = grad_last.unsqueeze(1)
    else:
        later = torch.zeros_like(g[0])
        for t in reversed(layout.blocks):
            later = retreat(t, later)
        later = _carry(grad_last, later.flip(1), _transitions(delta.sum(0), A).flip(1)).flip(1)
    for i, t in reversed(list(enumerate(layout.blocks))):
        later = retreat(t, later)
        size = t.stop - t.start
        a_t, g_t, before, states = a[:size], g[:size], h[:size], h[1 : size + 1]
        h[0] = kept[i]
        torch.mul(x[t].unsqueeze(3), B[t].unsqueeze(4), out=states)
        _recur(links[:size])
        exponent = a_t.mul_(before).mul_(g_t)  # the gradient of delta A
        rates[:size].addcmul_(exponent, delta[t].unsqueeze(3))
        grad_exponent = exponent.mul_(A).sum(3)
        # from here on `a` is room for products
        grad_C[t] += torch.mul(states, grad_y[t].unsqueeze(3), out=a_t).sum(4)
        grad_B[t] += torch.mul(g_t, x[t].unsqueeze(3), out=a_t).sum(4)
        grad_x = torch.mul(g_t, B[t].unsqueeze(4), out=a_t).sum(3)
        grad_delta[t] = grad_exponent.addcmul_(u[t], grad_x)
        grad_u[t] = grad_x.mul_(delta[t])
    return rates.sum((0, 1, 2)), later[:, 0]


@_chunked_backward.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    kept: Tensor,  # noqa: ARG001
    grad_y: Tensor,  # noqa: ARG001
    grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (u, delta, A, B, C, grad_last))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-1], output[2])


def _backward(ctx: Any, grad_y: Tensor, grad_last: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return _chunked_backward(*ctx.saved_tensors, grad_y, grad_last)


_chunked.register_autograd(_backward, setup_context=_save)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    mask: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    if u.ndim != 3 or 0 in u.shape:
        raise ValueError(f"u: expected shape (N, L, Di), none of them 0, got {tuple(u.shape)}")
    n, length, channels = u.shape
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"A: expected shape ({channels}, S) with S > 0, got {tuple(A.shape)}")
    states = A.shape[1]
    expected = {
        "delta": (delta, (n, length, channels)),
        "B": (B, (n, length, states)),
        "C": (C, (n, length, states)),
        "D": (D, (channels,)),
        "z": (z, (n, length, channels)),
        "delta_bias": (delta_bias, (channels,)),
        "initial_state": (initial_state, (n, channels, states)),
    }
    for name, (x, shape) in {"u": (u, u.shape), "A": (A, A.shape), **expected}.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    if mask is not None and (mask.shape != (n, length) or mask.dtype != torch.bool):
        raise ValueError(f"mask: expected shape {(n, length)} and dtype bool, got {tuple(mask.shape)} and {mask.dtype}")
    if A.is_cpu and not torch.compiler.is_compiling() and (A > 0).any():
        raise ValueError(f"A: expected no positive rate, got {A.detach().max().item()}")
