"""Normalised softmax beside a linear layer, that of pytorch-metric-learning, and triplets of all pairs of a batch."""

import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss, TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import nn
from torch.nn import functional as F

from classact.discover.hypersphere import HypersphereClassifier, NormalizedLinear

N, D, K = 1024, 512, 1000


def step(parameters, loss):
    def run():
        for parameter in parameters:
            parameter.grad = None
        value = loss()
        value.backward()
        return value.detach()

    return run


def test_head(ratio):
    torch.manual_seed(0)
    x, y = torch.randn(N, D, requires_grad=True), torch.arange(N) % K
    head, linear, theirs = NormalizedLinear(D, K), nn.Linear(D, K), NormalizedSoftmaxLoss(K, D, temperature=0.1)
    theirs.W.data.copy_(head.weight.T)
    ours = step([x, *head.parameters()], lambda: F.cross_entropy(head(x), y))
    peer = step([x, *theirs.parameters()], lambda: theirs(x, y))
    torch.testing.assert_close(ours(), peer(), atol=1e-5, rtol=1e-5)
    assert ratio("normalised softmax / pytorch-metric-learning", ours, peer, rounds=31) < 1.2
    plain = step([x, *linear.parameters()], lambda: F.cross_entropy(linear(x), y))
    assert ratio("normalised softmax / linear layer", ours, plain, rounds=31) < 1.35


def test_training_step_beside_triplets(ratio):
    torch.manual_seed(0)
    x, y, batch = torch.randn(256, D), torch.arange(256) % 32, 256
    network = nn.Sequential(nn.Linear(D, 512), nn.ReLU(), nn.Linear(512, 64, bias=False))
    head, triplets = NormalizedLinear(64, 32), TripletMarginLoss(0.2)
    mined = TripletMarginMiner(0.2, "semihard")
    ours = step([*network.parameters(), *head.parameters()], lambda: F.cross_entropy(head(network(x)), y))

    def triplet_loss():
        z = network(x)
        return triplets(z, y, mined(z, y))

    assert len(x) == batch
    assert ratio("step of normalised softmax / of mined triplets", ours, step(network.parameters(), triplet_loss)) < 1


def test_adding_a_class(ratio):
    torch.manual_seed(0)
    model = HypersphereClassifier(nn.Linear(D, 128, bias=False), 128, 900)
    x, added = torch.randn(20, D), torch.randn(20, D)
    model.set_prototypes([(torch.randn(900, D), torch.arange(900))])
    batches = [(torch.randn(900, D), torch.arange(900))]

    def add():
        model.remove_class(model.add_class(added))

    def again():
        model.set_prototypes(batches)
        add()

    before = model.head(model.embed(x))
    add()
    torch.testing.assert_close(model.head(model.embed(x)), before)
    assert ratio("adding a class / all prototypes anew", add, again) < 1
