"""All stimuli as one batch, beside the authors' procedure: one cluster after the other, with an optimiser and masks."""

import torch

from classact.data.retina import LNPopulation, natural_like_images
from classact.explain import NormClip
from classact.explain.mds import MDSClustering, ResponseNormalizer

K, STEPS, TAU, LR = 10, 30, 1.6, 2.0
SHAPE, CONSTRAINT = (1, 16, 16), NormClip(5.0)


def one_by_one(model, norm, assignment, start):
    stimuli = []
    for c in range(K):
        x = start[c : c + 1].clone().requires_grad_()
        optimizer = torch.optim.SGD([x], lr=LR)
        masks = torch.stack([assignment == k for k in range(K)])
        masks = masks / masks.sum(1, keepdim=True)
        for _ in range(STEPS):
            means = (norm(model(x)) * masks).sum(1)
            loss = -means[c] / TAU + (means / TAU).logsumexp(0) - torch.tensor(float(K)).log()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            x.data = CONSTRAINT(x.data)
        stimuli.append(x.detach())
    return torch.cat(stimuli)


def test_all_stimuli_at_once(ratio):
    model = LNPopulation(seed=0)
    norm = ResponseNormalizer.from_responses(model(natural_like_images(500)))
    assignment = torch.arange(175) % K
    settings = {"temperature": TAU, "normalize_grad": False, "lr": LR, "constraint": CONSTRAINT, "random_state": 0}
    mds = MDSClustering(n_rounds=1, n_init=1, steps=STEPS, response_norm=norm, **settings)
    start = {}

    def seen(x):
        start.setdefault(len(x), x.detach().clone())
        return model(x)

    mds.fit(seen, SHAPE, labels=assignment)  # the first K stimuli that a model sees are the start

    def ours():
        return mds.fit(model, SHAPE, labels=assignment).responses_

    def theirs():
        return norm(model(one_by_one(model, norm, assignment, start[K]))).numpy()

    kept = theirs()
    kept = kept[sorted(set(kept.argmax(0)))]  # without the stimuli that no unit prefers
    torch.testing.assert_close(ours(), kept, atol=1e-3, rtol=1e-3)
    assert ratio("all stimuli at once / one by one", ours, theirs, rounds=9) < 0.5
