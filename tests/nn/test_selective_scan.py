import sys
from types import ModuleType

import pytest
import torch

from classact.nn import selective_scan

BACKENDS = ("loop", "chunked")


def inputs(n=2, length=50, channels=5, states=3, dtype=torch.float32):
    """Everything the scan takes, as leaves: u, delta, A, B, C, D, z, delta_bias, initial_state."""
    torch.manual_seed(0)
    sizes = [(n, length, channels)] * 2 + [(channels, states)] + [(n, length, states)] * 2
    sizes += [(channels,), (n, length, channels), (channels,), (n, channels, states)]
    u, delta, A, *rest = (torch.randn(size, dtype=dtype) for size in sizes)
    return [x.requires_grad_() for x in (u, delta, -4 * A.abs(), *rest)]


def everything(leaves, backend, mask=None, weights=(1.0, 1.0)):
    """Output, last state, and the gradients of all leaves through both."""
    *args, state = leaves
    y, last = selective_scan(
        *args, delta_softplus=True, mask=mask, initial_state=state, return_last_state=True, backend=backend
    )
    torch.manual_seed(1)
    loss = weights[0] * (y * torch.randn_like(y)).sum() + weights[1] * (last * torch.randn_like(last)).sum()
    return y, last, *torch.autograd.grad(loss, leaves)


def assert_same(ours, expected, tolerance):
    """Equal up to `tolerance` of the largest value."""
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("softplus", "expected"), [(False, [0.8500, 0.5679, -6.1124]), (True, [1.5611, 0.7239, -6.4874])]
)
def test_by_hand(backend, softplus, expected):
    u, delta = torch.tensor([1.0, 2.0, -1.0]).view(1, 3, 1), torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1)
    B, C = torch.tensor([[[1, 0.5], [0, 1], [2, -1]]]), torch.tensor([[[1.0, 1], [2, 0], [1, -1]]])
    y, last = selective_scan(
        u,
        delta,
        torch.tensor([[-1.0, -2.0]]),
        B,
        C,
        torch.tensor([0.1]),
        delta_softplus=softplus,
        return_last_state=True,
        backend=backend,
    )
    torch.testing.assert_close(y.flatten(), torch.tensor(expected), atol=1e-4, rtol=0)
    if not softplus:
        torch.testing.assert_close(last.flatten(), torch.tensor([-3.9751, 2.0373]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "size",
    [
        (1, 1, 1, 1),
        (2, 1, 5, 3),
        (2, 63, 3, 2),
        (2, 130, 4, 3),  # two chunks
        (1, 1000, 5, 3),  # many, the last one shorter
        (1, 80, 200, 20),  # blocks
        (3, 35, 180, 32),  # groups of channels, the last one smaller
    ],
)
def test_chunks_give_what_the_loop_gives(size, dtype):
    leaves = inputs(*size, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_same(everything(leaves, "chunked"), everything(leaves, "loop"), tolerance)


def test_sizes_reach_every_way_of_cutting():
    from classact.nn.selective_scan import _layout

    layouts = [_layout(torch.empty(n, length, d), torch.empty(d, s)) for n, length, d, s in
               ((2, 130, 4, 3), (1, 1000, 5, 3), (1, 80, 200, 20), (3, 35, 180, 32))]  # fmt: skip
    assert [x.chunks for x in layouts] == [2, 15, 1, 1]
    assert layouts[1].chunks * layouts[1].length > 1000
    assert [len(x.blocks) > 1 for x in layouts] == [False, False, True, True]
    assert [len(x.groups) for x in layouts] == [1, 1, 1, 3]
    long = _layout(torch.empty(1, 10_000, 5), torch.empty(5, 3))
    assert long.chunks > 1 and len(long.blocks) > 1


@pytest.mark.parametrize("size", [(1, 24, 2, 2), (1, 130, 2, 1)])
def test_gradients_are_those_of_differences(size):
    leaves = inputs(*size, dtype=torch.float64)

    def scan(*args):
        return selective_scan(
            *args[:-1], delta_softplus=True, initial_state=args[-1], return_last_state=True, backend="chunked"
        )

    assert torch.autograd.gradcheck(scan, leaves, fast_mode=True)


def test_gradients_of_one_output_alone():
    leaves = inputs(length=130)
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        assert_same(everything(leaves, "chunked", None, weights), everything(leaves, "loop", None, weights), 1e-5)
    y = selective_scan(*leaves[:5], delta_softplus=True, backend="chunked")
    assert torch.autograd.grad(y.sum(), leaves[2])[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_rates_steps_and_inputs(backend):
    u, delta, A, B, C, D, *_ = inputs(length=130)
    delta = delta.abs()
    zero = torch.zeros_like
    _, last = selective_scan(u, delta, zero(A), B, C, return_last_state=True, backend=backend)
    torch.testing.assert_close(last, torch.einsum("nld,nls->nds", delta * u, B), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(selective_scan(u, zero(delta), A, B, C, D, backend=backend), D * u)
    torch.testing.assert_close(selective_scan(u, delta, A, zero(B), C, D, backend=backend), D * u)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 64, 149])
def test_last_state_continues_the_sequence(backend, cut):
    u, delta, A, B, C, D, z, bias, state = inputs(length=150)
    options = {"delta_softplus": True, "return_last_state": True, "backend": backend}
    whole, end = selective_scan(u, delta, A, B, C, D, z, bias, initial_state=state, **options)
    parts = []
    for t in (slice(0, cut), slice(cut, 150)):
        y, state = selective_scan(
            u[:, t], delta[:, t], A, B[:, t], C[:, t], D, z[:, t], bias, initial_state=state, **options
        )
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, end, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_nothing(backend):
    bare = inputs(n=1, length=90)
    real = torch.zeros(1, 140, dtype=torch.bool)
    real[0, torch.randperm(140)[:90]] = True
    padded = [x.detach().clone() for x in bare]
    for i in (0, 1, 3, 4, 6):
        padded[i] = torch.full((1, 140, bare[i].shape[2]), torch.nan)
        padded[i][real] = bare[i].detach()[0]
    leaves = [x.requires_grad_() for x in padded]
    *args, state = leaves
    y, last = selective_scan(
        *args, delta_softplus=True, mask=real, initial_state=state, return_last_state=True, backend=backend
    )
    expected, end = selective_scan(
        *bare[:-1], delta_softplus=True, initial_state=bare[-1], return_last_state=True, backend=backend
    )
    torch.testing.assert_close(y[real], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, end, atol=1e-5, rtol=1e-5)
    assert (y[~real] == 0).all()
    ours = torch.autograd.grad(y[real].square().sum() + last.sum(), leaves)
    theirs = torch.autograd.grad(expected.square().sum() + end.sum(), bare)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        along_time = i in (0, 1, 3, 4, 6)
        torch.testing.assert_close(a[real] if along_time else a, b[0] if along_time else b, atol=1e-4, rtol=1e-4)
        assert not along_time or (a[~real] == 0).all()


def test_long_and_fast_decaying_sequence():
    torch.manual_seed(0)
    u, B, C = torch.randn(1, 20_000, 2), torch.randn(1, 20_000, 2), torch.randn(1, 20_000, 2)
    leaves = [x.requires_grad_() for x in (u, torch.ones_like(u), torch.full((2, 2), -16.0), B, C)]
    y = selective_scan(*leaves, backend="chunked")
    gradients = torch.autograd.grad(y.square().sum(), leaves)
    assert all(x.isfinite().all() for x in (y, *gradients))
    with torch.no_grad():
        torch.testing.assert_close(y, selective_scan(*leaves, backend="loop"), atol=1e-5, rtol=1e-5)


def test_agrees_with_mambapy():
    mamba = pytest.importorskip("mambapy.mamba")
    u, delta, A, B, C, D, *_ = leaves = inputs(length=100)
    block = mamba.MambaBlock(mamba.MambaConfig(d_model=4, n_layers=1))
    expected = block.selective_scan(u, delta.abs(), A, B, C, D)
    for backend in BACKENDS:
        y = selective_scan(u, delta.abs(), A, B, C, D, backend=backend)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        ours, theirs = (torch.autograd.grad(t.sin().sum(), leaves[:6], retain_graph=True) for t in (y, expected))
        assert_same(ours, theirs, 1e-5)


def test_layout_in_memory_does_not_matter():
    u, delta, A, B, C, *_ = inputs(length=130)
    expected = selective_scan(u, delta, A, B, C)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (u, delta, B, C)]
    u, delta, B, C = strided
    torch.testing.assert_close(selective_scan(u, delta, A, B, C), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_keep_their_precision_under_autocast(backend):
    leaves = inputs(length=100)
    half = [x.detach().bfloat16().requires_grad_() if i in (0, 1, 3, 4, 6) else x for i, x in enumerate(leaves)]
    with torch.autocast("cpu", torch.bfloat16):
        y, last, *grads = everything(half, backend)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert [g.dtype for g in grads] == [x.dtype for x in half]
    exact = [x.detach().double().requires_grad_() for x in half]
    _, expected, *_ = everything(exact, "loop")
    torch.testing.assert_close(last.double(), expected, atol=1e-5, rtol=1e-5)
    assert all(g.isfinite().all() for g in grads)


def test_keeps_only_what_is_linear_in_length():
    kept = []
    leaves = inputs(n=1, length=600, channels=64, states=16)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        selective_scan(*leaves[:5], backend="chunked")
    assert sum(x.numel() for x in kept) < 4 * leaves[0].numel()


@pytest.mark.bare
def test_operator_is_registered_properly():
    u, delta, A, B, C, *_, state = inputs(length=130)
    torch.library.opcheck(torch.ops.classact.selective_scan.default, (u, delta.detach().abs(), A, B, C, state))


@pytest.mark.bare
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend):
    torch.compiler.reset()
    compiled = torch.compile(everything_forward, backend="aot_eager", fullgraph=True)
    leaves = inputs(length=6)
    mask = torch.arange(6).expand(2, 6) < torch.tensor([[6], [4]])
    results = []
    for function in (compiled, everything_forward):
        y, last = function(leaves, mask, backend)
        results.append((y, last, *torch.autograd.grad(y.square().sum() + last.sum(), leaves)))
    assert_same(*results, 1e-5)
    torch.compiler.reset()


def everything_forward(leaves, mask, backend):
    *args, state = leaves
    return selective_scan(
        *args, delta_softplus=True, mask=mask, initial_state=state, return_last_state=True, backend=backend
    )


class Scan(torch.nn.Module):
    def forward(self, u, delta, A, B, C):
        return selective_scan(u, delta, A, B, C, delta_softplus=True)


@pytest.mark.bare
def test_exports():
    args = tuple(x.detach() for x in inputs(length=130)[:5])
    torch.testing.assert_close(torch.export.export(Scan(), args).module()(*args), Scan()(*args))


def test_kernel_gets_channels_before_time(monkeypatch):
    def selective_scan_fn(u, delta, A, B, C):
        y = selective_scan(*(x.transpose(1, 2) for x in (u, delta)), A, *(x.transpose(1, 2) for x in (B, C)))
        return y.transpose(1, 2)

    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    *args, _ = inputs()
    mask = torch.arange(50).expand(2, 50) < torch.tensor([[50], [20]])
    y = selective_scan(*args, delta_softplus=True, mask=mask, backend="cuda")
    torch.testing.assert_close(y, selective_scan(*args, delta_softplus=True, mask=mask, backend="loop"))


@pytest.mark.bare
def test_kernel_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with pytest.raises(ImportError, match="backend: 'cuda' needs the package mamba-ssm"):
        selective_scan(*inputs()[:5], backend="cuda")


def ones(*size):
    return torch.ones(size)


@pytest.mark.bare
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": ones(2, 4)}, r"u: expected shape \(N, L, Di\), none of them 0, got \(2, 4\)"),
        ({"u": ones(2, 0, 3)}, r"u: expected shape \(N, L, Di\), none of them 0, got \(2, 0, 3\)"),
        ({"u": ones(2, 4, 3).long()}, "u: expected a floating-point tensor, got torch.int64"),
        ({"delta": ones(2, 4, 1)}, r"delta: expected shape \(2, 4, 3\), got \(2, 4, 1\)"),
        ({"A": -ones(2, 5)}, r"A: expected shape \(3, S\) with S > 0, got \(2, 5\)"),
        ({"A": -ones(3, 0)}, r"A: expected shape \(3, S\) with S > 0, got \(3, 0\)"),
        ({"A": ones(3, 5)}, "A: expected no positive rate, got 1.0"),
        ({"B": ones(2, 4, 1)}, r"B: expected shape \(2, 4, 5\), got \(2, 4, 1\)"),
        ({"C": ones(2, 1, 5)}, r"C: expected shape \(2, 4, 5\), got \(2, 1, 5\)"),
        ({"D": ones(1)}, r"D: expected shape \(3,\), got \(1,\)"),
        ({"z": ones(4, 3)}, r"z: expected shape \(2, 4, 3\), got \(4, 3\)"),
        ({"delta_bias": ones(4)}, r"delta_bias: expected shape \(3,\), got \(4,\)"),
        ({"initial_state": ones(2, 5, 3)}, r"initial_state: expected shape \(2, 3, 5\), got \(2, 5, 3\)"),
        ({"mask": ones(2, 4)}, r"mask: expected shape \(2, 4\) and dtype bool, got \(2, 4\) and torch.float32"),
        ({"mask": ones(4, 2).bool()}, r"mask: expected shape \(2, 4\) and dtype bool, got \(4, 2\) and torch.bool"),
        ({"backend": "fast"}, "backend: expected 'auto', 'loop', 'chunked' or 'cuda', got 'fast'"),
        ({"backend": "cuda", "return_last_state": True}, "backend: 'cuda' knows neither initial_state nor"),
    ],
)
def test_bad_input(changes, message):
    good = {"u": ones(2, 4, 3), "delta": ones(2, 4, 3), "A": -ones(3, 5), "B": ones(2, 4, 5), "C": ones(2, 4, 5)}
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**good, **changes})


def test_importing_the_module_first_leaves_the_function_in_the_package():
    import subprocess

    code = "import classact.nn.selective_scan; from classact.nn import selective_scan; assert callable(selective_scan)"
    subprocess.run([sys.executable, "-c", code], check=True)
