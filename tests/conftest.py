"Settings for all tests: no window, no network, one thread; tests marked `gpu` are skipped where there is none."
import os

os.environ['MPLBACKEND'] = 'Agg'
os.environ['HF_HUB_OFFLINE'] = os.environ['HF_DATASETS_OFFLINE'] = '1'
for _name in 'OMP_NUM_THREADS', 'MKL_NUM_THREADS': os.environ.setdefault(_name, '1')

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line('markers', 'gpu: needs a CUDA device')


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available(): return
    for item in items:
        if 'gpu' in item.keywords: item.add_marker(pytest.mark.skip(reason='no CUDA device on this machine'))


@pytest.fixture
def root():
    "The top folder of the project."
    return Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def close_figures():
    "No figure of one test is there in the next."
    yield
    import sys
    if 'matplotlib.pyplot' in sys.modules: sys.modules['matplotlib.pyplot'].close('all')
