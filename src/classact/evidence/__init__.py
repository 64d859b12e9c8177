"""Studies, statistics and reports: what turns runs of methods into statements one can rely on."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
