"""Small trainings with one known fault each, and others with none, to see what the rules of a diagnosis find."""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn, optim

from miniai.activations import ActivationStats
from miniai.callback import Callback
from miniai.datasets import DataLoaders, MemoryLoader
from miniai.device import set_seed
from miniai.diagnose import Findings, diagnose
from miniai.gradients import GradientStats, UpdateStats
from miniai.learner import Learner, MetricsCB, TrainCB
from miniai.resnet import GlobalAvgPool, ResBlock
from miniai.training import accuracy

def mlp(
    *sizes,      # of the input, the hidden layers and the output
    act=nn.ReLU  # makes the activation
): # flatten, fc1, act1, fc2, act2, ...; no activation at the end
    "Linear layers with activations between them."
    parts = [('flatten', nn.Flatten())]
    for i,(ni,nf) in enumerate(zip(sizes, sizes[1:]), 1): parts += [(f'fc{i}', nn.Linear(ni, nf)),
                                                                    (f'act{i}', act())]
    return nn.Sequential(OrderedDict(parts[:-1]))

def cnn():
    "Four convolutions that halve the image, with Kaiming weights, and a linear layer."
    parts, nfs = [], (1, 8, 16, 32, 32)
    for i,(ni,nf) in enumerate(zip(nfs, nfs[1:]), 1):
        parts += [(f'conv{i}', nn.Conv2d(ni, nf, 3, stride=2, padding=1)), (f'act{i}', nn.ReLU())]
        nn.init.kaiming_normal_(parts[-2][1].weight)
    return nn.Sequential(OrderedDict([*parts, ('flatten', nn.Flatten()), ('head', nn.Linear(128, 10))]))

def resnet():
    "A convolution and two residual blocks with BatchNorm."
    block = partial(ResBlock, stride=2, act=nn.ReLU, norm=nn.BatchNorm2d)
    return nn.Sequential(OrderedDict(stem=nn.Conv2d(1, 8, 3, stride=2, padding=1), block1=block(8, 16),
                                     block2=block(16, 32),
                                     pool=GlobalAvgPool(), head=nn.Linear(32, 10)))

class ByRows(nn.Module):
    "A net that reads an image as 28 rows, one after the other."
    def __init__(self,
        kind=nn.LSTM, # nn.RNN, nn.LSTM or nn.GRU
        nh:int=64     # its units
    ):
        super().__init__()
        self.rnn, self.head = kind(28, nh, batch_first=True), nn.Linear(nh, 10)
    def forward(self, x): return self.head(self.rnn(x.squeeze(1))[0][:, -1])

class RowTransformer(nn.Module):
    "A transformer of two layers over the 28 rows of an image."
    def __init__(self,
        nh:int=32 # width
    ):
        super().__init__()
        self.embed, self.places = nn.Linear(28, nh), nn.Parameter(torch.randn(28, nh)*.02)
        layer = nn.TransformerEncoderLayer(nh, 4, 2*nh, dropout=.1, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2,
                                                        enable_nested_tensor=False), nn.Linear(nh, 10)
    def forward(self, x): return self.head(self.encoder(self.embed(x.squeeze(1)) + self.places).mean(1))

@dataclass
class Case:
    "A training, and the first line of its diagnosis."
    make:object     # function: DataLoaders -> Learner
    rule:str = ''   # that should come first; '' for a healthy run
    layer:str = ''  # that it should name; '' for any
    step:int = None # at which it should begin; None for any
    epochs:int = 1

class _Quiet(MetricsCB):
    def _log(self, d): pass

def _learner(net, lr=.1, opt=optim.SGD, cbs=(), metric=accuracy, n=None):
    "Makes a Learner from DataLoaders, of which it takes the first `n` images."
    cbs = [TrainCB(), _Quiet(accuracy=metric), *cbs]
    return lambda dls: Learner(net(), dls if n is None else first_images(dls, n), F.cross_entropy, lr, cbs,
                               opt)

def first_images(
    dls,  # `DataLoaders.in_memory`
    n:int # images
) -> DataLoaders:
    "The same with the first `n` training images only."
    columns = {nm: o[:n] for nm,o in dls.train.columns.items()}
    return DataLoaders(MemoryLoader(dls.train.dataset, columns, dls.train.batch_size, dls.train.shuffle),
                       dls.valid)

_sizes = 784, 64, 64, 10
_deep = 784, *[64]*8, 10

def _with(net, change):
    "`net` after `change(net)`."
    def make():
        o = net()
        with torch.no_grad(): change(o)
        return o
    return make

def _fill(value):
    def change(net):
        for p in net.parameters(): p.fill_(value)
    return change

def _scale(factor):
    def change(net):
        for m in net:
            if isinstance(m, nn.Linear): m.weight.mul_(factor); m.bias.zero_()
    return change

def _low_bias(net): net.fc2.bias.fill_(-10.)
def _freeze(net): net.fc2.requires_grad_(False)

def _large_recurrent(net):
    nn.init.orthogonal_(net.rnn.weight_hh_l0)
    net.rnn.weight_hh_l0.mul_(4.)

class _NanAt(nn.Module):
    "NaN at one training step."
    def __init__(self, step): super().__init__(); self.left = step+1
    def forward(self, x):
        self.left -= self.training
        return x*torch.nan if self.left == 0 and self.training else x

def _with_nan():
    net = mlp(*_sizes)
    net.act2 = nn.Sequential(OrderedDict(relu=nn.ReLU(), scale=_NanAt(40)))
    return net

class _Unused(nn.Module):
    "Has a layer that it does not call."
    def __init__(self): super().__init__(); self.body, self.extra = mlp(784, 64, 10), nn.Linear(64, 10)
    def forward(self, x): return self.body(x)

class _Detached(nn.Module):
    "Cuts the graph behind its first layer."
    def __init__(self): super().__init__(); self.stem, self.body = mlp(784, 64, 64), mlp(64, 64, 10)
    def forward(self, x): return self.body(self.stem(x).detach())

class _ShuffleCB(Callback):
    "Gives the images of a batch the labels of others."
    def before_batch(self, learn):
        xb, yb = learn.batch
        learn.batch = xb, yb[torch.randperm(len(yb))]

def _wrong_axis(preds, targets): return (preds.argmax(0)[:1] > len(preds)).float().mean()

_momentum = partial(optim.SGD, momentum=.9)

faults = {
    'lr 30': Case(_learner(lambda: mlp(*_sizes), 30.), 'learning_rate_high', step=1),
    'lr 3 with Adam': Case(_learner(cnn, 3., optim.Adam), 'learning_rate_high', step=1),
    'lr 1e-9': Case(_learner(lambda: mlp(*_sizes), 1e-9), 'learning_rate_low'),
    'lr 1e-9 with Adam': Case(_learner(cnn, 1e-9, optim.Adam), 'learning_rate_low'),
    'all weights zero': Case(_learner(_with(lambda: mlp(*_sizes), _fill(0.))), 'identical_units', 'fc1'),
    'all weights 0.01': Case(_learner(_with(lambda: mlp(*_sizes), _fill(.01))), 'identical_units', 'fc1'),
    'weights x 12, 9 deep': Case(_learner(_with(lambda: mlp(*_deep), _scale(12.)), 1e-3),
                                 'exploding_activations', step=0),
    'weights / 5, 9 deep': Case(_learner(_with(lambda: mlp(*_deep), _scale(.2))), 'vanishing_activations',
                                step=0),
    'sigmoid, 11 deep': Case(_learner(lambda: mlp(784, *[64]*10, 10, act=nn.Sigmoid)), 'vanishing_gradients',
                             'fc1.weight'),
    'tanh, weights x 50': Case(_learner(_with(lambda: mlp(*_sizes, act=nn.Tanh), _scale(50.)), .001),
                               'saturated', step=0),
    'bias -10 before ReLU': Case(_learner(_with(lambda: mlp(*_sizes), _low_bias)), 'dead_units', 'act2', 0),
    'recurrent weights x 4': Case(_learner(_with(lambda: ByRows(nn.RNN), _large_recurrent), .01),
                                  'exploding_gradients', step=0),
    'frozen layer': Case(_learner(_with(lambda: mlp(*_sizes), _freeze)), 'not_trained', 'fc2'),
    'layer never called': Case(_learner(_Unused), 'never_called', 'extra'),
    'layer outside the graph': Case(_learner(_Detached), 'no_gradient', 'stem.fc1'),
    'NaN at step 40': Case(_learner(_with_nan), 'not_finite', 'act2.scale', 40),
    'softmax before cross entropy': Case(_learner(lambda: nn.Sequential(OrderedDict(
        body=mlp(*_sizes), prob=nn.Softmax(1)))), 'softmax_before_loss', 'prob'),
    'labels shuffled': Case(_learner(cnn, .05, _momentum, [_ShuffleCB()]), 'at_chance'),
    '64 images, 60 epochs': Case(_learner(cnn, 2e-3, optim.Adam, n=64), 'overfitting', epochs=60),
    'metric of the wrong axis': Case(_learner(lambda: mlp(*_sizes), metric=_wrong_axis, n=640),
                                     'metric_stuck', epochs=5),
}

_nets = {'MLP': lambda: mlp(*_sizes), 'CNN': cnn, 'ResNet, BatchNorm': resnet, 'LSTM': ByRows,
         'transformer': RowTransformer}
_opts = {'SGD, momentum': (.05, _momentum), 'Adam': (2e-3, optim.Adam), 'AdamW': (2e-3, optim.AdamW)}

healthy = {f'{net}; {opt}': Case(_learner(_nets[net], *_opts[opt], n=2048), epochs=3) for net in _nets
           for opt in _opts}

def train(
    case:Case, # one of `faults` or `healthy`
    dls,       # `DataLoaders.in_memory` of images [1, 28, 28] and classes
    seed:int=0,# of the weights and of the order of the images
    watch=None # function of the Learner that adds watchers; default outputs, gradients, updates at each step
) -> Learner: # fitted
    "Do the training of a case."
    import warnings
    set_seed(seed)
    learn = case.make(dls)
    if watch is None: learn.cbs += [ActivationStats(), GradientStats(), UpdateStats()]
    else: watch(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # they say what the findings say, too
        learn.fit(case.epochs)
    return learn

def is_right(
    case:Case,        # with what should come first
    findings:Findings # of its training
) -> bool: # of a healthy run: nothing above 'note'
    "Whether the diagnosis says first what it should."
    if not case.rule: return not findings.of('error', 'warning')
    if not findings or findings[0].rule != case.rule: return False
    first = findings[0]
    return case.layer in ('', first.layer) and case.step in (None, *first.steps[:1])

def score(
    cases:dict,  # name -> `Case`, such as `faults` or `healthy`
    dls,         # as for `train`
    seeds=(0,),  # one training each
    watch=None   # as for `train`
): # pandas.DataFrame: case, seed, right, first (rule, layer, step), errors, warnings, notes
    "Train every case, and see what its diagnosis says."
    import pandas as pd
    found = [(nm, seed, case, diagnose(train(case, dls, seed, watch))) for nm,case in cases.items()
             for seed in seeds]
    rows = [dict(case=nm, seed=seed, right=is_right(case, o), first=_first_line(o), errors=len(o.of('error')),
                 warnings=len(o.of('warning')), notes=len(o.of('note'))) for nm,seed,case,o in found]
    return pd.DataFrame(rows)

def _first_line(findings):
    if not findings: return ''
    o = findings[0]
    return '  '.join(part for part in (o.level, o.rule, o.layer, f'from step {o.steps[0]}' if o.steps else '')
                     if part)
