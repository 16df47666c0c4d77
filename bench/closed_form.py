"""The closed form of one layer at real size: seconds by stage, peak memory, FLOP/s beside a matrix product's, and residuals.

    python bench/closed_form.py                                              # DeepSeek-V2-Lite on a GPU, a small layer on a CPU
    python bench/closed_form.py --size v3 --solver iterative --budget 40     # GB that the solver may take
    python bench/closed_form.py --solver both --out results/closed-form.json
    python bench/closed_form.py --grow                                       # how its time grows with tokens, experts and width

The layer is random: inputs whose variances fall like 1/j, a correlated router, and neurons of unequal weight of which the strongest quarter
stays. Residuals are taken in float64, from features computed anew, in 64 columns. What is timed is what `fit_down` does: reading the states, routing aside,
`expert_hidden`, `add`, `solve`.
"""
import argparse, json, time
from pathlib import Path
from types import SimpleNamespace

import torch

from measure import add_json, ceilings, give, growth, row
from moe_fuse.checkpoint import write_atomic
from moe_fuse.expert_analysis import *
from moe_fuse.fusion import *

SIZES = dict(small=dict(n=16, h=256, i=128, r=32, s=256, k=4, tokens=8192),
             medium=dict(n=64, h=512, i=352, r=88, s=704, k=6, tokens=32768),
             v2_lite=dict(n=64, h=2048, i=1408, r=352, s=2816, k=6, tokens=262144),
             v3=dict(n=256, h=7168, i=2048, r=512, s=2048, k=8, tokens=262144))

class Layer:
    "Inputs and outputs of a teacher's layer, and the slim layer to be fitted"
    def __init__(self, n, h, i, r, s, k, tokens, held, device):
        self.g, self.device, self.held, self.k, self.n = torch.Generator(device).manual_seed(0), device, held, k, n
        rand = lambda *shape, scale=1.: torch.randn(shape, generator=self.g, device=device, dtype=torch.bfloat16).mul_(scale)
        gate_up, down = torch.stack([rand(2*i, h, scale=h**-.5) for _ in range(n)]), torch.stack([rand(h, i, scale=i**-.5) for _ in range(n)])
        down *= (1+torch.arange(i, device=device)*8/i).rsqrt().bfloat16()            # the first neurons are the strongest
        shared, self.shared_down, router = rand(2*s, h, scale=h**-.5), rand(h, s, scale=s**-.5).float(), rand(h, n).float()
        spread = h**.5*(1+torch.arange(h, device=device)).rsqrt(); spread *= (h/spread.square().sum())**.5
        self.x, self.y = (torch.empty(tokens+held, h, dtype=torch.bfloat16, device=device) for _ in range(2))
        self.ids, self.weights = torch.empty(tokens+held, k, dtype=torch.long, device=device), torch.empty(tokens+held, k, device=device)
        act = torch.nn.functional.silu
        teacher = SimpleNamespace(gate_up_proj=gate_up, down_proj=down, act_fn=act)
        for a in range(0, tokens+held, 4096):
            b = slice(a, min(a+4096, tokens+held))
            x = torch.randn(b.stop-a, h, generator=self.g, device=device)*spread
            w, self.ids[b] = (x@router*h**-.5).softmax(1).topk(k, 1); self.weights[b] = k*w/w.sum(1, keepdim=True)
            self.x[b] = x; x = self.x[b] if device=='cuda' else x
            weights = teacher if device=='cuda' else SimpleNamespace(gate_up_proj=gate_up.float(), down_proj=down.float(), act_fn=act)
            p = sort_pairs(self.ids[b], self.weights[b], n)
            sh = x.float()@shared.float().T; sh = (act(sh[:,:s])*sh[:,s:])@self.shared_down.T
            self.y[b] = combine(grouped_linear(expert_hidden(weights, x, p), weights.down_proj, p.counts).float(), p, len(x)) + sh
        self.slim = SimpleNamespace(gate_up_proj=torch.cat([gate_up[:,:r], gate_up[:,i:i+r]], 1).float(), act_fn=act)
        self.down, self.shared, self.s = down[:,:,:r].float().contiguous(), shared.float(), s
    def features(self, a, b): # (h [P, r], pairs, shared [T, S], y [T, H])
        x, p = self.x[a:b].float(), sort_pairs(self.ids[a:b], self.weights[a:b], self.n)
        sh = x@self.shared.T
        return expert_hidden(self.slim, x, p), p, self.slim.act_fn(sh[:,:self.s])*sh[:,self.s:], self.y[a:b].float()
    def batches(self, step): return [(a, min(a+step, len(self.x)-self.held)) for a in range(0, len(self.x)-self.held, step)]

def now(device):
    if device=='cuda': torch.cuda.synchronize()
    return time.perf_counter()

def residual(layer, down, shared, columns=64):
    "||A d - b|| / ||b|| in float64; the penalty is that of `solve`"
    n, h, r = down.shape; m, cols = n*r, torch.arange(0, h, max(1, h//columns), device=down.device)[:columns]
    flat = lambda d,s: torch.cat([d.transpose(1,2).reshape(m, h), s.T])[:,cols].double()
    d0 = flat(layer.down, layer.shared_down); d = flat(down, shared)-d0
    Ad, b, diagonal = torch.zeros_like(d), torch.zeros_like(d), 0.
    for a,e in layer.batches(4096):
        hid, p, sh, y = layer.features(a, e); hw, sh = hid.double()*p.weight[:,None], sh.double()
        rows = [(slice(j*r, j*r+r), t, v) for j,(t,v) in enumerate(zip(p.token.split(p.counts), hw.split(p.counts)))]
        u, left = sh@d[m:], y[:,cols].double() - sh@d0[m:]
        for q,t,v in rows: u[t] += v@d[q]; left[t] -= v@d0[q]
        for q,t,v in rows: Ad[q] += v.T@u[t]; b[q] += v.T@left[t]
        Ad[m:] += sh.T@u; b[m:] += sh.T@left; diagonal = diagonal + hw.square().sum() + sh.square().sum()
    return ((Ad + 2*diagonal/(len(layer.x)-layer.held)*d - b).norm()/b.norm()).item()

def held_out(layer, down, shared):
    n, ys, hats = len(layer.x), [], []
    for a in range(n-layer.held, n, 4096):
        h, p, sh, y = layer.features(a, min(a+4096, n))
        ys.append(y); hats.append(combine(grouped_linear(h, down, p.counts), p, len(y)) + sh@shared.T)
    return fvu(torch.cat(ys), torch.cat(hats))

@torch.no_grad()
def fit_layer(layer, solver='direct', budget=None): # -> (down, shared, the fit, {stage: seconds})
    dev = layer.device
    start = t = now(dev); seconds = dict.fromkeys(('features','add','solve'), 0.)
    fit = JointRidge(layer.down, layer.shared_down, budget, direct=solver=='direct')
    for a,b in layer.batches(min(fit.step, 8192)):
        parts = layer.features(a, b); t2 = now(dev); seconds['features'] += t2-t
        fit.add(*parts); t = now(dev); seconds['add'] += t-t2
    down, shared = fit.solve(); end = now(dev)
    return down, shared, fit, seconds | dict(solve=end-t, total=end-start)

def flops(size, iterations=None): # of each stage; `iterations` of conjugate gradients, None for the direct solve
    (n, h, r, s, k, T), pairs = (size[x] for x in ('n','h','r','s','k','tokens')), size['tokens']*size['k']
    f, rhs = n*r+s, (pairs*r+T*s)*h*4
    if iterations is None: add, solve = pairs*r*f + T*s*s*2, f**3/3 + 2*f*f*h                             # the triangle: half of 2 F
    else: add, solve = pairs*r*r*2 + T*s*s*2, (iterations+1)*rhs
    return dict(features=pairs*r*h*4 + T*s*h*4, add=rhs+add, solve=solve)

@torch.no_grad()
def measure(layer, size, solver, budget, top):
    dev = layer.device
    base = torch.cuda.memory_allocated() if dev=='cuda' else 0
    if dev=='cuda': torch.cuda.reset_peak_memory_stats()
    down, shared, fit, seconds = fit_layer(layer, solver, budget)
    work = flops(size, None if solver=='direct' else fit.iterations)
    return dict(solver=solver, budget=budget, F=size['n']*size['r']+size['s'], seconds={x: round(v, 2) for x,v in seconds.items()},
                tflops={x: round(v/seconds[x]/1e12, 2) for x,v in work.items()}, matmul_tflops=round(top/1e12, 2),
                peak_gb=round((torch.cuda.max_memory_allocated()-base)/1e9, 2) if dev=='cuda' else None, residual=residual(layer, down, shared),
                iterations=getattr(fit, 'iterations', None), fvu_before=held_out(layer, layer.down, layer.shared_down), fvu=held_out(layer, down, shared))

@torch.no_grad()
def grow(dev): # (the row of the middle size, growth along each axis)
    "One axis at a time: the others stay at the middle. The best of three"
    middle = SIZES['small'] | (dict(n=64, h=1024, i=704, r=176, s=704, k=6, tokens=65536) if dev=='cuda' else {})
    def seconds(**change):
        size = middle | change
        layer = Layer(**size, held=0, device=dev); fit_layer(layer)
        return size, min((fit_layer(layer)[3] for _ in range(3)), key=lambda s: s['total'])
    size, base = seconds(); top, work = ceilings(dev)[0], sum(flops(size).values())
    rows, out = [row(f"closed form of a layer, {size['n']} experts, {size['h']} wide", base['total'], 'a matrix product of as many FLOPs', work/top, 'FLOPs', ceiling=True, tokens=size['tokens'], flops=work)], []
    for axis,name in dict(tokens='tokens', n='experts', h='width').items():
        points = [(size[axis]*m//4, base if m==4 else seconds(**{axis: size[axis]*m//4})[1]) for m in ((2, 4, 8, 16, 32) if axis=='n' else (2, 4, 8, 16))]
        out += [growth(f'closed form, {stage}', name, [(x, s[stage]) for x,s in points]) for stage in base]
    return rows, out

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--size', choices=list(SIZES)); p.add_argument('--tokens', type=int); p.add_argument('--solver', choices=['direct','iterative','both'], default='direct')
    p.add_argument('--budget', type=float, help='GB that the solver may take'); p.add_argument('--out', type=Path)
    p.add_argument('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu'); p.add_argument('--grow', action='store_true', help='time alone, at several sizes'); add_json(p)
    a = p.parse_args(); dev = a.device
    if a.grow: give(a, *grow(dev)); raise SystemExit
    name = a.size or ('v2_lite' if dev=='cuda' else 'small')
    size = SIZES[name] | (dict(tokens=a.tokens) if a.tokens else {})
    with torch.no_grad(): layer = Layer(**size, held=min(16384, size['tokens']//4), device=dev)
    top = ceilings(dev)[0]
    for solver in ['direct','iterative'] if a.solver=='both' else [a.solver]:
        r = dict(size=name, **size) | measure(layer, size, solver, a.budget and int(a.budget*1e9), top) | dict(device=torch.cuda.get_device_name() if dev=='cuda' else 'cpu', torch=torch.__version__)
        print(json.dumps(r), flush=True)
        if a.out:
            rows = json.loads(a.out.read_text()) if a.out.exists() else []
            a.out.parent.mkdir(exist_ok=True, parents=True); write_atomic(a.out, json.dumps(rows+[r], indent=1)+'\n')
