from .selective_scan import selective_scan
from .swap import Replacement, replace

__all__ = ["Replacement", "replace", "selective_scan"]
