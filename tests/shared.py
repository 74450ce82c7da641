"What several test files, and the benchmark, use."
import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from miniai.callback import Callback
from miniai.learner import TrainCB

reading = 'aten::_local_scalar_dense', 'aten::item', 'aten::nonzero', 'aten::equal', 'aten::is_nonzero'


class CountReads(TorchDispatchMode):
    "Counts reads of a tensor's value by the host."
    def __init__(self):
        super().__init__()
        self.reads, self.stacks = 0, []   # the stack of each read
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in reading:
            self.reads += 1
            self.stacks.append(''.join(traceback.format_stack()[:-1]))
        return func(*args, **(kwargs or {}))


class ReadsPerStep(Callback):
    "Host reads, as `counter` counts them, from the first event of a batch to the last."
    order = 1000
    def __init__(self, counter): self.counter = counter
    def before_fit(self, learn): self.per_step, self.stacks = [], []
    def before_epoch(self, learn): self.seen = self.counter.reads
    def cleanup_batch(self, learn):
        self.per_step.append(self.counter.reads - self.seen)
        self.stacks.append(self.counter.stacks[self.seen:])
        self.seen = self.counter.reads


class HandSGD:
    "An optimizer written by hand, with no state_dict and no groups."
    def __init__(self, params, lr): self.params, self.lr = list(params), lr
    def step(self):
        with torch.no_grad():
            for p in self.params: p -= p.grad*self.lr
    def zero_grad(self):
        for p in self.params: p.grad = None


class ClosureCB(TrainCB):
    "For optimizers that compute the loss themselves."
    def step(self, learn):
        def closure():
            learn.opt.zero_grad()
            loss = learn.loss_func(learn.model(learn.batch[0]), learn.batch[1])
            loss.backward()
            return loss
        learn.opt.step(closure)
