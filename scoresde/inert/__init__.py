"""Files of pickles read as data: nothing in them is imported, looked up or called."""

from .network_pickles import init_args, read_persistent, state_dict
from .stand_ins import Persistent
from .torch_files import read_torch

__all__ = ["Persistent", "init_args", "read_persistent", "read_torch", "state_dict"]
