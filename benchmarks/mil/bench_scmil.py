"""The contrastive loss beside that of pytorch-metric-learning, and a training step of SC-MIL beside ABMIL's."""

import torch
from pytorch_metric_learning.losses import SupConLoss

from classact.mil import ABMIL, BagCrossEntropy
from classact.mil.scmil import SCMIL, SCMILLoss, supervised_contrastive_loss

B, D = 256, 128
BAGS, K, WIDTH = 16, 1000, 384


def test_contrastive_loss(ratio):
    torch.manual_seed(0)
    z, target = torch.randn(B, D, requires_grad=True), torch.arange(B) % 4
    peer = SupConLoss(0.1)

    def run(loss):
        z.grad = None
        value = loss()
        value.backward()
        return value.detach(), z.grad

    def ours():
        return run(lambda: supervised_contrastive_loss(z, target, 0.1))

    def theirs():
        return run(lambda: peer(z, target))

    torch.testing.assert_close(ours(), theirs(), atol=1e-5, rtol=1e-4)
    assert ratio("contrastive loss / pytorch-metric-learning", ours, theirs, rounds=101) < 1


def step(model, loss):
    x, target = torch.randn(BAGS, K, WIDTH), torch.arange(BAGS) % 2

    def run():
        model.zero_grad()
        loss(model(x), target, 0.5).backward()

    return run


def test_two_views_embed_the_instances_once(ratio):
    torch.manual_seed(0)
    plain = step(ABMIL(WIDTH, 2, gated=True), BagCrossEntropy())
    two_views = step(SCMIL(WIDTH, 2, views=2, instances=256), SCMILLoss())
    assert ratio("SC-MIL with two views / gated ABMIL", two_views, plain, rounds=21) < 1.3
