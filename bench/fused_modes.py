"""Does every mode of the fused layer beat a plain average of weights with the same bytes? One layer of the embedded teacher, closed form and after some steps of layer-wise distillation.

    python bench/fused_modes.py [--steps 120] [--seeds 3] [--cores 8]

Groups are random partitions, one a seed. Beside each mode stands the smallest number of cores alone that takes at least as many weights. The number is the routed output's fraction of variance unexplained on held-out text.
"""
import argparse
import torch
from transformers import AutoTokenizer
from moe_fuse.awq_loading import *
from moe_fuse.calibration import *
from moe_fuse.fusion import *
from moe_fuse.headers import *
from moe_fuse.healing import *
from moe_fuse.multiplex_lora import *
from moe_fuse.sources import *

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--steps', type=int, default=120); p.add_argument('--seeds', type=int, default=3); p.add_argument('--cores', type=int, default=8)
a = p.parse_args()
torch.set_grad_enabled(False)

ck = Checkpoint(resolve_source('demo'))
model, tok = empty_model(ck), AutoTokenizer.from_pretrained(ck.folder)
x, xv = (block_inputs(ck, 1, sample_tokens(read_docs('demo', split), tok, n)) for split,n in (('train', 32768), ('valid', 4096)))
moe = load_module(ck, model.model.layers[1], 'model.layers.1').mlp
(n, h, i), y, shared = moe.experts.down_proj.shape, moe(x), moe.shared_experts(xv)
yv, moment = moe(xv)-shared, x.T@x

def fused(mode, e, r): # -> (weights, [seeds, 2] FVU in closed form and trained)
    out = []
    for s in range(a.seeds):
        torch.manual_seed(s)
        f, order = fuse_moe(moe, torch.randperm(n)%e, torch.ones(n), r, mode, moment), torch.randperm(len(x))
        closed = fvu(yv, f(xv)-shared)
        def sample(step): rows = order[(torch.arange(512)+512*step)%len(x)]; return x[rows], y[rows]
        distill(f, sample, a.steps, lr=2e-3)
        out.append((closed, fvu(yv, f(xv)-shared)))                              # what the block is off by, its trained shared expert included
    return fused_parameters(n, h, i, e, r, mode), torch.tensor(out)

print(f'{n} experts of {h} x {i} in {a.cores} cores; {a.steps} steps of 512 tokens; mean and spread of {a.seeds} seeds\n\n| layer | weights | closed form | trained | cores alone | weights | closed form | trained |\n|---|--:|--:|--:|--:|--:|--:|--:|')
show, alone = lambda v: f'{v.mean():.3f} ± {v.std():.3f}' if len(v)>1 else f'{v.mean():.3f}', {}
for mode,r in (('cores', 0), ('multiplex', 0), ('fused_lora', 8), ('mixture', 4), ('multiplex_mixture', 4), ('exact', 4), ('exact', 8)):
    w, got = fused(mode, a.cores, r)
    e = min(e for e in range(1, n+1) if fused_parameters(n, h, i, e, 0, 'cores')>=w)
    if e not in alone: alone[e] = fused('cores', e, 0)
    ws, mean = alone[e]
    print(f'| {mode}' + (f', rank {r}' if r else '') + f' | {w:,} | {show(got[:,0])} | {show(got[:,1])} | {e} | {ws:,} | {show(mean[:,0])} | {show(mean[:,1])} |', flush=True)
