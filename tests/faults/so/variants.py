"""Programs in the words of `cases_so`, written after the rules: other tasks, nets, losses and rates for the same kinds of fault, to see whether rules hold there.

`python variants.py [--only ID,..] [--jobs 2] [--out r.json]` prints what was found, and each run that was not named or raised an alarm.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from so import run
from so.case import Registry
from so.parts import blobs, boxes, formula, images, iris, linreg, scaled, waves, words

cases = Registry()
one = 'one_unit_softmax'

def so(cls, accept, data, net, loss, opt='adam', fix=None, **kw):
    cases.add(str(100001 + len(cases)), cls, accept, net, data, net, loss, opt, fix, **kw)

so('S1',one,images(500,2,28,classes=(3,8)),'c8r/2 c16r/2 flat 32r 1x','bce','sgd m.9',lr=.02,bs=16,epochs=5,fix=dict(head='1s'))
so('S1',one,words(600,20,200),'emb200,16 lstm16 1x','bce','adam',lr=.005,bs=32,epochs=6,fix=dict(head='1s'))
so('S1',one,blobs(800,12),'24t 12t 1x','mse','adam',lr=.01,bs=64,epochs=15,fix=dict(head='1s'))
so('S1',one+' class_ids_vs_units',blobs(800,16,4),'32r 1x','mse','adam',lr=.01,bs=32,epochs=10,y='col',fix=dict(head='4',loss='ce',y='ids'))
so('S1',one+' head_range target_scale',linreg(600,8),'64r 1x','mse','adam',lr=.01,bs=32,epochs=20,fix=dict(head='1',ys='std'))
so('S1',one,waves(300,40,3),'gru16 8r 1x','kbce','rmsprop',lr=.003,bs=20,epochs=8,fix=dict(head='1s',loss='bce'))
# R
so('R','head_range target_scale',linreg(800,6),'64r 64r 1s','mse','adam',lr=.003,bs=64,epochs=15,fix=dict(head='1',ys='std'))
so('R','head_range target_scale',linreg(800,6),'64t 1t','mae','sgd m.9',lr=.01,bs=32,epochs=15,fix=dict(head='1',ys='std'))
so('R','head_range dead',linreg(800,6),'64r 1r','mse','adam',lr=.003,bs=32,epochs=15,ys='std',fix=dict(head='1'))
so('R','head_range',linreg(800,6),'64r 32r 1s','mse','adam',lr=.003,bs=32,epochs=15,ys='std',fix=dict(head='1'))
so('R','head_range target_scale',formula(500,lambda x:(x**3)[:, :1],(-3,3)),'32t 32t 1t','mse','adam',lr=.005,bs=25,epochs=40,fix=dict(head='1',ys='std'))
so('R','head_range wrong_loss',blobs(700,20),'32r 1s','mse','adam',lr=.003,bs=32,epochs=10,y='pm',fix=dict(head='1t',thr=0.))
so('R','head_range',waves(300,48,1,4,real=True,chan_first=True,noise=.2),'c8r p c8r p flat 32r 1r','mse','adam',lr=.003,bs=16,epochs=15,fix=dict(head='1'))
so('R','head_range target_scale wrong_loss',boxes(300),'c8r p c16r p flat 64r 4s','mse','adam',lr=.002,bs=20,epochs=12,fix=dict(head='4',ys='01'))
# K
ids='class_ids_vs_units head_range wrong_loss loss_input'
so('K',ids,blobs(900,20,5),'64r 32r 1s','mse','adam',lr=.003,bs=32,epochs=10,y='col',fix=dict(head='5',loss='ce',y='ids'))
so('K',ids,images(900,10,20),'c8r/2 c16r/2 flat 1s','mse','adam',lr=.003,bs=32,epochs=6,y='col',fix=dict(head='10',loss='ce',y='ids'))
so('K',ids,iris,'16r 16r 1','bcel','adam',lr=.01,bs=16,epochs=30,y='col',fix=dict(head='3',loss='ce',y='ids'))
so('K',ids+' '+one,images(600,4,20),'c8r/2 flat 32r 1','ce','adam',lr=.003,bs=32,epochs=5,y='col',fix=dict(head='4',y='ids'))
# B
relu='loss_input head_range dead'
so('B',relu,blobs(800,20),'32r 16r 1r','bcel','adam',lr=.003,bs=32,epochs=8,fix=dict(head='1'))
so('B',relu,images(800,6,20),'c8r/2 flat 64r 6r','ce','sgd m.9',lr=.05,bs=32,epochs=5,fix=dict(head='6'))
so('B','loss_input',blobs(600,15),'32t 1','kbce','adam',lr=.003,bs=32,epochs=8,fix=dict(head='1s',loss='bce'))
# M
so('M','loss_input',blobs(800,20,8),'64r 8s','ce','adam',lr=.002,bs=32,epochs=6,fix=dict(head='8'))
so('M','loss_input',images(1500,10,20),'c16r/2 c16r/2 flat 10x','ce','sgd m.9',lr=.02,bs=32,epochs=4,fix=dict(head='10'))
so('M','loss_input',waves(400,40,2,3),'lstm24 3x','ce','adam',lr=.005,bs=20,epochs=8,fix=dict(head='3'))
so('M','loss_input',blobs(800,30,5),'32r 5t','ce','adam',lr=.003,bs=32,epochs=8,fix=dict(head='5'))
so('M','loss_input',blobs(800,20,6),'64r 6x','nll','adam',lr=.003,bs=32,epochs=8,fix=dict(head='6',loss='ce'))
# H
so('H','lr_high',images(1500,10,20),'flat 64r 10','ce','sgd m.9',lr=1.,bs=32,epochs=3,fix=dict(lr=.01))
so('H','lr_high',blobs(900,20,5),'64r 64r 5','ce','adam',lr=.5,bs=32,epochs=8,fix=dict(lr=.003))
so('H','lr_high nan exploding',linreg(600,8),'64r 1','mse','sgd',lr=.3,bs=32,epochs=8,ys='std',fix=dict(lr=.01))
so('H','lr_low too_few_updates',blobs(900,20,5),'64r 64r 5','ce','adam',lr=1e-6,bs=32,epochs=8,fix=dict(lr=.003))
so('H','lr_low too_few_updates',images(1500,10,20),'c8r/2 flat 64r 10','ce','sgd',lr=1e-5,bs=32,epochs=4,fix=dict(lr=.05))
so('H','too_few_updates',linreg(300,8),'64r 1','mse','adam',lr=.001,bs=100,epochs=3,ys='std',fix=dict(lr=.01,bs=16,epochs=30))
so('H','init',blobs(900,20,5),'64r 64r 64r 5','ce','sgd',lr=.05,bs=32,epochs=6,init='n1',fix=dict(init='he'))
# D
so('D','input_scale',images(1500,10,20,unit=False),'flat 64t 10','ce','sgd',lr=.05,bs=32,epochs=4,fix=dict(xs=255.))
so('D','input_scale',scaled(blobs(800,12)),'32r 16r 1s','bce','adam',lr=.003,bs=32,epochs=10,fix=dict(xs='std'))
so('D','input_scale',scaled(blobs(800,12,4)),'32t 4','ce','sgd m.9',lr=.02,bs=32,epochs=10,fix=dict(xs='std'))
so('D','target_scale lr_high nan',linreg(700,10),'64r 1','mse','sgd',lr=.01,bs=32,epochs=12,fix=dict(ys='std'))
# N
so('N','no_nonlinearity',blobs(800,10,2,per=2,sep=4.),'64 32 1','bcel','adam',lr=.005,bs=32,epochs=12,fix=dict(net='64r 32r 1'))
so('N','no_nonlinearity',formula(600,lambda x:(x[:, :1]*x[:, 1:2]),(-1,1),(-1,1)),'64 64 1','mse','adam',lr=.005,bs=32,epochs=20,fix=dict(net='64r 64r 1'))
# M2, V, O
two='wrong_loss loss_input'
so('M2',two,images(800,8,20),'c8r/2 c8r/2 flat 8','bcel','adam',lr=.002,bs=32,epochs=3,y='hot',fix=dict(loss='ce',y='ids'))
so('V','vanishing saturated',blobs(900,20,4),'32s 32s 32s 32s 32s 32s 4','ce','sgd',lr=.1,bs=32,epochs=8,fix=dict(net='32r 32r 32r 4'))
so('V','vanishing saturated init',images(1500,10,20),'flat 64t 64t 64t 64t 64t 64t 64t 10','ce','sgd',lr=.01,bs=32,epochs=4,init='uniform',fix=dict(init='glorot',lr=.05))
so('O','dropout_misplaced regularisation',blobs(900,20,5),'64r d.9 64r d.9 5','ce','adam',lr=.003,bs=32,epochs=8,fix=dict(net='64r d.2 64r 5'))
so('O','regularisation',blobs(900,20,5),'64r 64r 5','ce','adam wd.5',lr=.003,bs=32,epochs=8,fix=dict(opt='adam'))
so('O','shape_broadcast',linreg(600,6),'64r 1','mse','adam',lr=.005,bs=32,epochs=15,ys='std',io=lambda x,y:(x,y[:,0]),fix=dict(io=None))
so('O','shuffle',images(1000,10,20),'c8r/2 flat 64r 10','ce','adam',lr=.002,bs=32,epochs=3,shuffle=False,io=lambda x,y:(x[y.argsort()],y[y.argsort()]),fix=dict(io=None,shuffle=True))
so('O','misaligned_labels data_no_information',blobs(800,16,3),'32r 3','ce','adam',lr=.003,bs=32,epochs=8,io=lambda x,y:(x,y.roll(1)),fix=dict(io=None))
so('O','data_no_information',images(800,5,20),'c8r/2 flat 32r 5','ce','adam',lr=.003,bs=32,epochs=5,io=lambda x,y:(x*0+.3,y),fix=dict(io=None))
so('O','imbalance',blobs(800,16,3),'32r 3','ce','adam',lr=.003,bs=32,epochs=8,io=lambda x,y:(x,torch.where(torch.arange(len(y))%20<19,0,y)),fix=dict(io=None))


def report(results):
    "Print the counts, and the runs that were not named, or raised an alarm."
    rows = run.scores(results)
    counted = [o for o in rows if o['admitted']]
    n = {nm: sum(o[nm] for o in counted) for nm in ('detected', 'diagnosed', 'top1')}
    print(f'admitted {len(counted)} of {len(rows)}: {n}; alarms {sum(bool(o["alarms"]) for o in rows)}')
    for o in rows:
        if o['alarms'] or o['admitted'] and not o['diagnosed']:
            print(o['id'], cases[o['id']].faulty.net, cases[o['id']].faulty.loss, 'accepts', *sorted(cases[o['id']].accept), '| said', o['said'], '| alarms', o['alarms'])

if __name__ == '__main__':
    run.cases.clear()
    run.cases.update(cases)
    run.report = report
    run.main()
