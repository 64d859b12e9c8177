from .catalogue import papers
from .reproductions import reproduce
from .saving import load, save
from .tasks import compare
from .version import __version__

__all__ = ["__version__", "compare", "load", "papers", "reproduce", "save"]
