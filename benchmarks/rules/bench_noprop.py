"""A training step of NoProp-DT beside its twin's, its inference beside a loop without kept features, Heun's method.

Peers: torchdiffeq from PyPI, which is skipped where it is not installed; else the same thing written directly.
"""

import copy

import pytest
import torch

from classact.rules.noprop import EndToEndTwin, NoPropCT, NoPropDT, fit_noprop, integrate

SHAPE, N = (1, 28, 28), 128


def batch():
    torch.manual_seed(0)
    return torch.randn(N, *SHAPE), torch.arange(N) % 10


def test_one_pass_through_all_blocks(ratio):
    x, y = batch()
    network = NoPropDT.for_data(SHAPE, 10, T=5)
    twin = EndToEndTwin(copy.deepcopy(network))

    def ours():
        network.zero_grad()
        for t in range(1, 6):
            network.loss(x, y, t).backward()

    def theirs():
        twin.zero_grad()
        twin.loss(x, y).backward()

    assert ratio("NoProp-DT, 5 blocks in turn / back-propagation", ours, theirs, rounds=7) < 1.25


def test_blocks_in_two_processes(ratio):
    """Two workers, one thread each, beside one process; includes starting them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, y = batch()
    x, y = x.repeat(8, 1, 1, 1), y.repeat(8)
    start = NoPropDT.for_data(SHAPE, 10, T=4)
    models = {}

    def train(workers):
        models[workers] = fit_noprop(copy.deepcopy(start), x, y, epochs=2, workers=workers)

    train(1), train(2)
    for one, other in zip(models[1].parameters(), models[2].parameters(), strict=True):
        assert torch.equal(one, other)
    ratio("two processes / one", lambda: train(2), lambda: train(1), rounds=3)
    torch.set_num_threads(threads)


def test_features_are_computed_once(ratio):
    x, _ = batch()
    model = NoPropCT.for_data(SHAPE, 10).eval()
    z = torch.randn(N, 10)

    @torch.no_grad()
    def ours():
        return model(x, z, steps=10, solver="heun")

    @torch.no_grad()
    def theirs():
        from classact.rules.noprop import probability_flow

        def velocity(z, t):
            found = model.embedding.mixture(model.block(x, z, t))
            return probability_flow(found, z, *model.schedule.gamma(torch.tensor(t)))

        return model.head(integrate(velocity, z, 10, "heun"))

    torch.testing.assert_close(ours(), theirs(), atol=1e-4, rtol=1e-4)
    assert ratio("features once / in every evaluation", ours, theirs, rounds=5) < 0.4


def test_heun_beside_torchdiffeq(ratio):
    odeint = pytest.importorskip("torchdiffeq", reason="needs torchdiffeq").odeint
    x, _ = batch()
    model = NoPropCT.for_data((784,), 10).eval()
    features, start = model.block.encode(x.flatten(1)).detach(), torch.randn(N, 10)

    @torch.no_grad()
    def velocity(z, t):
        return model.block.denoise(features, z, float(t))

    def ours():
        return integrate(velocity, start, 30, "heun")

    def theirs():
        times, options = torch.tensor([0.0, 1.0]), {"step_size": 1 / 30}
        return odeint(lambda t, z: velocity(z, t), start, times, method="heun2", options=options)[-1]

    torch.testing.assert_close(ours(), theirs(), atol=1e-4, rtol=1e-4)
    assert ratio("Heun / torchdiffeq", ours, theirs, rounds=7) < 1.1
