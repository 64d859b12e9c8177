"""A step of Cr-KD beside the same step without distillation, and pseudo-labels beside one head and view at a time."""

import torch
from torch import nn

from classact.discover.crkd import CrKD, CrKDLoss, KnownClassifier, discovery_loss, sinkhorn_knopp

K, U, BATCH, WIDTH = 50, 50, 256, 512


def encoder():
    return nn.Sequential(nn.Linear(WIDTH, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, WIDTH))


def test_distillation_costs_a_forward_of_the_teacher(ratio):
    torch.manual_seed(0)
    teacher = KnownClassifier(encoder(), WIDTH, K).eval()
    model = CrKD.from_teacher(teacher, U)
    target = torch.where(torch.arange(BATCH) % 2 == 0, torch.arange(BATCH) % K, -1)
    views = [torch.randn(BATCH, WIDTH) for _ in range(2)]

    def step(loss):
        model.zero_grad()
        terms = discovery_loss(model, teacher, views, target, loss)
        terms.total.backward()
        return terms.swapped.detach()

    with_relations, without = CrKDLoss(K), CrKDLoss(K, alpha=0.0)
    torch.testing.assert_close(step(with_relations), step(without))
    assert ratio("step with / without distillation", lambda: step(with_relations), lambda: step(without), 21) < 1.4


def one_by_one(logits):
    """As published, with exponentials, for each view and head by itself."""
    found = torch.empty_like(logits)
    for v in range(len(logits)):
        for h in range(logits.shape[1]):
            q = (logits[v, h] / 0.05).exp()
            for _ in range(3):
                q = q / q.sum(0)
                q = q / q.sum(1, keepdim=True)
            found[v, h] = q
    return found


def test_pseudo_labels_of_all_heads_at_once(ratio):
    logits = torch.randn(2, 4, BATCH, U, generator=torch.Generator().manual_seed(0)).tanh()
    torch.testing.assert_close(sinkhorn_knopp(logits), one_by_one(logits), atol=1e-5, rtol=1e-4)
    ours, theirs = (lambda: sinkhorn_knopp(logits)), (lambda: one_by_one(logits))
    assert ratio("pseudo-labels in log space / one by one", ours, theirs, rounds=51) < 3
