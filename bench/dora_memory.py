"""Bytes and seconds of one training step of a DoRA adapter: packed bases against peft over a bfloat16 and an NF4 base.

    python bench/dora_memory.py                                  # one layer of DeepSeek-V3's dense MLP, 7168 -> 18432, 512 tokens
    python bench/dora_memory.py --out 2048 --tokens 4096 --r 64

"held" is the layer with its adapter; "peak" is the most that the tensors of one step (forward, backward to input and adapter) take at once on top of it,
as torch's allocator counts them: on a GPU from its statistics, on a CPU from the profiler. What libraries allocate for themselves is not in it.
Ratios are to the first row.
"""
import argparse, gc, time
from importlib.util import find_spec

import torch
from torch import nn

from moe_fuse.quantized_linear import AWQLinear, DoRALinear, FP8Linear

def random_base(kind, a):
    "A frozen layer of random bytes"
    o, i, d = a.out, a.in_, dict(device=a.device)
    if kind=='FP8': return FP8Linear(torch.randint(0, 120, (o, i), dtype=torch.uint8, **d).view(torch.float8_e4m3fn), torch.full((-(-o//128), -(-i//128)), 1e-4, **d))
    if kind=='AWQ':
        words = lambda rows: torch.randint(-2**31, 2**31-1, (rows, o//8), dtype=torch.int32, **d)
        return AWQLinear(words(i), words(i//128), torch.full((i//128, o), 1e-3, dtype=torch.float16, **d))
    lin = nn.Linear(i, o, bias=False, dtype=torch.bfloat16, **d)
    if kind=='bfloat16': return lin
    import bitsandbytes as bnb
    new = bnb.nn.Linear4bit(i, o, bias=False, quant_type='nf4', compute_dtype=torch.bfloat16)
    new.load_state_dict(lin.cpu().state_dict())
    return new.to(a.device)

def with_dora(base, how, a):
    if how=='ours': return DoRALinear(base, a.r, 2*a.r)
    from peft import LoraConfig, get_peft_model
    return get_peft_model(nn.Sequential(base, nn.Linear(1, 1, device=a.device)), LoraConfig(r=a.r, lora_alpha=2*a.r, use_dora=True, target_modules=['0'])).base_model.model[0]

def peak_bytes(f, device):
    "The most that tensors made while `f` runs take at once"
    if device!='cpu':
        torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
        f(); return torch.cuda.max_memory_allocated()-before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p: f()
    sizes = [e.nbytes() for e in sorted(p.profiler.kineto_results.events(), key=lambda e: e.start_ns()) if e.name()=='[memory]']
    return max(torch.tensor(sizes).cumsum(0)).item()

def measure(kind, how, a): # -> (bytes held, bytes at the peak on top, seconds)
    torch.manual_seed(0)
    layer = with_dora(random_base(kind, a), how, a)
    held = sum(t.nbytes for t in layer.state_dict().values())
    x = torch.randn(a.tokens, a.in_, dtype=torch.bfloat16, device=a.device).requires_grad_()
    def step():
        layer(x).sum().backward()
        x.grad = None
        for p in layer.parameters(): p.grad = None
        if x.is_cuda: torch.cuda.synchronize()
    step()                                                                     # libraries load what they load
    gc.collect()
    peak, start = peak_bytes(step, a.device), time.time()
    for _ in range(a.steps): step()
    return held, peak, (time.time()-start)/a.steps

JOBS = [('bfloat16', 'peft'), ('bfloat16', 'ours'), ('NF4', 'peft'), ('FP8', 'ours'), ('AWQ', 'ours')]

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=int, default=18432); p.add_argument('--in', type=int, default=7168, dest='in_')
    p.add_argument('--tokens', type=int, default=512); p.add_argument('--r', type=int, default=16); p.add_argument('--steps', type=int, default=3)
    p.add_argument('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    a = p.parse_args()
    if not find_spec('bitsandbytes'): print('bitsandbytes is not installed: no NF4 base\n'); JOBS = [j for j in JOBS if j[0]!='NF4']
    results = [measure(*job, a) for job in JOBS]
    name = torch.cuda.get_device_name() if a.device=='cuda' else f'CPU, {torch.get_num_threads()} threads'
    print(f'{a.in_} -> {a.out}, {a.tokens} tokens, r = {a.r}, {name}, torch {torch.__version__}\n')
    print('| base | DoRA | held, MB | peak on top, MB | both, MB | ratio to the first row | seconds a step | ratio |\n|---|---|---:|---:|---:|---:|---:|---:|')
    (h0, p0, s0) = results[0]
    for (kind,how),(h,pk,s) in zip(JOBS, results): print(f'| {kind} | {how} | {h/1e6:.1f} | {pk/1e6:.1f} | {(h+pk)/1e6:.1f} | {(h+pk)/(h0+p0):.2f} | {s:.3f} | {s/s0:.2f} |')
