"""DSMIL, CLAM-SB and TransMIL beside torchmil's: one training step on a bag of 10,000 x 1,024 (TransMIL: 2,500)."""

import torch
import torchmil.models

from classact.mil import CLAMSB, DSMIL, BagCrossEntropy, CLAMLoss, DSMILLoss, TransMIL, smooth_top1_svm

K, D = 10_000, 1024


class SmoothSVM(torch.nn.Module):
    """Ours in torchmil's place: torchmil passes targets as (B, 1), which its own spreads to (B, B, 2) or refuses."""

    def forward(self, logits, targets):
        return smooth_top1_svm(logits, targets.squeeze(-1).long()).mean()


def step(model, loss, x, y):
    model(x)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def run():
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()

    return run


def ours(model, loss, k=K):
    return step(model, lambda m, a, b: loss(m(a), b), torch.randn(1, k, D), torch.ones(1, dtype=torch.long))


def peer(model, k=K):
    """All terms of torchmil's own loss."""
    return step(model, lambda m, a, b: sum(m.compute_loss(b, a)[1].values()), torch.randn(1, k, D), torch.ones(1))


def feature(bias):
    return torch.nn.Sequential(torch.nn.Linear(D, 512, bias=bias), torch.nn.ReLU())


def test_dsmil_step(ratio):
    """Ours pools once for each of two classes, torchmil's once."""
    theirs = torchmil.models.DSMIL((D,), 128, nonlinear_q=True, feat_ext=feature(bias=False))
    assert ratio("DSMIL / torchmil DSMIL", ours(DSMIL(D, 2), DSMILLoss()), peer(theirs)) < 1.3


def test_clam_step(ratio):
    theirs = torchmil.models.CLAM_SB((D,), 256, k_sample=8, gated=True, feat_ext=feature(bias=True))
    theirs.inst_loss_fn = SmoothSVM()
    model = CLAMSB(D, 2, dropout=0.0)
    assert ratio("CLAM-SB / torchmil CLAM-SB", ours(model, CLAMLoss(subtyping=True)), peer(theirs)) < 1.1


def test_transmil_step(ratio):
    """Torchmil's has no convolution over the values (length 33), which ours, as the published one, pays for."""
    theirs = torchmil.models.TransMIL((D,), att_dim=512, n_heads=8, feat_ext=feature(bias=True))
    model = TransMIL(D, 2, dim=512)
    assert ratio("TransMIL / torchmil TransMIL", ours(model, BagCrossEntropy(), 2_500), peer(theirs, 2_500)) < 1.1
