"""A model lent for an analysis and handed back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(*models: nn.Module | object) -> Iterator[None]:
    """Models in evaluation mode, with no parameter that asks for a gradient; then all is as before, also on error.

    What is not a module (a plain callable) passes untouched.
    """
    modules = [part for model in models if isinstance(model, nn.Module) for part in model.modules()]
    training = [(part, part.training) for part in modules]
    wanted = [
        parameter
        for model in models
        if isinstance(model, nn.Module)
        for parameter in model.parameters()
        if parameter.requires_grad and not parameter.is_inference()  # such a one cannot be changed
    ]
    try:
        for part in modules:
            part.training = False
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for part, flag in training:
            part.training = flag
        for parameter in wanted:
            parameter.requires_grad_(True)
