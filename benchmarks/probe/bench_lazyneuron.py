"""Top-k MLPs by both paths and as torch.sparse matrices, where one overtakes the other, and what counting costs."""

import time

import timm
import torch
from torch.nn import functional as F

from classact.probe.lazyneuron import ActivationSparsity, TopKMLP, TopKReLU, nonzero_product

D, D_FF = 768, 3072
TOKENS, SHARES = (1, 8, 64, 512), (0.03, 0.06, 0.25)


def block(share):
    torch.manual_seed(0)
    return TopKMLP(D, D_FF, round(share * D_FF)).eval()


def tokens(n):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_sparse_path_over_tokens_and_k(ratio, capsys):
    found = {}
    for share in SHARES:
        one = block(share)
        for n in TOKENS:
            x = tokens(n)
            torch.testing.assert_close(one.sparse_forward(x), one.dense_forward(x), rtol=1e-4, atol=1e-5)
            name = f"Top-{one.k} MLP, {n} tokens, sparse / dense path"
            ours, theirs = (lambda one=one, x=x: one.sparse_forward(x)), (lambda one=one, x=x: one.dense_forward(x))
            found[share, n] = ratio(name, ours, theirs)
    with capsys.disabled():
        for share in SHARES:
            slower = [n for n in TOKENS if found[share, n] > 1]
            until = f"below {slower[0]} tokens" if slower else f"at all numbers of tokens up to {TOKENS[-1]}"
            print(f"\n  k / d_ff = {share}: the sparse path is faster {until}")
    assert found[0.03, 1] < 1


@torch.inference_mode()
def test_second_matrix_beside_dense_and_csr(ratio):
    for share in SHARES:
        one = block(share)
        for n in (1, 64):
            a = TopKReLU(one.k)(tokens(n) @ torch.randn(D, D_FF, generator=torch.Generator().manual_seed(2)))
            values, index = a.topk(one.k)
            expected = a @ one.V_t

            def bag(values=values, index=index, V_t=one.V_t):
                return F.embedding_bag(index, V_t, per_sample_weights=values, mode="sum")

            def csr(a=a, V_t=one.V_t):
                return a.to_sparse_csr() @ V_t

            def dense(a=a, V_t=one.V_t):
                return a @ V_t

            def from_zeros(a=a, V_t=one.V_t):
                return nonzero_product(a, V_t)

            for function in (bag, csr, from_zeros):
                torch.testing.assert_close(function(), expected, rtol=1e-3, atol=1e-3)
            name = f"second matrix, k = {one.k}, {n} tokens"
            ratio(f"{name}: indices known / dense", bag, dense)
            ratio(f"{name}: indices known / torch.sparse CSR", bag, csr)
            ratio(f"{name}: nonzero_product / torch.sparse CSR", from_zeros, csr)


def test_gradients_by_both_paths(ratio):
    one, x = block(0.03).train(), tokens(64)

    def step(path):
        one.zero_grad()
        path(x).square().sum().backward()
        return one.V_t.grad

    torch.testing.assert_close(step(one.sparse_forward).clone(), step(one.dense_forward), rtol=1e-3, atol=1e-3)
    ratio(
        f"forward and backward, k = {one.k}, 64 tokens, sparse / dense path",
        lambda: step(one.sparse_forward),
        lambda: step(one.dense_forward),
    )


@torch.inference_mode()
def test_counting_beside_a_plain_pass(ratio, capsys):
    model = timm.create_model("vit_small_patch16_224", depth=4, act_layer=torch.nn.ReLU).eval()
    x = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with ActivationSparsity(model) as sparsity:
        counted = model(x)
    assert torch.equal(counted, model(x))

    def counting():
        with ActivationSparsity(model):
            return model(x)

    cost = ratio("vision transformer (ViT-S, 4 blocks), activations counted / plain", counting, lambda: model(x))
    started = time.perf_counter()
    sparsity.result()
    with capsys.disabled():
        print(f"\n  reading the result: {(time.perf_counter() - started) * 1e3:.1f} ms")
    assert cost < 1.5
