"""What the parts of `bench/all.py` share: times taken in turns, the ceilings of the machine, and rows of one format.

    python bench/measure.py [--device cuda] [--json]    # the ceilings: a large matrix product, and a copy

A row compares two times of the same work: `ratio` is how many times as fast ours is as what stands beside it. Beside it stands a peer, or a ceiling: then `ratio` is the part of the ceiling that is reached.
"""
import argparse, json, math, time

import torch

def arguments(doc, **more): # -> a parser with --device and --json; `more` are whole numbers and what they are by default
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    add_json(p)
    for k,v in more.items(): p.add_argument(f'--{k.replace("_", "-")}', type=int, default=v)
    return p

def add_json(p): p.add_argument('--json', action='store_true', help='the last line of the output is the rows, for bench/all.py')

def in_turns(fs, repeats, device='cpu', warm=2): # {name: function} -> {name: median seconds}
    "One round runs each once, so that a clock that drifts, or a neighbour, does so for all"
    def once(f):
        if device=='cpu': t = time.perf_counter(); f(); return time.perf_counter()-t
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(); start.record(); f(); end.record(); torch.cuda.synchronize()
        return start.elapsed_time(end)/1e3
    for f in fs.values():
        for _ in range(warm): f()
    rounds = [[once(f) for f in fs.values()] for _ in range(repeats)]
    return {k: sorted(v)[len(v)//2] for k,v in zip(fs, zip(*rounds))}

def ceilings(device, dtype=torch.float32, repeats=20): # (FLOP/s of a large product, bytes/s of a copy: each byte is read and written)
    m, big = (8192, 2**29) if device=='cuda' else (1024, 2**25)
    x, y, u = torch.randn(m, m, device=device).to(dtype), torch.randn(m, m, device=device).to(dtype), torch.ones(big, device=device).to(dtype)
    v = torch.empty_like(u)
    t = in_turns({'matmul': lambda: x@y, 'copy': lambda: v.copy_(u)}, repeats, device)
    return 2*m**3/t['matmul'], 2*u.nbytes/t['copy']

def row(what, seconds, beside, theirs, bound, ceiling=False, **more): # `more`: tokens, flops, bytes, active parameters; of one call, as the seconds are
    return dict(what=what, seconds=seconds, beside=beside, their_seconds=theirs, ratio=theirs/seconds, ceiling=ceiling, bound=bound) | more

def not_run(what, why): return dict(what=what, not_run=why)

def slope(points): # [(x, y)] -> exponent of y = c x^e, least squares in logarithms
    (x, y), n = (([math.log(v) for v in c]) for c in zip(*points)), len(points)
    return sum((a-sum(x)/n)*b for a,b in zip(x, y)) / sum((a-sum(x)/n)**2 for a in x)

def growth(what, along, points): return dict(what=what, along=along, points=[list(p) for p in points], exponent=slope(points), last=slope(points[-2:]))   # `last`: between the two largest, nearer to where it is going

def give(args, rows=(), growth=(), **more): # the one line that bench/all.py reads
    if args.json: print(json.dumps(dict(rows=list(rows), growth=list(growth)) | more), flush=True); return
    for r in rows: print(f"{r['what']}: not run, {r['not_run']}" if 'not_run' in r else f"{r['what']}: {1e3*r['seconds']:,.3f} ms, {r['ratio']:.2f} of {r['beside']} ({r['bound']})")
    for g in growth: print(f"{g['what']}: grows with {g['along']} to the power of {g['exponent']:.2f}, {g['last']:.2f} at the end")

if __name__=='__main__':
    a = arguments(__doc__).parse_args()
    machine = {str(t).removeprefix('torch.'): dict(zip(('flops', 'copy'), ceilings(a.device, t))) for t in (torch.float32, torch.bfloat16)}
    for k,v in machine.items(): print(f"{k}: {v['flops']/1e9:,.1f} GFLOP/s in a matrix product, {v['copy']/1e9:,.1f} GB/s in a copy")
    give(a, machine=machine)
