"""Make acmil_gated.npz and acmil_mha.npz: python make_acmil.py PATH_TO_A_CHECKOUT_OF_dazhangyu123/ACMIL."""

import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from classact.mil import ACMIL


def main(checkout):
    sys.path.insert(0, checkout)
    # its model file imports position embeddings that these models do not use
    sys.modules["modules"] = types.ModuleType("modules")
    sys.modules["modules.emb_position"] = types.ModuleType("modules.emb_position")
    from architecture.transformer import ACMIL_GA, ACMIL_MHA

    sizes = SimpleNamespace(D_feat=24, D_inner=16, n_class=3, n_token=5)
    for kind, peer_class in (("gated", ACMIL_GA), ("mha", ACMIL_MHA)):
        torch.manual_seed(0)
        peer, mine = peer_class(sizes, n_token=5).eval(), ACMIL(24, 3, dim=16, attention=kind)
        if kind == "mha":
            torch.nn.init.normal_(peer.q)  # so that the attention is far from uniform
        x = torch.randn(1, 40, 24)
        with torch.no_grad():
            copy(peer, mine, kind)
            sub, slide, attention = peer(x)
        attention = attention.softmax(-1)
        pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
        diversity = sum(torch.cosine_similarity(attention[:, i], attention[:, j], dim=-1).mean() for i, j in pairs)
        entropy = torch.nn.functional.cross_entropy
        loss = diversity / len(pairs) + entropy(sub, torch.ones(5).long()) + entropy(slide, torch.tensor([1]))
        arrays = {"x": x, "sub": sub, "slide": slide, "loss": loss} | {
            f"w:{name}": value for name, value in mine.state_dict().items()
        }
        np.savez_compressed(Path(__file__).parent / f"acmil_{kind}.npz", **{k: v.numpy() for k, v in arrays.items()})


def copy(peer, mine, kind):
    mine.reduce.weight.copy_(peer.dimreduction.fc1.weight)
    pairs = [(mine.branch_classifier, [c.fc for c in peer.classifier])]
    scores = mine.attention.scores
    if kind == "gated":
        v, u = peer.attention.attention_V[0], peer.attention.attention_U[0]
        scores.hidden.weight.copy_(torch.cat([v.weight, u.weight]))
        scores.hidden.bias.copy_(torch.cat([v.bias, u.bias]))
        scores.score.load_state_dict(peer.attention.attention_weights.state_dict())
    else:
        scores.query.copy_(peer.q)
        for part, name in (
            (scores.query_projection, "q_proj"),
            (scores.key_projection, "k_proj"),
            (scores.readout.value_projection, "v_proj"),
            (scores.readout.output_projection, "out_proj"),
        ):
            pairs.append((part, [getattr(a, name) for a in peer.sub_attention]))
        for name in ("v_proj", "out_proj"):
            part = {"v_proj": "value_projection", "out_proj": "output_projection"}[name]
            pairs.append((getattr(mine.attention.bag_readout, part), [getattr(peer.bag_attention, name)]))
    for part, layers in pairs:
        part.weight.copy_(torch.stack([layer.weight for layer in layers]))
        part.bias.copy_(torch.stack([layer.bias for layer in layers]))
    mine.classifier.load_state_dict(peer.Slide_classifier.fc.state_dict())


if __name__ == "__main__":
    main(sys.argv[1])
