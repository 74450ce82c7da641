"Devices, nesting and seeds."
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from miniai.device import clean_mem, def_device, set_seed, to_cpu, to_device

Pair = namedtuple('Pair', 'x y')


@dataclass
class Sample:
    x: object
    path: str = 'a.png'
    made: int = field(init=False, default=3)


@dataclass(frozen=True)
class Frozen:
    x: object


def one(): return torch.ones(2)


nestings = {   # make a container of a value, get the value back
    'tensor': (lambda o: o, lambda o: o),
    'list': (lambda o: [o, 'a'], lambda o: o[0]),
    'tuple': (lambda o: (None, o), lambda o: o[1]),
    'namedtuple': (lambda o: Pair('a', o), lambda o: o.y),
    'dict': (lambda o: {'k': {'j': o}}, lambda o: o['k']['j']),
    'ordered': (lambda o: OrderedDict(k=o), lambda o: o['k']),
    'default': (lambda o: defaultdict(list, k=o), lambda o: o['k']),
    'user dict': (lambda o: UserDict(k=o), lambda o: o['k']),
    'dataclass': (Sample, lambda o: o.x),
    'frozen': (Frozen, lambda o: o.x),
    'deep': (lambda o: [{'a': (Pair(1, [Sample(o)]),)}], lambda o: o[0]['a'][0].y[0].x),
    'max': (lambda o: torch.max(torch.stack([o, o]), dim=0), lambda o: o.values),
}


@pytest.mark.parametrize('name', nestings)
def test_to_device_any_nesting(name):
    make, get = nestings[name]
    batch = make(one())
    moved = to_device(batch, 'meta')
    assert get(moved).device.type == 'meta'
    assert type(moved) is type(batch)
    assert get(batch).device.type == 'cpu', 'the original was changed'


def test_read_only_mapping():
    assert to_device(MappingProxyType(dict(a=one())), 'meta')['a'].device.type == 'meta'


@pytest.mark.parametrize('x', ['a.png', b'raw', None, 7, 2.5, True, {1, 2}, np.ones(2), random.Random,
                               Sample], ids=lambda o: str(o)[:12])
def test_what_is_no_tensor_is_left_alone(x):
    assert to_device(x, 'meta') is x
    assert to_cpu(x) is x


def test_empty_containers():
    for x in ([], (), {}, torch.Size([2, 3])): assert to_device(x, 'meta') == x


def test_to_device_packed_sequence():
    assert to_device(pack_sequence([one(), one()]), 'cpu').data.shape == (4,)


def test_to_device_moves_a_loss_function():
    loss = nn.CrossEntropyLoss(weight=torch.ones(3))
    assert to_device(loss, 'meta') is loss
    assert loss.weight.device.type == 'meta'


def test_dataclass_keeps_fields_without_init():
    sample = Sample(one())
    sample.made = 9
    assert to_device(sample, 'meta').made == 9


@pytest.mark.parametrize('dtype,wanted', [
    (torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32),
    (torch.float64, torch.float64), (torch.int64, torch.int64), (torch.uint8, torch.uint8),
    (torch.bool, torch.bool)])
def test_to_cpu_dtypes(dtype, wanted):
    res = to_cpu({'a': [torch.ones(2, dtype=dtype)]})['a'][0]
    assert res.dtype == wanted and res.device.type == 'cpu'


def test_to_cpu_detaches():
    assert not to_cpu((one().requires_grad_()*2,))[0].requires_grad


@pytest.mark.parametrize('seed', [0, 42, 2**32 + 5, -3])
def test_seeds(seed):
    def draws(): return random.random(), np.random.rand(), torch.rand(1).item()
    set_seed(seed)
    first = draws()
    assert draws() != first
    set_seed(seed)
    assert draws() == first


def test_deterministic_is_switched_on_and_off():
    try:
        set_seed(1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        set_seed(1)
        assert not torch.are_deterministic_algorithms_enabled()
    finally: torch.use_deterministic_algorithms(False)


def test_clean_mem_without_exception():
    clean_mem()
    clean_mem()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device on this machine')
def test_cuda_round_trip():
    assert def_device == 'cuda'
    there = to_device({'x': [one().half()]})
    assert there['x'][0].device.type == 'cuda'
    back = to_cpu(there)['x'][0]
    assert back.device.type == 'cpu' and back.dtype == torch.float32
