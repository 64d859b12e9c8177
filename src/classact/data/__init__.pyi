from .bag_files import DataError
from .bags import Bag, BagBatch, BagDataset, collate_bags, open_bags
from .digits import digits_bags
from .images import fashion_mnist
from .registry import DATA_SETS, data_folder, fetch, find_data
from .shortcut import shortcut_bags

__all__ = [
    "DATA_SETS",
    "Bag",
    "BagBatch",
    "BagDataset",
    "DataError",
    "collate_bags",
    "data_folder",
    "digits_bags",
    "fashion_mnist",
    "fetch",
    "find_data",
    "open_bags",
    "shortcut_bags",
]
