"""A quick copy of a network against copy.deepcopy's."""

import copy

import torch
from tiny_world import one_level_unet

from inpo_fast.models.copies import copy_of


def test_a_copy_is_a_deep_copy():
    network = one_level_unet()
    network.conv_in.register_forward_hook(lambda *_: seen.append(1))
    seen = []
    for made in (copy_of(network), copy.deepcopy(network)):
        pairs = list(zip(network.modules(), made.modules(), strict=True))
        for one, two in pairs:
            assert type(one) is type(two) and vars(one).keys() == vars(two).keys() and one is not two
            for own, other in zip(vars(one).values(), vars(two).values(), strict=True):
                assert type(own) is type(other)
                if isinstance(own, dict | set):
                    assert own is not other and len(own) == len(other)
        weights, copies = network.state_dict(), made.state_dict()
        assert all(torch.equal(weights[name], x) for name, x in copies.items()) and weights.keys() == copies.keys()
        assert not {x.data_ptr() for x in weights.values()} & {x.data_ptr() for x in copies.values()}
        made.conv_out.register_forward_hook(lambda *_: seen.append(2))
        made.conv_in(torch.zeros(1, 4, 8, 8))
        network.conv_out(torch.zeros(1, 8, 8, 8))
        assert seen.pop() == 1 and not seen
