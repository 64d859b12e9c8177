"""MambaMIL: a step beside the same model of mambapy's blocks, and how time grows with the number of instances."""

import math
import time

import torch
from mambapy import mamba

from classact.mil import BagCrossEntropy
from classact.mil.mambamil import MambaBlock, MambaMIL

K, D = 4096, 384


def step(model, x):
    optimizer, loss, y = torch.optim.AdamW(model.parameters(), fused=True), BagCrossEntropy(), torch.ones(1).long()

    def run():
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    return run


def peer(model):
    """The same model and weights with mambapy's block in place of ours."""
    dim = model.blocks[0].in_proj.in_features
    blocks = [mamba.MambaBlock(mamba.MambaConfig(d_model=dim, n_layers=1)) for _ in model.blocks]
    for theirs, ours in zip(blocks, model.blocks, strict=True):
        theirs.load_state_dict(ours.state_dict())

    class Block(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, h, size, rate):
            return self.block(h)

    other = MambaMIL(**model.config)
    other.load_state_dict(model.state_dict())
    other.blocks = torch.nn.ModuleList(Block(block) for block in blocks)
    return other


def test_step(ratio):
    torch.manual_seed(0)
    model, x = MambaMIL(D, 2, dim=64, mode="plain"), torch.randn(1, K, D)
    other = peer(model)
    torch.testing.assert_close(model(x).logits, other(x).logits, atol=1e-5, rtol=1e-5)
    name = f"MambaMIL / the same of mambapy blocks, {K:,} x {D}, width 64"
    assert ratio(name, step(model, x), step(other, x), rounds=5) < 1.0


def slope(layer, lengths, capsys, name):
    """Exponent of forward and backward time in the length, by least squares over the medians of three runs."""
    seconds = []
    for length in lengths:
        x, taken = torch.randn(1, length, 16, requires_grad=True), []
        for _ in range(4):
            started = time.perf_counter()
            layer(x).sum().backward()
            taken.append(time.perf_counter() - started)
        seconds.append(sorted(taken[1:])[1])
    x, y = ([math.log(v) for v in values] for values in (lengths, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    exponent = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    with capsys.disabled():
        table = ", ".join(f"{length:,}: {1e3 * s:.0f} ms" for length, s in zip(lengths, seconds, strict=True))
        print(f"\n  {name}: {table}; exponent {exponent:.2f}")
    return exponent


def test_time_is_linear_in_the_number_of_instances(capsys):
    """A transformer layer's is not."""
    torch.manual_seed(0)
    lengths = [2**i for i in range(9, 15)]
    assert slope(MambaBlock(16, rate=5), lengths, capsys, "MambaMIL's block") <= 1.15
    layer = torch.nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True)
    assert slope(layer, lengths, capsys, "transformer layer") >= 1.6
