"""Planned over measured: memory, disk, arithmetic and time of `moe-fuse run`, stage by stage.

    python bench/plan_ratio.py                     # the embedded teacher, 65,536 calibration tokens
    python bench/plan_ratio.py FOLDER --card       # a checkpoint, on a GPU
    python bench/plan_ratio.py --exact             # freed memory goes back to the system at once: each stage's peak is its own, seconds mean nothing

Two runs, each in a process of its own. The first gives the peak of every stage (Linux: the kernel's high-water mark, reset at each stage; on a GPU also torch's), the bytes of
OUT.partial and the seconds; from resident memory is subtracted what the process held after a small run and after its text was read: libraries, mostly. The second counts operations with
`torch.utils.flop_counter`; Cholesky and triangular solves, which it does not know, are left out of the plan too. The text is long, so that nearly all sequences have 512 tokens.
The rates for the seconds are measured in the first process, just before its run. Without --exact,
malloc keeps freed blocks, and only the peak of resident memory can be compared. Exit code 1 if a peak lies outside 0.8-1.3 or the operations are off by more than 2 %.
"""
import argparse, contextlib, ctypes, gc, json, os, subprocess, sys, tempfile, time
from pathlib import Path

from moe_fuse.headers import Checkpoint, resolve_source   # no torch: a child's peak counts that of the process it was forked from
from moe_fuse.planning import *

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('source', nargs='?', default='demo', help='folder, or demo'); p.add_argument('--card', action='store_true', help='run on the GPU')
p.add_argument('--tokens', type=int, default=65536); p.add_argument('--eval-tokens', type=int, default=16384); p.add_argument('--keep', type=float, default=.25)
p.add_argument('--steps', type=int, default=0, help='of distillation, a layer'); p.add_argument('--flop-tokens', type=int, default=8192, help='of the counted run; 0 leaves it out')
p.add_argument('--device-budget', type=int, help='bytes that a layer of the source may take on the device')
p.add_argument('--exact', action='store_true', help='let malloc keep no freed block of 1 MB or more')
p.add_argument('--child', nargs=2, metavar=('KIND', 'FOLDER'), help=argparse.SUPPRESS)
a = p.parse_args()

def write_text(path, split, tokens):
    "Three long documents of the standard library's text."
    from moe_fuse.stdlib_text import stdlib_docs
    text = {}
    for d in stdlib_docs(split): text[d['domain']] = text.get(d['domain'], '') + (d['text'] if 'text' in d else '\n'.join(m['content'] for m in d['messages'])) + '\n'
    path.write_text(''.join(json.dumps(dict(text=t[:4*tokens]))+'\n' for t in text.values()))

def sizes_of(report=None, flops=False): # arguments of `run_sizes`
    tokens = dict(tokens=a.tokens, eval_tokens=a.eval_tokens) if report is None else {k: sum(report[f]['tokens'].values()) for k,f in (('tokens', 'calibration'), ('eval_tokens', 'held_out'))}
    return dict(keep=a.keep, distill_steps=2 if flops else a.steps, card=a.card and not flops, device_budget=a.device_budget) | tokens

def resident(key): # VmRSS, or VmHWM: the most since it was reset
    return next(int(l.split()[1])*1024 for l in open('/proc/self/status') if l.startswith(key))

def run(kind, folder):
    "One run; prints one JSON document."
    import numpy as np, torch
    from moe_fuse import pipeline
    tokens = (a.tokens, a.eval_tokens) if kind=='memory' else (a.flop_tokens, max(2048, a.flop_tokens//4))
    for split,n in zip(('train', 'valid'), tokens): write_text(folder/f'{split}.jsonl', split, n)
    device, out, seen = 'cuda' if a.card and kind=='memory' else 'cpu', folder/'out', dict(ram={}, vram={}, flops={}, cpu={}, disk=0, rss=0, counted=0, now=0)
    partial = folder/'out.partial'
    rates = measure_machine(run_sizes(Checkpoint(resolve_source(a.source)).config, **sizes_of()), folder) if kind=='memory' else None
    def files(): seen['disk'] = max(seen['disk'], sum(f.stat().st_blocks*512 for f in partial.rglob('*') if f.is_file()))
    def reset():
        Path('/proc/self/clear_refs').write_text('5')
        if device=='cuda': torch.cuda.reset_peak_memory_stats()
    def note(name):
        seen['ram'][name] = max(seen['ram'].get(name, 0), resident('VmHWM')-seen['rss'])
        if device=='cuda': seen['vram'][name] = max(seen['vram'].get(name, 0), torch.cuda.max_memory_allocated())
        if counter: n = counter.get_total_flops(); seen['flops'][name] = seen['flops'].get(name, 0)+n-seen['counted']; seen['counted'] = n
        now = time.process_time(); seen['cpu'][name] = seen['cpu'].get(name, 0)+now-seen['now']; seen['now'] = now
        files(); reset()
    def trim():
        gc.collect()
        with contextlib.suppress(OSError, AttributeError): ctypes.CDLL('libc.so.6').malloc_trim(0)   # what is free goes back to the system
    stage, layers, write = pipeline.Job.stage, pipeline.run_layers, pipeline.CheckpointWriter.write
    def noted(job, name, t): note(name); return stage(job, name, t)
    def started(*args): pipeline.coactivation(np.zeros((1, 1), np.int64), 1); trim(); seen['rss'] = resident('VmRSS'); reset(); seen['now'] = time.process_time(); return layers(*args)
    def written(writer, *args): write(writer, *args); files()
    kw = dict(keep=a.keep, calibration=str(folder/'train.jsonl'), eval_data=str(folder/'valid.jsonl'), tokens=tokens[0], eval_tokens=tokens[1], device=device, quiet=True)
    if kind=='memory': pipeline.compress('demo', folder/'first', **kw | dict(tokens=2048, eval_tokens=2048), distill_steps=1)   # now the libraries' code is in memory, and CUDA's context
    counter, pipeline.Job.stage, pipeline.run_layers, pipeline.CheckpointWriter.write = None, noted, started, written
    if kind=='memory': report = pipeline.compress(a.source, out, distill_steps=a.steps, device_budget=a.device_budget, **kw).report
    else:
        from torch.utils.flop_counter import FlopCounterMode, sdpa_flop
        cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu   # the counter knows the attention of GPUs only
        with FlopCounterMode(display=False, custom_mapping={cpu: lambda q, k, v, *_, **__: sdpa_flop(q, k, v)}) as counter:
            report = pipeline.compress(a.source, out, distill_steps=2, device_budget=a.device_budget, **kw).report
    written = sum(f.stat().st_size for f in out.glob('*.safetensors'))
    print(json.dumps(dict(seen=seen, threads=torch.get_num_threads(), report=report, rates=rates, written=written)))

def child(kind):
    with tempfile.TemporaryDirectory() as d:
        options = [f'--{k.replace("_", "-")}' + ('' if v is True else f'={v}') for k,v in vars(a).items() if k not in ('source', 'child') and v is not False and v is not None]
        argv = [sys.executable, __file__, a.source, *options, '--child', kind, d]
        r = subprocess.run(argv, stdout=subprocess.PIPE, env=os.environ | (dict(MALLOC_MMAP_THRESHOLD_='1000000') if a.exact else {}))
    if r.returncode: sys.exit(f'the {kind} run ended with exit code {r.returncode}')
    return json.loads(r.stdout)

def row(name, planned, measured, show): return [name, show(planned), show(measured), f'{planned/measured:.2f}' if measured>0 else '']

def memory(c, disk):
    "Peaks, files and seconds."
    m = child('memory'); r = m['report']
    z = run_sizes(c, **sizes_of(r)); parts = {s.name: s for s in stages(z, disk)}
    print(f"{r['source']['name']} on {r['device']}, CPU threads: {m['threads']}; {z.cal:,} + {z.held:,} tokens; resident before the first layer: {gb(m['seen']['rss'])}\n")
    need = needs(z, disk, True)
    def of(what, n): return parts[n].device if what=='VRAM' else parts[n].host + (0 if z.card else parts[n].device)      # what is derived, without libraries
    mem = [('VRAM', m['seen']['vram'], LIBRARIES['vram'])]*z.card + [('RAM', m['seen']['ram'], LIBRARIES['card' if z.card else 'cpu'])]
    ratios, seconds = [], {n: s for n,s in r['seconds'].items() if n in parts}            # a stage with nothing to do has a name and no cost
    for what,seen,base in mem:
        rows = [row(n, of(what, n), b, gb) for n,b in seen.items() if n in parts]
        peaks = max(of(what, n) for n in parts) if a.exact else peak(what.lower(), need)-base, max(seen.values()); ratios.append(peaks[0]/peaks[1])
        print(aligned([what, 'planned', 'measured', 'ratio'], [*rows, row('peak', *peaks, gb)]), '\n')
    files = [('states and student at once', states_on_disk(z)+z.item*student_weights(z), m['seen']['disk']), ('safetensors written', z.item*student_weights(z), m['written'])]
    ratios += [planned/measured for _,planned,measured in files]
    print(aligned(['disk', 'planned', 'measured', 'ratio'], [row(*f, gb) for f in files]), '\n')
    if a.exact: return all(.8<=x<=1.3 for x in ratios)                                   # the seconds are malloc's
    planned = {n: stage_seconds(parts[n], m['rates']) for n in seconds}
    cpu = m['seen']['cpu']
    rows = [row(n, planned[n], s, duration)+[duration(cpu[n])] for n,s in seconds.items()]
    print(aligned(['time', 'planned', 'measured', 'ratio', 'of the processor'], [*rows, row('all', sum(planned.values()), sum(seconds.values()), duration)+[duration(sum(cpu[n] for n in seconds))]]))
    print('rates measured before: ' + ', '.join(f'{k} {v:.3g}/s' for k,v in m['rates'].items()) + '\n')
    return all(.8<=x<=1.3 for x in ratios)

def operations(c, disk):
    "Operations, counted."
    m = child('flops'); z = run_sizes(c, **sizes_of(m['report'], flops=True))
    uncounted = z.moe*(z.f**3/3 + 2*z.f**2*z.h)
    planned = {s.name: s.flops - (uncounted if s.name=='slim: fit' else 0) for s in stages(z, disk)}
    seen = {n:v for n,v in m['seen']['flops'].items() if v}
    total = sum(planned.values()), sum(seen.values())
    print(aligned(["GFLOP", "planned", "counted", "ratio"], [row(n, x/1e9, y/1e9, lambda v: f"{v:,.2f}") for n,x,y in [*((n, planned[n], v) for n,v in seen.items()), ("all", *total)]]))
    return abs(total[0]/total[1]-1) <= .02

if a.child: run(a.child[0], Path(a.child[1])); sys.exit()
ck = Checkpoint(resolve_source(a.source))
disk = source_bytes(ck.config) | dict(total=ck.nbytes)
ok = memory(ck.config, disk)
if a.flop_tokens: ok &= operations(ck.config, disk)
sys.exit(not ok)
