"""A network once more, quicker than copy.deepcopy makes it."""

import copy
from collections import OrderedDict

import torch


def copy_of(network: torch.nn.Module) -> torch.nn.Module:
    """As copy.deepcopy, in half the time: a module keeps a dozen dictionaries, for hooks mostly, and nearly all are
    empty."""
    made = {}  # by id, as deepcopy notes what it has copied
    for module in network.modules():
        for value in vars(module).values():
            if type(value) in (OrderedDict, dict, set) and not value:
                made[id(value)] = type(value)()
    return copy.deepcopy(network, made)
