"""What the entropy term costs: a training step of gated ABMIL with and without it, and beside ACMIL."""

import torch

from classact.mil import ABMIL, ACMIL, ACMILLoss, AttentionEntropy, BagCrossEntropy

K, D = 10_000, 384


def step(model, loss):
    x, y = torch.randn(1, K, D), torch.ones(1, dtype=torch.long)

    def run():
        model.zero_grad()
        loss(model(x), y).backward()

    return run


def test_the_term_is_nearly_free(ratio):
    torch.manual_seed(0)
    plain = step(ABMIL(D, 2, gated=True), BagCrossEntropy())
    with_term = step(ABMIL(D, 2, gated=True), BagCrossEntropy() + AttentionEntropy(0.1))
    assert ratio("ABMIL with AEM / without", with_term, plain, rounds=41) < 1.05
    assert ratio("ABMIL with AEM / ACMIL", with_term, step(ACMIL(D, 2), ACMILLoss()), rounds=21) < 1.1
