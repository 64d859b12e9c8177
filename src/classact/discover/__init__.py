"""Novel class discovery: classes that no label names, found in unlabelled rows and images.

Estimators take labels from 0 and -1 for unlabelled rows, as scikit-learn's semi-supervised ones do.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
