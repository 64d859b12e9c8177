"""Networks from anywhere, their weights in any usual wrapping, and what does not fit."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from classact.data.bag_files import DataError
from classact.data.networks import Network, Preprocess, load_network, read_preprocess, read_state_dict


def tiny(num_classes=3):
    torch.manual_seed(num_classes)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    )


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n"
        "def tiny(num_classes=3):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "        nn.Linear(4, num_classes))\n"
        "def fixed():\n    return tiny()\n"
        "def wrong():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "own_networks:tiny"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"state_dict_ema": s, "state_dict": {k: v * 0 for k, v in s.items()}},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    ],
)
def test_weights_are_found_in_any_usual_wrapping(tmp_path, factory, wrap):
    trained = tiny(7).eval()
    torch.save(wrap(trained.state_dict()), tmp_path / "w.pth.tar")
    network = load_network(factory, tmp_path / "w.pth.tar", preprocess="torchvision")
    x = torch.rand(2, 3, 9, 9)
    torch.testing.assert_close(network.model(x), trained(x))  # seven classes, as the file has
    assert not network.model.training


def test_safetensors(tmp_path, factory):
    save_file(tiny(3).state_dict(), tmp_path / "w.safetensors")
    assert read_state_dict(tmp_path / "w.safetensors").keys() == tiny(3).state_dict().keys()
    load_network(factory, tmp_path / "w.safetensors", preprocess="timm")


def test_a_partial_load_is_refused(tmp_path, factory):
    state = tiny(3).state_dict()
    del state["4.bias"]
    torch.save(state | {"extra.weight": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(DataError, match=r"1 missing \(4.bias\); 1 not in the network \(extra.weight\).*refused"):
        load_network(factory, tmp_path / "w.pt", preprocess="timm")
    torch.save(tiny(5).state_dict(), tmp_path / "five.pt")
    with pytest.raises(DataError, match=r"2 of another shape \(4.weight \(5, 4\) for \(3, 4\)"):
        load_network("own_networks:fixed", tmp_path / "five.pt", preprocess="timm")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_is_unpickled(tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(DataError, match=r"evil.pt: not readable as weights"):
        read_state_dict(tmp_path / "evil.pt")
    assert "executed" not in capsys.readouterr().out


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "a.pt").write_text("x")
    torch.save({"epoch": 3}, tmp_path / "b.pt")
    for name, message in (("a.pt", "not readable as weights"), ("b.pt", "no tensors"), ("c.pt", "no such file")):
        with pytest.raises(DataError, match=message):
            read_state_dict(tmp_path / name)


def test_timm_infers_the_number_of_classes(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=5)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.ckpt")
    network = load_network("timm:resnet10t", tmp_path / "w.ckpt")
    assert network.model.num_classes == 5
    assert network.preprocess.crop == model.default_cfg["input_size"][-1]
    assert network.classes == []


def test_torchvision_takes_the_transform_of_its_weights(tmp_path):
    models = pytest.importorskip("torchvision.models")
    torch.save(models.squeezenet1_1(num_classes=2).state_dict(), tmp_path / "w.pth")
    network = load_network("torchvision:squeezenet1_1", tmp_path / "w.pth")
    assert network.preprocess == Preprocess(256, 224)
    assert network.model(torch.rand(1, 3, 64, 64)).shape == (1, 2)


def test_the_default_network_knows_photos(real_data):
    import os
    from pathlib import Path

    from classact.data.photos import list_photos, read_photo

    network = load_network()
    files = list_photos(Path(os.environ["CLASSACT_DATA"]) / "imagenet-sample")[::25]
    x = torch.stack([network.preprocess.normalize(network.preprocess.geometry(read_photo(file))) for file in files])
    with torch.no_grad():
        right = network.model(x).argmax(1) == torch.tensor([int(file.name[:4]) for file in files])
    assert right.float().mean() >= 0.6
    assert network.title(285) == "Egyptian cat"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", "unknown network 'resnet18'"),
        ("timm:resnet10x", "timm has no model 'resnet10x'; there are resnet"),
        ("torchvision:resnet17", "torchvision has no classifier 'resnet17'; there are resn"),
        ("own_networks:nothing", "cannot import own_networks:nothing"),
        ("own_networks:tiny", "does not say how images are prepared"),
    ],
)
def test_unknown_networks_are_named(factory, spec, message):
    with pytest.raises(DataError, match=message):
        load_network(spec)


def test_a_factory_must_return_a_module(factory):
    with pytest.raises(DataError, match="returned a int, not a torch.nn.Module"):
        load_network("own_networks:wrong", preprocess="timm")


def test_the_transform_resizes_crops_and_normalizes():
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 30:] = 255
    x = Preprocess(resize=20, crop=16).geometry(image)
    assert x.shape == (3, 16, 16)
    assert x[:, :, :7].max() < 0.01
    assert x[:, :, 9:].min() > 0.99
    assert Preprocess(resize=None, crop=None).geometry(image).shape == (3, 40, 60)
    assert Preprocess(resize=20, crop=32).geometry(image).shape == (3, 32, 32), "a crop larger than the image is padded"
    z = Preprocess().normalize(torch.full((3, 2, 2), 0.485))
    assert z[0].abs().max() < 1e-6


def test_the_transform_is_that_of_torchvision():
    transforms = pytest.importorskip("torchvision.transforms.v2")
    image = np.random.default_rng(0).integers(0, 256, (50, 83, 3), dtype=np.uint8)
    peer = transforms.Compose([transforms.Resize(32, antialias=True), transforms.CenterCrop(24)])
    theirs = peer(torch.from_numpy(image).permute(2, 0, 1).float() / 255)
    torch.testing.assert_close(Preprocess(32, 24).geometry(image), theirs, atol=0.02, rtol=0)


def test_a_transform_from_a_file(tmp_path, factory):
    (tmp_path / "t.json").write_text(json.dumps({"crop": 8, "resize": 8, "mean": [0, 0, 0], "std": [1, 1, 1]}))
    assert load_network(factory, preprocess=tmp_path / "t.json").preprocess == Preprocess(8, 8, (0, 0, 0), (1, 1, 1))
    (tmp_path / "bad.json").write_text('{"means": 1}')
    with pytest.raises(DataError, match="expected some of the fields resize, crop, mean, std, interpolation"):
        read_preprocess(tmp_path / "bad.json")
    with pytest.raises(DataError, match="preprocess must be 'timm', 'torchvision' or a JSON file"):
        load_network(factory, preprocess="timmm")


def test_classes_by_name_and_number(tmp_path, factory):
    (tmp_path / "names.txt").write_text("red fox\ngrey fox\n\nhen\n")
    network = load_network(factory, classes=tmp_path / "names.txt", preprocess="timm")
    assert isinstance(network, Network)
    assert [network.find_class(name) for name in ("1", "Hen", "red")] == [1, 2, 0]
    assert network.title(9) == "class 9"
    with pytest.raises(DataError, match="no class 'fox'; there are red fox, grey fox"):
        network.find_class("fox")
