"""Ranking heads beside whole forward passes, and Prompt-CAM beside the same transformer with as many tokens."""

import torch
from timm.models.vision_transformer import VisionTransformer

from classact.explain.promptcam import PromptCAM, rank_heads

CLASSES, HEADS = 50, 12
SIZES = {"img_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": HEADS, "num_classes": 0}


def prompted():
    torch.manual_seed(0)
    return PromptCAM(VisionTransformer(**SIZES), CLASSES).eval()


def test_ranking_runs_the_transformer_once(ratio):
    model, x, target = prompted(), torch.randn(1, 3, 224, 224), 7

    def ours():
        return rank_heads(model, x, target).order[0].tolist()

    @torch.no_grad()
    def theirs():
        blurred, remaining = [], list(range(HEADS))
        while remaining:
            trials = [
                model(x, blur={target: [*blurred, head]}).double().log_softmax(1)[0, target] for head in remaining
            ]
            blurred.append(remaining.pop(int(torch.stack(trials).argmax())))
        return blurred[::-1]

    assert ours() == theirs()
    assert ratio("ranking 12 heads / 78 whole passes", ours, theirs, rounds=3) < 1 / 8


def test_last_block_computes_prompts_only(ratio):
    model, x = prompted(), torch.randn(4, 3, 224, 224)
    vit = model.vit

    @torch.no_grad()
    def ours():
        return model(x)

    @torch.no_grad()
    def theirs():
        h = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
        for prompts, block in zip(model.prompts, vit.blocks, strict=True):
            h = block(torch.cat([prompts.expand(len(x), -1, -1), h[:, -197:]], 1))
        return model.head(vit.norm(h)[:, :CLASSES]).squeeze(-1)

    torch.testing.assert_close(ours(), theirs(), atol=1e-4, rtol=1e-4)
    assert ratio("Prompt-CAM / all rows of timm's blocks", ours, theirs, rounds=7) < 1.15
