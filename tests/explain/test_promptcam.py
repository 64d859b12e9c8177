import copy
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

import classact
from classact.explain import PromptCAM, PromptCAMExplainer, rank_heads


class GatedAttention(Attention):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options, gated=True)


class OtherAttention(Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return x


SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 3, "num_classes": 0}
KINDS = {
    "class token": {},
    "registers": {"reg_tokens": 2},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "normalised queries, scaled residuals": {"qk_norm": True, "init_values": 0.3},
    "gated, normalised attention": {"attn_layer": GatedAttention, "scale_attn_norm": True},
}


def transformer(**options):
    torch.manual_seed(0)
    vit = VisionTransformer(**{**SMALL, **options})
    with torch.no_grad():
        for parameter in vit.parameters():  # a fresh transformer hardly tells images apart
            parameter.add_(0.3 * torch.randn_like(parameter))
    return vit


def prompted(mode="deep", classes=4, dropout=0.0, backbone_train_mode=True, **options):
    model = PromptCAM(transformer(**options), classes, mode, dropout, backbone_train_mode)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.prompts)
    return model.eval()


def images(n=2, size=16):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(2))


def by_whole_blocks(model, x):
    """Scores from timm's own blocks, all rows of the last one included, and that block's attention."""
    vit, c = model.vit, model.num_classes
    h = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    found = []
    last = vit.blocks[-1].attn
    last.fused_attn = False
    handle = last.attn_drop.register_forward_hook(lambda _, inputs, __: found.append(inputs[0]))
    for i, block in enumerate(vit.blocks):
        if model.mode == "deep" or i == 0:
            h = torch.cat([model.prompts[i].expand(len(x), -1, -1), h], 1)
        h = block(h)
        if model.mode == "deep" and i < len(vit.blocks) - 1:
            h = h[:, c:]
    handle.remove()
    return model.head(vit.fc_norm(vit.norm(h))[:, :c]).squeeze(-1), found[0]


@pytest.mark.parametrize("mode", ["deep", "shallow"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_attention_are_those_of_whole_timm_blocks(kind, mode):
    model, x = prompted(mode, **KINDS[kind]), images()
    expected, weights = by_whole_blocks(model, x)
    scores, attention = model(x, return_attention=True)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    prefix = model.num_classes + model.vit.num_prefix_tokens
    torch.testing.assert_close(attention, weights[:, :, :4, prefix:], atol=1e-6, rtol=1e-5)
    assert attention.shape == (2, 3, 4, 16)
    assert (attention >= 0).all() and (attention.sum(-1) < 1).all()
    torch.testing.assert_close(attention.sum(-1), 1 - weights[:, :, :4, :prefix].sum(-1))
    assert torch.equal(model(x), scores)


def test_agrees_with_the_authors_code():
    stored = {
        k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "data/promptcam_reference.npz").items()
    }
    weights = {name.removeprefix("weight:"): value for name, value in stored.items() if name.startswith("weight:")}
    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 3, "init_values": 0.5}
    model = PromptCAM(VisionTransformer(**sizes, num_classes=0), 4).eval()
    own = {"prompts": "vpt.prompt_embeddings", "head.weight": "head.weight", "head.bias": "head.bias"}
    model.load_trainable_state_dict({name: weights.pop(theirs) for name, theirs in own.items()})
    model.vit.load_state_dict(weights)
    x, close = stored["x"], partial(torch.testing.assert_close, atol=2e-6, rtol=0)
    scores, attention = model(x, return_attention=True)
    close(scores, stored["scores"]), close(attention, stored["attention"])
    scores, attention = model(x, return_attention=True, blur={1: [0, 2]})
    close(scores, stored["blurred_scores"]), close(attention, stored["blurred_attention"])
    ranking = rank_heads(model, x)
    assert torch.equal(ranking.order, stored["order"])
    close(ranking.probs, stored["probabilities"])


def test_what_is_trained_is_what_the_paper_counts():
    with torch.device("meta"):
        sizes = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
        for mode, expected in (("deep", 12 * 200 * 768 + 769), ("shallow", 154_369)):
            model = PromptCAM(VisionTransformer(**sizes), 200, mode)
            trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
            assert set(trained) == {"prompts", "head.weight", "head.bias"}
            assert sum(trained.values()) == expected


@pytest.mark.parametrize(("patch", "bound"), [(16, 0.0625), (14, 0.066519)])
def test_prompts_start_uniform_within_the_bound(patch, bound):
    vit = VisionTransformer(img_size=2 * patch, patch_size=patch, embed_dim=768, depth=1, num_heads=1)
    prompts = PromptCAM(vit, 100).prompts.detach()
    assert bound * 0.9995 < prompts.abs().max() <= bound * (1 + 1e-6)
    assert prompts.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


@pytest.mark.parametrize("mode", ["deep", "shallow"])
def test_a_training_step_changes_prompts_and_head_only(mode):
    model = prompted(mode).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    F.cross_entropy(model(images()), torch.tensor([0, 3])).backward()
    assert model.prompts.grad.flatten(1).ne(0).any(1).all()  # of every block
    assert all(p.grad is None for p in model.vit.parameters())
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"prompts", "head.weight"} <= changed <= {"prompts", "head.weight", "head.bias"}


def test_blurred_rows_are_uniform_and_other_classes_keep_their_scores():
    model, x = prompted(reg_tokens=1), images()
    scores, attention = model(x, return_attention=True)
    blurred_scores, blurred = model(x, return_attention=True, blur={2: [0, 1, 2]})
    torch.testing.assert_close(blurred[:, :, 2], torch.full((2, 3, 16), 1 / (4 + 2 + 16)))
    others = [0, 1, 3]
    assert torch.equal(blurred[:, :, others], attention[:, :, others])
    assert torch.equal(blurred_scores[:, others], scores[:, others])
    assert (blurred_scores[:, 2] != scores[:, 2]).all()
    assert torch.equal(model(x, blur={2: []}), scores)
    both = model(x, blur={2: [0, 1, 2], 0: (1,)})
    assert torch.equal(both[:, 1:], blurred_scores[:, 1:]) and (both[:, 0] != scores[:, 0]).all()


def test_permuted_prompts_permute_the_scores():
    model, x, order = prompted(), images(), torch.tensor([2, 0, 3, 1])
    scores = model(x)
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    prompts = model.prompts.data
    model.prompts.data = torch.cat([prompts[:-1], prompts[-1:, order]])
    close(model(x), scores[:, order])
    model.prompts.data = torch.cat([prompts[:1], prompts[1:2, order], prompts[2:]])
    close(model(x), scores)  # those of earlier blocks belong to no class


def test_equal_prompts_give_equal_scores():
    model = prompted()
    model.prompts.data[-1] = model.prompts.data[-1, :1]
    loss = F.cross_entropy(model(images()), torch.tensor([1, 3]))
    assert loss.item() == pytest.approx(math.log(4), abs=1e-5)


def test_the_bias_changes_no_probability():
    model, x = prompted(), images()
    before = model(x).softmax(1)
    model.head.bias.data += 3
    torch.testing.assert_close(model(x).softmax(1), before)


def test_training_mode_reaches_the_transformer_if_asked():
    x = images()
    plain = prompted()
    assert torch.equal(plain.train()(x), plain.eval()(x))
    dropped = prompted(drop_path_rate=0.5).train()
    assert dropped.vit.training and not torch.equal(dropped(x), dropped(x))
    kept = prompted(drop_path_rate=0.5, backbone_train_mode=False).train()
    assert kept.training and not kept.vit.training and torch.equal(kept(x), kept(x))
    model = prompted(dropout=0.5).train()
    torch.manual_seed(0)
    first, second = model(x.expand(2, -1, -1, -1)), model(x)
    assert not torch.equal(first, second)
    same = model(x[:1].expand(2, -1, -1, -1))  # one mask for the whole batch
    torch.testing.assert_close(same[0], same[1])


def test_order_of_the_batch_does_not_matter():
    model, x, order = prompted(), images(5), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(model(x[order]), model(x)[order], atol=1e-5, rtol=1e-5)


def test_any_image_that_the_patches_tile():
    model = prompted(dynamic_img_size=True)
    assert model(images(2, 24), return_attention=True).attention.shape == (2, 3, 4, 36)
    assert PromptCAMExplainer(model)(torch.randn(2, 3, 24, 16), 1, upsample=False).shape == (2, 6, 4)
    padded = prompted(dynamic_img_size=True, dynamic_img_pad=True)
    assert PromptCAMExplainer(padded)(images(1, 18), 1, upsample=False).shape == (1, 5, 5)


def greedy(model, image, target):
    """The authors' search with whole forward passes."""
    blurred, found, remaining = [], [], list(range(model.num_heads))
    while remaining:
        trials = [model(image[None], blur={target: [*blurred, head]}).softmax(1)[0, target] for head in remaining]
        found.append(max(trials).item())
        blurred.append(remaining.pop(int(torch.stack(trials).argmax())))
    return blurred[::-1], found[::-1]


@pytest.mark.parametrize("mode", ["deep", "shallow"])
def test_ranking_is_that_of_whole_passes_in_few_trials(mode, monkeypatch):
    model, x, target = prompted(mode, num_heads=6, reg_tokens=1), images(4), torch.tensor([0, 3, 1, 3])
    trials = []
    score = PromptCAM.score
    monkeypatch.setattr(PromptCAM, "score", lambda self, h, o: trials.append(h.shape[:-1]) or score(self, h, o))
    ranking = rank_heads(model, x, target)
    assert trials == [
        (4, 4),
        *((4, left) for left in range(6, 0, -1)),
    ]  # all scores once, then 6 * 7 / 2 trials an image
    monkeypatch.undo()
    assert torch.equal(ranking.order.sort(1).values, torch.arange(6).expand(4, -1))
    with torch.no_grad():
        for i, c in enumerate(target.tolist()):
            order, probabilities = greedy(model, x[i], c)
            assert ranking.order[i].tolist() == order
            torch.testing.assert_close(ranking.probs[i], torch.tensor(probabilities), atol=1e-6, rtol=1e-5)
    assert torch.equal(rank_heads(model, x[:1]).order, rank_heads(model, x[:1], int(model(x[:1]).argmax())).order)


def test_maps_are_the_attention_of_the_class():
    model, x, target = prompted(), images(), torch.tensor([3, 1])
    attention = model(x, return_attention=True).attention.detach()
    own = torch.stack([attention[0, :, 3], attention[1, :, 1]]).view(2, 3, 4, 4)
    with PromptCAMExplainer(model) as cam:
        assert torch.equal(cam(x, target, heads="all", upsample=False), own)
        assert torch.equal(cam(x, target, heads=[2, 0], upsample=False), own[:, [2, 0]])
        chosen = torch.tensor([[1], [2]])
        assert torch.equal(cam(x, target, heads=chosen, upsample=False)[:, 0], torch.stack([own[0, 1], own[1, 2]]))
        torch.testing.assert_close(cam(x, target, upsample=False), own.mean(1))
        predicted = model(x).argmax(1)
        assert torch.equal(cam(x), cam(x, predicted))
        assert cam(x, 2).shape == (2, 16, 16) and cam(x, 2, heads="all").shape == (2, 3, 16, 16)
        assert cam(x, 2, heads=[1]).shape == (2, 1, 16, 16)
        shown = cam(x, 2, heads="all", normalize="minmax").flatten(2)
        assert (shown.amin(-1) == 0).all() and (shown.amax(-1) == 1).all()


def test_explaining_leaves_the_model_as_it_was():
    model, x = prompted(drop_path_rate=0.5).train(), images()
    model.prompts.grad = torch.ones_like(model.prompts)
    explain = PromptCAMExplainer(model)
    assert torch.equal(explain(x, 1), explain(x, 1))
    rank_heads(model, x, 1)
    for call in (explain, partial(rank_heads, model)):
        with pytest.raises(ValueError, match="x: expected images of"):
            call(images(1, 20), 1)
        with pytest.raises(ValueError, match="target"):
            call(x, 4)
    assert all(part.training for part in model.modules())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"prompts", "head.weight", "head.bias"}
    assert (model.prompts.grad == 1).all()
    assert not any(part._forward_hooks for part in model.modules())


def test_round_trip_of_a_model_made_from_a_description(tmp_path):
    vit = {"model_name": "vit_tiny_patch16_224", "img_size": 32, "depth": 2, "num_classes": 0}
    model = PromptCAM({**vit, "pretrained": False}, 5, "shallow", dropout=0.1, backbone_train_mode=False).eval()
    loaded = classact.load(classact.save(model, tmp_path / "m"))
    assert loaded.config == model.config and not loaded.vit.training
    assert torch.equal(loaded(images(2, 32)), model(images(2, 32)))
    assert not any(p.requires_grad for p in loaded.vit.parameters())


def test_round_trip_of_a_model_made_from_a_module(tmp_path):
    model, other = prompted(), prompted()
    with torch.no_grad():
        other.prompts.add_(1), other.vit.pos_embed.add_(1)
    file = classact.save(model, tmp_path / "m")
    assert torch.equal(classact.load(file, other)(images()), model(images()))
    clone = copy.deepcopy(model)
    assert clone.config["vit"] is clone.vit


def test_prompts_and_head_alone_can_be_stored():
    model, other = prompted(), prompted()
    state = copy.deepcopy(model.trainable_state_dict())
    assert set(state) == {"prompts", "head.weight", "head.bias"}
    torch.nn.init.zeros_(other.prompts)
    other.load_trainable_state_dict(state)
    assert torch.equal(other(images()), model(images()))
    with pytest.raises(KeyError, match="expected the weights head.bias, head.weight, prompts, got prompts"):
        other.load_trainable_state_dict({"prompts": state["prompts"]})


def test_bfloat16_autocast():
    model = prompted().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images()), torch.tensor([0, 2]))
        assert rank_heads(model, images(), 1).probs.isfinite().all()
        assert PromptCAMExplainer(model)(images(), 1).isfinite().all()
    loss.backward()
    assert loss.isfinite() and model.prompts.grad.isfinite().all()


@pytest.mark.bare
def test_trains_compiled():
    model = prompted(depth=2).train()
    step = torch.compile(lambda x, y: F.cross_entropy(model(x, blur={1: (0,)}), y), backend="aot_eager", fullgraph=True)
    step(images(), torch.tensor([0, 3])).backward()
    assert model.prompts.grad.isfinite().all()


@pytest.mark.bare
def test_export():
    model, x = prompted(depth=2), images()
    exported = torch.export.export(model, (x,), {"return_attention": True}).module()
    output = exported(x, return_attention=True)
    for found, expected in zip(output, model(x, return_attention=True), strict=True):
        torch.testing.assert_close(found, expected)


def test_learning_rate_is_that_of_timms_schedule():
    from timm.scheduler import CosineLRScheduler

    from classact.explain import PromptCAMModule

    module = PromptCAMModule(prompted(), lr=0.005, epochs=130, warmup_lr=1e-6)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.005)
    peer = CosineLRScheduler(optimizer, 130, lr_min=1e-6, warmup_t=20, warmup_lr_init=1e-6)
    for epoch in range(132):
        peer.step(epoch)
        assert module.rate(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


def test_trains_the_same_from_the_same_seed():
    from torch.utils.data import DataLoader, TensorDataset

    from classact.explain import PromptCAMModule
    from classact.training import fit

    y = torch.arange(32) % 2
    x = images(32) + y.view(-1, 1, 1, 1)
    data, found, frozen = TensorDataset(x, y), [], prompted().vit.state_dict()
    for seed, optimizer in ((1, "sgd"), (1, "sgd"), (2, "adam"), (1, "adamw")):
        model = prompted(classes=2)
        module = PromptCAMModule(model, lr=0.05, warmup_epochs=1, epochs=4, optimizer=optimizer)
        history = fit(module, DataLoader(data, 8, shuffle=True), DataLoader(data, 32), epochs=4, seed=seed)
        assert set(history.curves) == {"val_loss", "val_accuracy"}
        assert history.curves["val_loss"][-1] < history.curves["val_loss"][0]
        assert all(torch.equal(p, frozen[name]) for name, p in model.vit.state_dict().items())
        found.append(model.prompts.detach().cpu())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[0], found[3])


@pytest.mark.parametrize("kind", ["attributes", "classes", "hybrids"])
def test_stamps_are_where_the_data_say(kind, real_data):
    from classact.data.stamps import stamped_garments

    data = stamped_garments(60, 3, kind)
    inside = np.zeros((60, 24, 24), dtype=int)
    for i in range(60):
        for row, column in data.corners[i]:
            inside[i, row : row + 5, column : column + 5] += 1
    assert inside.max() == 1  # no overlap
    differs = (data.x != data.plain).any(1)
    assert not differs[inside == 0].any() and differs[inside == 1].all()
    assert data.attributes.sum(1).tolist() == [3.0] * 60
    if kind != "attributes":
        assert (data.stamps[:, 0] == data.y).all() and data.y.tolist() == [0, 1, 2, 3, 4] * 12
    shared = {"attributes": 0, "classes": 2, "hybrids": 1}[kind]
    assert kind == "attributes" or (data.stamps[:, -shared:] >= 5).all()
    assert kind != "hybrids" or ((data.stamps[:, 1] < 5) & (data.stamps[:, 1] != data.y)).all()
    row, column = data.corners[0, 0]
    patches = data.patches(0)[0]
    for r in range(6):
        for c in range(6):
            height, width = (min(a + 5, 4 * b + 4) - max(a, 4 * b) for a, b in ((row, r), (column, c)))
            assert patches[r, c] == (max(height, 0) * max(width, 0) >= 4)
    same, test = stamped_garments(60, 3, kind), stamped_garments(60, 3, kind, "test")
    assert (same.x == data.x).all() and (test.x != data.x).any()
    pattern = data.patterns[data.stamps[0, 0]]
    assert (data.x[0, :, row : row + 5, column : column + 5] == pattern).all()
    i = int(np.flatnonzero((test.stamps == data.stamps[0, 0]).any(1))[0])
    row, column = test.corners[i, int(np.flatnonzero(test.stamps[i] == data.stamps[0, 0])[0])]
    assert (test.x[i, :, row : row + 5, column : column + 5] == pattern).all()  # one set of patterns per seed


def test_paper_scale_reads_folders_of_images(tmp_path, monkeypatch):
    """Made-up images and a small transformer in place of CUB and DINO's."""
    from classact.data.bag_files import DataError
    from classact.reproductions import run_cell
    from classact.reproductions.explain import promptcam

    monkeypatch.setenv("CLASSACT_DATA", str(tmp_path))
    with pytest.raises(DataError, match="cub: expected folders train/NNN.Name and val/NNN.Name"):
        run_cell(promptcam.__name__, "cub", 100, "paper")
    rng = np.random.default_rng(0)
    for part, n in (("train", 10), ("val", 2)):
        for name in ("001.Albatross", "002.Cormorant", "003.Sparrow"):
            (tmp_path / "cub" / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(256, size=(30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "cub" / part / name / f"{i}.jpg")
    monkeypatch.setattr(promptcam, "BIRDS", {"model_name": "vit_tiny_patch16_224", "img_size": 32, "depth": 2})
    monkeypatch.setattr(promptcam, "BIRDS_EPOCHS", 1)
    monkeypatch.setattr(promptcam, "WORKERS", 0)
    values, _ = run_cell(promptcam.__name__, "cub", 100, "paper")
    assert {"deep", "linear", "gradcam_last", "layercam", "eigencam", "rollout"} <= set(values)
    assert all(0 <= value <= 1 for metrics in values.values() for value in metrics.values())


@pytest.mark.bare
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: PromptCAM(torch.nn.Linear(2, 2), 3),
            TypeError,
            "vit: expected a timm VisionTransformer .* got Linear",
        ),
        (
            lambda: PromptCAM(transformer(attn_layer=OtherAttention), 3),
            TypeError,
            "vit: expected timm's Block with timm's Attention as the last block, got Block with OtherAttention",
        ),
        (lambda: PromptCAM(transformer(), 1), ValueError, "num_classes: expected at least 2, got 1"),
        (lambda: PromptCAM(transformer(), 3, "wide"), ValueError, "mode: expected 'deep' or 'shallow', got 'wide'"),
        (lambda: prompted()(images(1, 20)), ValueError, r"x: expected images of \(16, 16\) pixels, got \(20, 20\)"),
        (lambda: prompted()(images(1)[:, :2]), ValueError, r"x: expected shape \(N, 3, H, W\), got \(1, 2, 16, 16\)"),
        (
            lambda: prompted(dynamic_img_size=True)(images(1, 18)),
            ValueError,
            r"x: expected images that patches of \(4, 4\) tile, got \(18, 18\)",
        ),
        (lambda: prompted()(images(), blur={4: [0]}), ValueError, "blur: expected classes 0 to 3, got 4"),
        (lambda: prompted()(images(), blur={1: [3, 0]}), ValueError, r"blur: expected heads 0 to 2, got \[0, 3\]"),
        (lambda: PromptCAMExplainer(transformer()), TypeError, "model: expected a PromptCAM, got VisionTransformer"),
        (lambda: PromptCAMExplainer(prompted())(images(), 4), ValueError, "target must be a class from 0 to 3, got "),
        (
            lambda: PromptCAMExplainer(prompted())(images(), torch.tensor([[0, 1], [2, 3]])),
            ValueError,
            "target: expected one class per image",
        ),
        (
            lambda: PromptCAMExplainer(prompted())(images(), 1, heads="best"),
            ValueError,
            "heads: expected 'mean', 'all' or numbers of heads, got 'best'",
        ),
        (
            lambda: PromptCAMExplainer(prompted())(images(), 1, heads=[7]),
            ValueError,
            r"heads: expected heads 0 to 2, got \[7\]",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.bare
def test_bad_optimizer():
    from classact.explain import PromptCAMModule

    with pytest.raises(ValueError, match="optimizer: expected 'sgd', 'adam' or 'adamw', got 'lion'"):
        PromptCAMModule(prompted(), optimizer="lion")


@pytest.mark.bare
def test_bad_garments():
    from classact.data.stamps import stamped_garments

    with pytest.raises(ValueError, match="kind: expected 'attributes', 'classes' or 'hybrids', got 'birds'"):
        stamped_garments(3, 0, "birds")
