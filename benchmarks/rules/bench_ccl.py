"""A training step of every rule beside back-propagation through the same network, and the memory a step keeps.

Peer: back-propagation of a plain nn.Sequential, with the same forward weights, batch and optimiser.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from classact.rules.ccl import CCLLoss, CCLNetwork, ccl_losses
from classact.rules.feedback_alignment import DirectFeedbackAlignment, FeedbackAlignment, backprop_losses
from classact.rules.target_propagation import DifferenceTargetPropagation

N, HIDDEN, RATE = 256, (256,) * 5, 1e-4
KINDS = {
    "ccl": CCLNetwork,
    "fa": FeedbackAlignment,
    "dfa": DirectFeedbackAlignment,
    "dtp": DifferenceTargetPropagation,
}
LIMITS = {"ccl": 1.6, "fa": 1.3, "dfa": 1.3, "dtp": 4.0}


def batch():
    torch.manual_seed(0)
    return torch.randn(N, 784), torch.arange(N) % 10


def losses_of(rule, model, x, y):
    if rule == "ccl":
        return ccl_losses(model, CCLLoss(), x, y)
    return backprop_losses(model, x, y) if rule == "fa" else model.losses(x, y)


def plain(model):
    layers = []
    for weight in model.forward_parameters():
        layer = nn.Linear(*weight.shape[::-1], bias=False)
        layer.weight.data = weight.detach().clone()
        layers += [layer, nn.ELU()]
    return nn.Sequential(*layers[:-1])


def step(losses, parameters):
    optimizer = torch.optim.SGD(parameters, RATE)

    def run():
        optimizer.zero_grad()
        for loss in losses():
            loss.backward()
        optimizer.step()

    return run


@pytest.mark.parametrize("rule", KINDS)
def test_step_beside_back_propagation(ratio, rule):
    x, y = batch()
    model = KINDS[rule].for_data((784,), 10, hidden=HIDDEN)
    peer = plain(model)
    torch.testing.assert_close(model(x), peer(x))
    ours = step(lambda: losses_of(rule, model, x, y), model.parameters())
    theirs = step(lambda: [F.cross_entropy(peer(x), y)], peer.parameters())
    assert ratio(f"step of {rule} / back-propagation", ours, theirs) < LIMITS[rule]


def test_pair_by_pair_beside_the_sum(ratio):
    x, y = batch()
    model, loss = CCLNetwork.for_data((784,), 10, hidden=HIDDEN), CCLLoss()
    grads = []
    for parallel in (True, False):
        model.zero_grad()
        for part in ccl_losses(model, loss, x, y, parallel):
            part.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    ours = step(lambda: ccl_losses(model, loss, x, y), model.parameters())
    theirs = step(lambda: ccl_losses(model, loss, x, y, parallel_update=False), model.parameters())
    assert ratio("pair by pair / one backward of the sum", ours, theirs) < 1.2


class Kept:
    """Bytes of tensors that graphs hold for their backward pass, now and at most."""

    now = most = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Kept.now += tensor.nbytes
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self):
        Kept.now -= self.tensor.nbytes


def most(losses, weights):
    Kept.now = Kept.most = 0
    known = {p.data_ptr() for p in weights}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor if tensor.data_ptr() in known else Kept(tensor),
        lambda kept: kept.tensor if isinstance(kept, Kept) else kept,
    ):
        for loss in losses():
            loss.backward()
    return Kept.most / 2**20


def test_memory_beside_back_propagation(capsys):
    x, y = batch()
    model = CCLNetwork.for_data((784,), 10, hidden=HIDDEN)
    ours = most(lambda: ccl_losses(model, CCLLoss(), x, y), model.parameters())
    together = most(lambda: ccl_losses(model, CCLLoss(), x, y, parallel_update=False), model.parameters())
    backprop = most(lambda: backprop_losses(model, x, y), model.parameters())
    with capsys.disabled():
        print(f"\n  kept for the backward pass: pair by pair {ours:.2f} MB, the sum {together:.2f} MB,", end=" ")
        print(f"back-propagation {backprop:.2f} MB")
    assert ours < 0.7 * backprop
