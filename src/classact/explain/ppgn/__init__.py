"""PPGN: plug and play generative networks, https://arxiv.org/abs/1612.00005."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
