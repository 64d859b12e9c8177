"""Multiple-instance learning: a bag of instances, one label for the bag.

Every model is called as ``model(x, mask=None, coords=None)`` with ``x`` (N, K, D), and answers with a
[`MILOutput`][classact.mil.MILOutput]; every loss is called as ``loss(output, target, progress=0.0)``.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
