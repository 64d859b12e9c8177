from .catalogue import papers
from .reproductions import reproduce
from .saving import load, save
from .tasks import check_data, compare, predict
from .version import __version__

__all__ = ["__version__", "check_data", "compare", "load", "papers", "predict", "reproduce", "save"]
