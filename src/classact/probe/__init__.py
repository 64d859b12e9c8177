"""What trained networks have learned: whether two agree, which patterns and filters matter, how much bias a task needs.

Every tool takes a model and a loader, and returns a frozen report with ``table()``, ``plot()`` and ``save()``.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
