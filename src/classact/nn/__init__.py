"""Parts of networks that several families share, and that import nothing else of classact."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)

# These functions have the names of their modules. They are bound here because whoever imported the module first would
# otherwise find the module under this name.
from classact.nn.crrelu import crrelu as crrelu  # noqa: E402
from classact.nn.selective_scan import selective_scan as selective_scan  # noqa: E402
