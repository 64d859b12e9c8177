import pytest
import torch
from torch import nn

from classact.nn import replace

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 2))


def test_it_says_what_it_replaced_and_changes_nothing_else():
    model = small()
    linear = [model[0], model[2], model[4]]
    done = replace(model, nn.GELU, nn.SiLU)
    assert [one.names for one in done] == [("1",), ("3",)]
    assert str(done[0]) == "1: GELU(approximate='none') -> SiLU()"
    assert isinstance(model[1], nn.SiLU) and isinstance(model[3], nn.SiLU) and model[1] is not model[3]
    assert [model[0], model[2], model[4]] == linear


def test_a_shared_module_stays_shared():
    act = nn.ReLU()
    model = nn.ModuleDict({"a": nn.Sequential(act, nn.Linear(2, 2)), "b": nn.Sequential(act)})
    (done,) = replace(model, nn.ReLU, nn.PReLU)
    assert done.names == ("a.0", "b.0")
    assert model["a"][0] is model["b"][0] is done.new


def test_required_arguments_come_from_the_old_module():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8))
    replace(model, nn.BatchNorm2d, nn.InstanceNorm2d)
    assert model[1].num_features == 8
    replace(model, nn.GroupNorm, nn.BatchNorm2d)  # num_channels is its num_features
    assert model[2].num_features == 8
    mlp = small()
    replace(mlp, nn.Linear, nn.Linear, where=lambda name: name == "2")
    assert (mlp[2].in_features, mlp[2].out_features) == (6, 6)
    replace(mlp, nn.Linear, lambda old: nn.Linear(old.in_features, old.out_features, bias=False))
    assert all(one.bias is None for one in mlp if isinstance(one, nn.Linear))


def test_dtype_training_mode_and_hooks_are_kept():
    model = small().double().eval()
    calls = []
    handle = model[1].register_forward_hook(lambda *_: calls.append("after"))
    model[1].register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True)
    model[1].register_full_backward_hook(lambda *_: calls.append("back"))
    replace(model, nn.GELU, nn.PReLU)
    assert model[1].weight.dtype == torch.float64 and not model[1].training
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    assert calls == ["before", "after", "back"]
    handle.remove()
    model(x)
    assert calls == ["before", "after", "back", "before"]


def test_device_is_that_of_the_model_where_the_old_part_has_no_tensor():
    model = small().to("meta")
    replace(model, nn.GELU, nn.PReLU)
    assert model[1].weight.is_meta


def test_timm_and_torchvision_models_run_after_it():
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    assert len(replace(vit, nn.GELU, nn.Mish)) == 2
    assert vit(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    resnet = torchvision.models.resnet18(num_classes=5)
    assert len(replace(resnet, nn.ReLU, nn.SiLU)) == 9
    assert resnet(torch.randn(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.bare
def test_it_refuses_to_guess():
    with pytest.raises(ValueError, match=r"no nn\.activation\.ReLU in the model, whose parts are .*GELU"):
        replace(small(), nn.ReLU, nn.SiLU)
    assert replace(small(), nn.ReLU, nn.SiLU, strict=False) == []

    class Louder(nn.GELU):
        pass

    with pytest.raises(ValueError, match="Louder, derived from it; name that type"):
        replace(nn.Sequential(Louder()), nn.GELU, nn.SiLU)
    with pytest.raises(ValueError, match="where: is true of no"):
        replace(small(), nn.GELU, nn.SiLU, where=lambda _: False)
    with pytest.raises(ValueError, match="is itself"):
        replace(nn.GELU(), nn.GELU, nn.SiLU)
    layer = nn.TransformerEncoderLayer(8, 2, activation=nn.ReLU())
    with pytest.raises(ValueError, match="without calling them"):
        replace(nn.Sequential(layer), nn.ReLU, nn.SiLU)
    scripted = nn.Sequential(torch.jit.trace(nn.Sequential(nn.ReLU()), torch.zeros(1)))
    with pytest.raises(ValueError, match=r"no nn\.activation\.ReLU"):
        replace(scripted, nn.ReLU, nn.SiLU)


@pytest.mark.bare
def test_after_an_error_the_model_is_as_it_was():
    model = small()
    before = list(model)
    with pytest.raises(TypeError, match="needs 'num_features', which GELU"):
        replace(model, nn.GELU, nn.BatchNorm1d)
    with pytest.raises(TypeError, match="it made str"):
        replace(model, nn.GELU, lambda: "gelu")

    def fails_the_second_time(made=[]):  # noqa: B006
        made.append(1)
        if len(made) > 1:
            raise RuntimeError("no more")
        return nn.SiLU()

    with pytest.raises(RuntimeError, match="no more"):
        replace(model, nn.GELU, fails_the_second_time)
    assert list(model) == before
