"""Scores of instances come from the pass that predicted, and deletion tells evidence from decoration."""

from contextlib import suppress

import numpy as np
import pytest
import torch

from classact.data.bags import Bag
from classact.mil import ABMIL, ACMIL, CLAMSB, DSMIL, MaxMIL, MeanMIL, MILOutput, MultiHeadABMIL, Standardized
from classact.mil.location import deletion_insertion, locate

X = torch.randn(1, 30, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (lambda: ABMIL(16, 3), ["attention", "attention x class logit"]),
        (lambda: ABMIL(16, 3, gated=True), ["attention", "attention x class logit"]),
        (lambda: MeanMIL(16, 3), ["attention", "attention x class logit"]),
        (lambda: ACMIL(16, 3), ["attention", "attention x class logit"]),
        (lambda: CLAMSB(16, 3), ["attention", "attention x class logit"]),
        (lambda: Standardized(ABMIL(16, 3)), ["attention", "attention x class logit"]),
        (lambda: MaxMIL(16, 3), ["attention"]),
        (lambda: MultiHeadABMIL(16, 3, heads=2, dim=8), ["attention"]),
        (lambda: DSMIL(16, 3), ["attention", "instance logit"]),
    ],
)
def test_kinds_of_scores(make, kinds):
    torch.manual_seed(0)
    model = make().eval()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    output, scores = locate(model, X)
    assert len(passes) == 1
    assert list(scores) == kinds
    torch.testing.assert_close(scores["attention"], output.attention[0])
    if "attention x class logit" in scores:
        torch.testing.assert_close(scores["attention x class logit"].sum(0), output.logits[0], rtol=1e-4, atol=1e-5)
    if "instance logit" in scores:
        torch.testing.assert_close(scores["instance logit"], output.instance_logits[0])
    torch.testing.assert_close(model(X).logits, output.logits)  # nothing is left behind in the model
    with suppress(AttributeError):
        assert "embed" not in vars(model)


class Peaked(torch.nn.Module):
    """Class 1 if the first feature of any instance is high; attends to it, or elsewhere."""

    def __init__(self, honest):
        super().__init__()
        self.honest = honest

    def forward(self, x, mask=None, coords=None):
        high = x[..., 0].amax(1)
        logits = torch.stack([torch.zeros_like(high), 4 * high - 2], dim=1)
        attention = x[..., 0] * (8 if self.honest else -8)
        return MILOutput(logits, attention, x.mean(1))


def bags():
    rng = np.random.default_rng(0)
    for number in range(20):
        x = torch.zeros(20, 2)
        x[rng.integers(20), 0] = 1.0
        x[:, 0] += torch.from_numpy(rng.uniform(0, 0.1, 20)).float()
        yield Bag(x, 1, id=str(number))


@pytest.mark.parametrize("honest", [True, False])
def test_deletion_and_insertion(honest):
    found = list(bags())
    model = Peaked(honest).eval()
    scores = [model(bag.x[None]).attention[0].numpy() for bag in found]
    curves = deletion_insertion(model, found, scores, seed=0)
    assert {len(of) for of in curves.values()} == {5}
    full = np.mean([float(model(b.x[None]).logits[0].softmax(-1)[1]) for b in found])
    for order in ("top", "random"):
        assert curves[f"deletion_{order}"][0] == pytest.approx(full)
        assert curves[f"insertion_{order}"][-1] == pytest.approx(full)
    falls = (curves["deletion_random"] - curves["deletion_top"])[1:]
    rises = (curves["insertion_top"] - curves["insertion_random"])[:-1]
    assert (falls.mean() > 0.3) == (rises.mean() > 0.3) == honest
    # by hand: one of twenty instances, the witness, is taken out
    expected = np.mean([float(model(torch.cat([b.x[:j], b.x[j + 1 :]])[None]).logits[0].softmax(-1)[1])
                        for b, s in zip(found, scores, strict=True) for j in [int(s.argmax())]])  # fmt: skip
    assert curves["deletion_top"][1] == pytest.approx(expected)


def test_nothing_to_test():
    uniform = [np.full(20, 0.05)] * 20
    assert deletion_insertion(Peaked(True), list(bags()), uniform, seed=0) == {}
    single = [Bag(torch.ones(1, 2), 1)]
    assert deletion_insertion(Peaked(True), single, [np.ones(1)], seed=0) == {}
