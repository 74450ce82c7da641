"What users type: test_types.py has mypy read it, and runs it."
import torch
import torch.nn.functional as F
from torch import nn, optim

from miniai.accel import AccumulateCB, GradClipCB, MixedPrecision
from miniai.activations import ActivationStats, Hook, Hooks, HooksCallback
from miniai.actfns import BaseNetwork, Swish, act_fn_by_name
from miniai.callback import Callback, CancelFitException
from miniai.checkpoint import CheckpointCB
from miniai.datasets import DataLoaders
from miniai.history import History
from miniai.hooks import select_modules
from miniai.init import BatchTransformCB, GeneralRelu, conv, init_weights
from miniai.inspector import Inspector
from miniai.learner import DeviceCB, Learner, MetricsCB, MomentumLearner, ProgressCB, SuggestedLRs, TrainCB
from miniai.lens import LossMetrics, OutputActivation, ParameterNorm
from miniai.plots import show_images
from miniai.sgd import BatchSchedCB, RecorderCB
from miniai.stats import mean_std


class Counter(Callback):
    "A callback as users write them."
    order = TrainCB.order+1
    def before_fit(self, learn): self.n = 0
    def after_batch(self, learn: Learner):
        self.n += 1
        if self.n > 10 and learn.training: raise CancelFitException()


def use_learner(dls: DataLoaders, model: nn.Module) -> float:
    counter, stats = Counter(), ActivationStats(lambda m: isinstance(m, nn.ReLU), every=2)
    cbs: list[Callback] = [TrainCB(n_inp=1), DeviceCB('cpu'), MetricsCB(accuracy=lambda p, t: (p.argmax(1) == t).float().mean()),
                           ProgressCB(plot=True), counter, stats, GradClipCB(1.), AccumulateCB(2)]
    learn = Learner(model, dls, loss_func=F.cross_entropy, lr=1e-2, cbs=cbs, opt_func=optim.AdamW)
    learn.fit(3, lr=0.1, cbs=RecorderCB(lr=lambda cb: cb.pg['lr']))
    found: SuggestedLRs = learn.lr_find(gamma=1.3, max_mult=3)
    learn.show_loop()
    learn.unwatch()   # which another room adds
    table: History = learn.history
    loss = table.series('batch', 'loss', 'valid')
    stats.color_dim(figsize=(5, 3))
    for hook in stats: print(hook.name, hook.stats[0])
    return float(loss.values[-1])*found.steepest


def use_more(dls: DataLoaders) -> MomentumLearner:
    net = nn.Sequential(*conv(1, 8, ks=3), GeneralRelu(leak=0.1), nn.Flatten(), nn.LazyLinear(10))
    net.apply(lambda m: init_weights(m, leaky=0.1))
    learn = MomentumLearner(net, dls, F.cross_entropy, lr=0.1, mom=0.9)
    learn.fit(1, cbs=[MixedPrecision(), BatchTransformCB(lambda b: b), CheckpointCB('runs', keep=2),
                      BatchSchedCB(lambda opt: optim.lr_scheduler.StepLR(opt, 10))], resume='runs')
    return learn


def use_hooks(model: nn.Module, x: torch.Tensor) -> None:
    means: list[torch.Tensor] = []
    def keep(hook, mod, inp, outp): means.append(mean_std(outp)[0])
    with Hooks(select_modules(model, '*'), keep) as hooks: model(x)
    hook = Hook(model, keep)
    hook.remove()
    print(len(hooks), HooksCallback(keep, mod_filter=nn.Linear).hooks)
    show_images([x[0], x[1]], ncols=2)


def use_inspector(net: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    inspector = Inspector([LossMetrics(loss_fn=nn.CrossEntropyLoss()), OutputActivation(), ParameterNorm()])
    inspector.attach(net)
    for xb, yb in batches: inspector.push_loss(F.cross_entropy(net(xb), yb), train=True)
    inspector.tick_epoch()
    inspector.visualizer.show_fig()


def use_lab() -> BaseNetwork:
    Swish()(torch.zeros(2))
    return BaseNetwork(act_fn_by_name['relu'](), input_size=784, num_classes=10, hidden_sizes=[64, 32])
