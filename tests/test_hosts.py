"""Two hosts, each with an address of its own: what they train is what one process trains, also if one of them is lost in the middle of an epoch.

A host is a network namespace here, and the network a pair of virtual cards: processes, launchers, addresses and lost packets are
real, the wire and the second machine are not, and the disk is shared."""
import os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
if not torch.distributed.is_available(): pytest.skip('torch was built without distributed', allow_module_level=True)

root = Path(__file__).resolve().parent.parent
env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'TORCH_CPP_LOG_LEVEL': 'ERROR'}

script = '''
import os, sys, time, torch
import torch.nn.functional as F
from pathlib import Path
from torch import nn, optim
from miniai.accel import DDPCB
from miniai.activations import ActivationStats
from miniai.callback import Callback
from miniai.checkpoint import CheckpointCB
from miniai.datasets import DataLoaders, MemoryLoader
from miniai.device import set_seed
from miniai.distributed import is_main
from miniai.learner import Learner, MetricsCB, TrainCB
from miniai.training import accuracy

torch.set_num_threads(1)
out, n = Path(sys.argv[1]), int(os.environ.get('WORLD_SIZE', 1))

class SlowCB(Callback):
    "Time to lose a host in step 8, which is in the second of three epochs."
    epoch = None
    def before_batch(self, learn):
        if not learn.training: return
        if learn.epoch != self.epoch and is_main(): (out/'began').open('a').write(f'{n} {learn.epoch} {learn.n_steps}\\n')
        self.epoch = learn.epoch
        if learn.n_steps == 8 and n > 1 and len(sys.argv) > 2: time.sleep(6)

set_seed(1)
cols = dict(x=torch.randn(118, 8), y=torch.randint(0, 4, (118,)))
dls = DataLoaders(MemoryLoader(None, cols, 24//n, shuffle=True), MemoryLoader(None, cols, 24//n))   # 24 in all processes together
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
stats = ActivationStats(nn.ReLU)
learn = Learner(model, dls, F.cross_entropy, lr=.01, opt_func=optim.AdamW,
                cbs=[TrainCB(), DDPCB(timeout=8), MetricsCB(accuracy), stats, CheckpointCB(out/'saved', every=2), SlowCB()])
learn.fit(3, resume=out/'saved')
rows = {}
for history in (learn.history, stats.history):
    for phase,source,stat in history.keys():
        s = history.series(source, stat, phase)
        rows[f'{phase} {source} {stat}'] = s.steps, s.samples, s.values
if is_main(): torch.save([rows, dict(model.state_dict())], out/'out.pt')
'''

def sh(command): return subprocess.run(command.split(), capture_output=True, text=True)

class Hosts:
    "Two network namespaces and the cable between them."
    addresses = '10.207.19.1', '10.207.19.2'
    def __init__(self):
        self.names, self.processes = [f'mi{os.getpid()}{o}' for o in 'ab'], []

    def __enter__(self):
        a, b = self.names
        for command in (f'ip netns add {a}', f'ip netns add {b}', f'ip link add eth0 netns {a} type veth peer name eth0 netns {b}'):
            done = sh(command)
            if done.returncode:
                self.__exit__()
                pytest.skip(f'network namespaces cannot be made here: {command}: {done.stderr.strip()}')
        for nm,address in zip(self.names, self.addresses):
            for command in (f'address add {address}/24 dev eth0', 'link set eth0 up', 'link set lo up'): sh(f'ip -n {nm} {command}')
        return self

    def pids(self, i): return [int(o) for o in sh(f'ip netns pids {self.names[i]}').stdout.split()]
    def kill(self, i):
        for pid in self.pids(i): os.kill(pid, signal.SIGKILL)

    def lose(self, i):
        "Pull the plug of a host: no packet says that it is gone."
        sh(f'ip -n {self.names[i]} link set eth0 down')
        self.kill(i)

    def __exit__(self, *args):
        for i,nm in enumerate(self.names):
            self.kill(i)
            sh(f'ip netns delete {nm}')
        for o in self.processes: o.communicate()

    def launch(self, i, folder, *options, args=()):
        command = ['ip', 'netns', 'exec', self.names[i], sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node=1', *options,
                   '--rdzv-backend=c10d', f'--rdzv-endpoint={self.addresses[0]}:29511', '--rdzv-id=hosts', f'--local-addr={self.addresses[i]}',
                   f'--rdzv-conf=last_call_timeout=30,keep_alive_interval=1,is_host={not i}', str(folder/'train.py'), str(folder), *args]
        own = {**env, 'GLOO_SOCKET_IFNAME': 'eth0'}
        self.processes.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return self.processes[-1]

    def sent(self, i): return int(sh(f'ip netns exec {self.names[i]} cat /sys/class/net/eth0/statistics/tx_bytes').stdout)

@pytest.fixture(autouse=True)
def has_ip():
    if not shutil.which('ip'): pytest.skip('there is no command `ip` (package iproute2)')

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp('alone')
    (folder/'train.py').write_text(script)
    done = subprocess.run([sys.executable, str(folder/'train.py'), str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder/'out.pt', weights_only=False)

def is_that_of(alone, folder):
    (one, weights), (two, others) = alone, torch.load(folder/'out.pt', weights_only=False)
    assert set(one) == set(two) and len(one['train batch loss'][0]) == 15
    for key,values in one.items():
        if key.startswith('valid batch'): continue   # each process has its own
        for a,b in zip(values, two[key]): torch.testing.assert_close(torch.as_tensor(b), torch.as_tensor(a), rtol=1e-5, atol=1e-5, msg=key)
    for nm,w in weights.items(): torch.testing.assert_close(others[nm], w, rtol=0, atol=1e-6)

def test_two_hosts_equal_one_process(alone, tmp_path):
    (tmp_path/'train.py').write_text(script)
    with Hosts() as hosts:
        both = [hosts.launch(i, tmp_path, '--nnodes=2') for i in range(2)]
        said = [o.communicate(timeout=300) for o in both]
        assert all(o.returncode == 0 for o in both), [err[-2000:] for _,err in said]
        assert min(hosts.sent(i) for i in range(2)) > 15*4*sum(w.numel() for w in alone[1].values())   # gradients went over the cable
    is_that_of(alone, tmp_path)

def lose_a_host(folder, how='lose'):
    "The steps that one host began with after the other was lost; it is lost in step 8, and every second step is saved."
    (folder/'train.py').write_text(script)
    with Hosts() as hosts:
        first, second = [hosts.launch(i, folder, '--nnodes=1:2', '--max-restarts=3', args=['slow']) for i in range(2)]
        began = time.monotonic()
        while not (folder/'saved/step_000000008.pt').exists():
            assert first.poll() is None and time.monotonic() - began < 240
            time.sleep(.05)
        getattr(hosts, how)(1)
        _, said = first.communicate(timeout=240)
        assert first.returncode == 0, said[-3000:]
    return [tuple(map(int, line.split())) for line in (folder/'began').read_text().splitlines()]

def test_a_lost_host_costs_the_steps_since_the_last_checkpoint(alone, tmp_path):
    "The other one goes on by itself from the middle of the epoch, without asking anybody."
    began = lose_a_host(tmp_path)
    assert began == [(2, 0, 0), (2, 1, 5), (1, 1, 8), (1, 2, 10)]   # processes, epoch, steps done
    is_that_of(alone, tmp_path)
