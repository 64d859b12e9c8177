"""The selective scan beside plain loops and mambapy's parallel scan: forward and backward, 128 channels, 16 states."""

import subprocess
import sys

import pytest
import torch
from mambapy.pscan import pscan

from classact.nn import selective_scan

CHANNELS, STATES = 128, 16


def inputs(length):
    torch.manual_seed(0)
    u, delta = torch.randn(1, length, CHANNELS), 0.1 * torch.rand(1, length, CHANNELS)
    A = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    B, C = torch.randn(1, length, STATES), torch.randn(1, length, STATES)
    return [x.requires_grad_() for x in (u, delta, A, B, C)]


def indexed_loop(u, delta, A, B, C):
    """What one writes first; the gradient of every a[:, t] is as long as the sequence."""
    a = torch.exp(delta.unsqueeze(-1) * A)
    b = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
    h, y = torch.zeros_like(a[:, 0]), []
    for t in range(u.shape[1]):
        h = a[:, t] * h + b[:, t]
        y.append((h * C[:, t].unsqueeze(1)).sum(2))
    return torch.stack(y, 1)


def mambapy(u, delta, A, B, C):
    h = pscan(torch.exp(delta.unsqueeze(-1) * A), (delta * u).unsqueeze(-1) * B.unsqueeze(2))
    return (h @ C.unsqueeze(-1)).squeeze(3)


def unbound_loop(*args):
    return selective_scan(*args, backend="loop")


def chunked(*args):
    return selective_scan(*args, backend="chunked")


def step(scan, length):
    args = inputs(length)

    def run():
        y = scan(*args)
        return y, torch.autograd.grad(y, args, torch.ones_like(y))

    return run


@pytest.mark.parametrize(
    ("peer", "length", "limit", "rounds"),
    [(indexed_loop, 2048, 1 / 20, 1), (unbound_loop, 8192, 1, 3), (mambapy, 8192, 1, 9)],
)
def test_against(ratio, peer, length, limit, rounds):
    ours, theirs = step(chunked, length), step(peer, length)
    (y, gradients), (expected, their_gradients) = ours(), theirs()
    for a, b in zip((y, *gradients), (expected, *their_gradients), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    assert ratio(f"chunked / {peer.__name__}, length {length}", ours, theirs, rounds) <= limit


def test_time_is_linear_in_length(ratio):
    assert ratio("length 8192 / 1024", step(chunked, 8192), step(chunked, 1024)) <= 10


MEASURE = """
import torch
from bench_selective_scan import chunked, inputs, step

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

step(chunked, 1024)()
args = inputs(65536)
before = status("VmRSS")
y = chunked(*args)
gradients = torch.autograd.grad(y, args, torch.ones_like(y))
print((status("VmHWM") - before) / sum(x.nbytes for x in args))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_is_a_few_times_that_of_the_inputs(capsys, request):
    """Output, its gradient and those of the inputs included, in a process of its own."""
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=request.path.parent, capture_output=True, text=True, check=True
    )
    with capsys.disabled():
        print(f"\n  peak beyond the inputs: {float(answer.stdout):.2f} times their size")
    assert float(answer.stdout) < 4
