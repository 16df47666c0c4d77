"""How fast are slim and fused layers beside `transformers`' own routed block, and how far is each from what the machine allows?

    python bench/fused_layer.py                 # on a GPU: DeepSeek-V2-Lite's width (64 experts, 2048 x 1408, 6 a token, bfloat16), 4096 tokens and 1
    python bench/fused_layer.py --device cpu    # 64 experts, 512 x 352, float32, 512 tokens
    python bench/fused_layer.py --no-compile    # skip the compiled rows
    python bench/fused_layer.py --tune          # which tiles are fastest in the kernels of 04_gathered, and nothing else; a minute or two

The stock block runs its experts with `grouped_mm`; on a GPU also with the kernels of 04_gathered, and so does the slim one. All layers see the same tokens and the same router, and take turns, so that a clock that drifts does so for all; times are medians.
The floor of a layer is the larger of two times: its FLOPs at the rate of a large matrix product, and its bytes (each weight that is used read once, inputs read, outputs written) at the rate of a
device copy, both measured here. No launch, no gather and nothing between two products is in it. On a GPU every mode also runs once where any wait of the host raises.
"""
import argparse, copy, itertools, sys

import torch
from torch import nn
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from measure import add_json, ceilings, give, in_turns, row
from moe_fuse.gathered import *
from moe_fuse.multiplex_lora import *

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu'); p.add_argument('--no-compile', action='store_true')
p.add_argument('--tokens', type=int, nargs='+'); p.add_argument('--cores', type=int, default=8); p.add_argument('--rank', type=int, default=8)
p.add_argument('--tune', action='store_true'); p.add_argument('--part', default='0/1', help='of the tiles, to compile them in several processes')
p.add_argument('--reps', type=int, help='timed rounds'); p.add_argument('--seed', type=int, default=0); add_json(p)
a = p.parse_args()
gpu = a.device=='cuda'
N, K, H, I = (64, 6, 2048, 1408) if gpu else (64, 6, 512, 352)
dtype, reps, rows = (torch.bfloat16, a.reps or 50, []) if gpu else (torch.float32, a.reps or 15, [])
torch.manual_seed(a.seed); torch.set_grad_enabled(False)

def stock(width, n_shared):
    c = DeepseekV2Config(n_routed_experts=N, num_experts_per_tok=K, hidden_size=H, moe_intermediate_size=width, n_shared_experts=n_shared, n_group=1, topk_group=1, topk_method='greedy', num_attention_heads=16)
    c._experts_implementation = 'grouped_mm'
    with torch.device(a.device): moe = DeepseekV2Moe(c).to(dtype)
    for v in moe.parameters(): v.normal_(std=v.shape[-1]**-.5)
    return moe.eval()

moe, slim = stock(I, 2), stock(I//4, 8)
slim.gate = moe.gate; slim.shared_experts = moe.shared_experts
gate_up, down = moe.experts.gate_up_proj[:a.cores].clone(), moe.experts.down_proj[:a.cores].clone()
fused = {mode: FusedMoE(moe, torch.arange(N, device=a.device)%a.cores, gate_up, down, a.rank, mode) for mode in MODES}
for f in fused.values():
    for k,v in f.named_parameters(recurse=False):
        if k[0] in 'bm': v.normal_(std=.02)

def with_kernels(block): # the same weights, run by the kernels of 04_gathered
    b = copy.copy(block)
    b._modules = block._modules | dict(experts=copy.copy(block.experts))
    b.experts.config = copy.deepcopy(block.experts.config); b.experts.config._experts_implementation = 'gathered'
    return b

def cost(layer, x): # -> (FLOPs, bytes) of the routed part
    _, w, ids = moe.gate(x)
    fired, t, item = ids.unique(), len(x), dtype.itemsize
    io = 2*t*H*item
    if not isinstance(layer, FusedMoE):
        width = layer.experts.down_proj.shape[2]
        return 6*ids.numel()*H*width, 3*len(fired)*H*width*item + io
    d = dispatch(ids, w, layer.groups, a.cores)
    pairs, each = int(d.leads.sum()), layer.mode!='fused_lora'
    lora = 6*(ids.numel() if each else pairs)*layer.rank*(H+I)
    mine = sum(v[fired].numel() if len(v)==N else v.numel() for k,v in layer.named_parameters(recurse=False) if not k.endswith('_proj'))
    return 6*pairs*H*I + lora, (len(layer.groups[fired].unique())*3*H*I + mine)*item + io

def routed(layer): # a function of (x, weights, ids)
    return layer.routed if isinstance(layer, FusedMoE) else lambda x, w, ids: layer.experts(x, ids, w)

def report(tokens, flops, bandwidth):
    x = torch.randn(tokens, H, device=a.device, dtype=dtype)
    _, w, ids = moe.gate(x)
    layers = {'stock, grouped_mm': moe, 'slim, 25 %': slim} | ({'stock, gathered': with_kernels(moe), 'slim, 25 %, gathered': with_kernels(slim)} if gpu else {}) | {f'{a.cores} cores, {m}' + (f', rank {f.rank}' if f.rank else ''): f for m,f in fused.items()}
    parts, blocks = {k: (lambda f=routed(l): f(x, w, ids)) for k,l in layers.items()}, {k: (lambda l=l: l(x[None])) for k,l in layers.items()}
    compiled = {} if a.no_compile else {k: layers[k] for k in layers if k.startswith(('stock', 'slim')) or 'exact' in k}
    for k,l in compiled.items():
        f = torch.compile(l, fullgraph=True, dynamic=False); blocks[k+', compiled'] = lambda f=f: f(x[None])
        r = torch.compile(routed(l), fullgraph=True, dynamic=False); parts[k+', compiled'] = lambda r=r: r(x, w, ids)
    blocks['shared expert alone'] = lambda: moe.shared_experts(x)
    t, b = (in_turns(f, reps, a.device, warm=3) for f in (parts, blocks))
    s = 'stock, grouped_mm'
    print(f'\n{tokens} tokens\n\n| layer | routed, ms | times stock | block, ms | times stock | GFLOP | MB | bound by | floor, ms | floor / routed |\n|---|--:|--:|--:|--:|--:|--:|---|--:|--:|')
    for k in parts:
        base, layer = s+(', compiled' if k.endswith('compiled') else ''), layers[k.removesuffix(', compiled')]
        fl, by = cost(layer, x); tf, tb = fl/flops, by/bandwidth
        facts = dict(bound='FLOPs' if tf>tb else 'bytes', tokens=tokens, flops=fl, bytes=by)
        rows.append(row(f'routed experts, {k}', t[k], 'the larger of FLOPs and bytes at their ceilings', max(tf, tb), ceiling=True, **facts))
        if k!=base: rows.append(row(f'routed experts, {k}', t[k], f"transformers, grouped_mm{base.removeprefix(s)}", t[base], **facts))
        print(f'| {k} | {1e3*t[k]:.3f} | {t[base]/t[k]:.2f} | {1e3*b[k]:.3f} | {b[base]/b[k]:.2f} | {fl/1e9:.2f} | {by/1e6:.1f} | {"FLOPs" if tf>tb else "bytes"} | {1e3*max(tf, tb):.3f} | {max(tf, tb)/t[k]:.2f} |')
    print(f'\nshared expert alone {1e3*b["shared expert alone"]:.3f} ms; "times stock" of compiled rows is against the compiled stock block')

def graph_ms(f, n=20): # median of replays: the host's launches are not in it
    f(); torch.cuda.synchronize()
    g, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(g): f()
    for _ in range(n+3):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record(); g.replay(); b.record(); torch.cuda.synchronize(); times.append(a.elapsed_time(b))
    return sorted(times[3:])[n//2]

def tune():
    high = {4096: (128,), 256: (16, 32, 64), 1: (16,)}
    part, parts = map(int, a.part.split('/'))
    for name,f in dict(slim=slim, stock=moe, exact=fused['exact']).items():
        for tokens,heights in high.items():
            if tokens==256 and name=='stock': continue
            x = torch.randn(tokens, H, device=a.device, dtype=dtype)
            _, w, ids = moe.gate(x)
            run = lambda cut: f.in_kernels(x, w, ids, cut) if isinstance(f, FusedMoE) else gathered_experts(x, f.experts.gate_up_proj, f.experts.down_proj, ids, w, tiles=cut)
            best = list(TILES[{4096: 128, 256: 64, 1: 16}[tokens]])
            grid = {4096: (((64, 128), (128, 256)), (32, 64), (4, 8), (3, 4)), 256: (2*((64, 128),), (64, 128), (4,), (3,)), 1: (2*((16, 32, 64),), (64, 128, 256), (4,), (3, 5))}[tokens]
            for at in 0, 1:
                found = []
                for values in list(itertools.product(heights, grid[0][at], *grid[1:]))[part::parts]:
                    cut = best[:]; c = cut[at] = dict(zip(('bm', 'bn', 'bk', 'num_warps', 'num_stages'), values))
                    try: found.append((round(graph_ms(lambda: run(cut)), 4), *c.values()))
                    except Exception as ex:
                        if 'out of resource' not in str(ex) and 'OutOfResources' not in type(ex).__name__: print(c, str(ex)[:200])
                if not found: continue
                found.sort(); best[at] = dict(zip(c, found[0][1:]))
                print(name, tokens, ('gate_up', 'down')[at], 'ms, bm, bn, bk, warps, stages:', *found[:4], 'worst', found[-1], flush=True)

def check_sync(): # raises where the host waits
    x = torch.randn(256, H, device=a.device, dtype=dtype)
    for f in fused.values(): f(x)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for f in fused.values(): f(x); f(x[:1])
    finally: torch.cuda.set_sync_debug_mode('default')
    print(f'no host synchronisation in {", ".join(fused)}')

if a.tune: sys.exit(tune())
flops, bandwidth = ceilings(a.device, dtype)
print(f'{torch.cuda.get_device_name() if gpu else "CPU, %d threads" % torch.get_num_threads()}, torch {torch.__version__}, {str(dtype).removeprefix("torch.")}; {N} experts, {K} a token, {H} x {I}; medians of {reps}')
print(f'ceilings: {flops/1e12:.3g} TFLOP/s in a matrix product, {bandwidth/1e9:.4g} GB/s in a copy')
if gpu: check_sync()
else: print('host synchronisation: not checked, there is no GPU')
for n in a.tokens or ((4096, 1) if gpu else (512,)): report(n, flops, bandwidth)
if a.json: give(a, rows)
