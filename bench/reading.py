"""How fast are weights unpacked and layers read, against a plain copy, AutoAWQ's own code, and safetensors?

    python bench/reading.py            # on a GPU if there is one, else on the CPU

Unpacking moves the packed bytes in and the floats out; the ceiling is a copy on the same device that moves as many bytes. The peer, if AutoAWQ is
installed, is its `dequantize_gemm` on a CPU and its Triton kernel on a GPU, which give float16. Reading is timed from the page cache, against `safetensors.torch.load_file` of the same bytes.
Every ratio is made of medians of alternating repeats in this one run.
"""
import argparse, json, statistics, sys, tempfile, time, warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from measure import add_json, give, row
from moe_fuse.awq_loading import *
from moe_fuse.headers import *

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); add_json(p)
p.add_argument('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu'); p.add_argument('--repeats', type=int, default=15)
a = p.parse_args(); device, cuda, rows = a.device, a.device=='cuda', []

def seconds(f, n=20):
    "Of one call; on a GPU between events, a hundred calls in a row, so that launches overlap as they do in use"
    if not cuda: t = time.perf_counter(); f(); return time.perf_counter()-t
    a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    a.record()
    for _ in range(n): f()
    b.record(); b.synchronize()
    return a.elapsed_time(b)/1e3/n

def medians(*fs):
    "Median seconds of each, taken in turns after one warm-up"
    for f in fs: f(); f()
    rows = [[seconds(f) for f in fs] for _ in range(a.repeats)]
    return [statistics.median(r) for r in zip(*rows)]

def autoawq(): # -> (name, f of the packed parts and their group), [i, o] in float16; None without AutoAWQ
    with warnings.catch_warnings(record=True):
        try:
            if cuda: from awq.modules.triton.gemm import awq_dequantize_triton as f
            else:    from awq.utils.packing_utils import dequantize_gemm as f
        except ImportError: return None
    return ("AutoAWQ's Triton kernel", lambda q, z, s, group: f(q, s, z)) if cuda else ("AutoAWQ's dequantize_gemm", lambda q, z, s, group: f(q, z, s, 4, group))

def unpacking(o, i, dtype):
    print(f'\nunpacking [{o}, {i}] to {str(dtype)[6:]} on {torch.cuda.get_device_name() if cuda else f"the CPU, {torch.get_num_threads()} threads"}')
    w = torch.randn(o, i, device=device)*.02
    for name,parts,f in (('FP8 128x128', quantize_fp8(w), dequantize_fp8), ('AWQ group 128', quantize_awq(w, 128), dequantize_awq), ('AWQ group 64', quantize_awq(w, 64), dequantize_awq)):
        nbytes = sum(p.nbytes for p in parts) + o*i*dtype.itemsize
        src = torch.empty(nbytes//2, dtype=torch.uint8, device=device).random_(); dst = torch.empty_like(src)
        fs = [lambda: f(*parts, dtype=dtype), lambda: dst.copy_(src)]
        if (peer := autoawq()) and name.startswith('AWQ'):
            parts, group = [v.contiguous() for v in parts], i//len(parts[2])
            fs.append(lambda: peer[1](*parts, group)); torch.testing.assert_close(f(*parts, dtype=torch.float32), fs[-1]().T.float(), rtol=2e-3, atol=1e-5)
        t, copy, *rest = medians(*fs)
        what = f'unpack {name}, [{o}, {i}] to {str(dtype)[6:]}'
        rows.append(row(what, t, 'a copy of as many bytes', copy, 'bytes, and on a CPU the arithmetic of unpacking', ceiling=True, bytes=nbytes))
        rows.extend(row(what, t, peer[0], x, 'bytes, and on a CPU the arithmetic of unpacking', bytes=nbytes) for x in rest)
        print(f'  {name:<14} {t*1e6:10,.0f} us, {nbytes/t/1e9:8,.1f} GB/s, {copy/t:6.1%} of a copy of as many bytes' + (f', {rest[0]/t:.1f} times as fast as AutoAWQ' if rest else ''))

def reading(n_layers=6):
    "Bfloat16 layers of 32 experts in shards of their own"
    with tempfile.TemporaryDirectory() as d:
        demo = Checkpoint(resolve_source('demo'))
        c = {k:v for k,v in demo.config.items() if k!='quantization_config'} | dict(hidden_size=1024, moe_intermediate_size=512)
        (Path(d)/'config.json').write_text(json.dumps(c))
        experts = {f'model.layers.1.mlp.experts.{e}.{k}_proj.weight': torch.randn(*((512, 1024) if k!='down' else (1024, 512))).bfloat16() for e in range(32) for k in ('gate','up','down')}
        save_file(experts, Path(d)/'model.safetensors')
        ck = Checkpoint(d)
        def ours(): out = load_experts(ck, 'model.layers.1.mlp.experts.', (32, 1024, 1024), torch.bfloat16, device); ck.release(); return out
        def theirs(): return load_file(Path(d)/'model.safetensors', device=device)
        def stacked():
            w = theirs()
            one = lambda e, k: w[f'model.layers.1.mlp.experts.{e}.{k}_proj.weight']
            return torch.stack([torch.cat([one(e, 'gate'), one(e, 'up')]) for e in range(32)]), torch.stack([one(e, 'down') for e in range(32)])
        x, b, c = medians(ours, theirs, stacked)
        rows.append(row('read 32 experts from the page cache, stacked and checked', x, 'safetensors load_file and torch.stack', c, 'bytes', bytes=sum(v.nbytes for v in experts.values())))
        print(f'\nreading {sum(v.nbytes for v in experts.values())/1e6:.0f} MB of experts, checked for NaN and stacked: {x*1e3:.1f} ms; {x/b:.2f} times load_file{"" if cuda else " (which only maps the file)"}, {x/c:.2f} times load_file and torch.stack')

print(f'torch {torch.__version__}, Python {sys.version.split()[0]}')
for o,i in ((2048, 7168), (7168, 18432)) if cuda else ((2816, 2048),):
    for dtype in (torch.bfloat16, torch.float32): unpacking(o, i, dtype)
reading()
if a.json: give(a, rows)
