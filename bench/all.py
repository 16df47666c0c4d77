"""All benchmarks that say how fast: each part in a process of its own, beside a named peer or a ceiling measured in the same run, gathered in one file.

    make bench                                            # on the CPU, under ten minutes on two cores: results/benchmarks-cpu.json
    make bench-gpu                                        # the same parts in larger sizes on a GPU: results/benchmarks-cuda.json
    python bench/all.py --only merging,decode --out OUT.json

A part that fails or takes longer than --timeout is named, the others go on, and the exit code is 1. The file is written anew, whole, after every part. What each part does stands in its own script; 13_benchmarks draws the file.
"""
import argparse, json, os, platform, subprocess, sys, time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

BIG = '--device cuda'
PARTS = {                                                                      # name: (what it answers, script, arguments on a CPU, on a GPU)
    'machine':      ('ceilings', 'measure', '--device cpu', BIG),
    'reading':      ('unpacking and reading weights', 'reading', '--device cpu --repeats 9', BIG),
    'calibration':  ('the pass over the text', 'streaming', '--times 1 --tokens 8192 --repeats 2 --long', f'--times 8 --tokens 65536 --repeats 3 --long {BIG}'),
    'counting':     ('which experts fire together', 'coactivation', '--tokens 200000', '--tokens 1000000'),
    'analysis':     ('what would be lost', 'analysis_time', 'demo demo --tokens 16384', f'demo demo --tokens 65536 {BIG}'),
    'merging':      ('merge operators', 'merging', '--device cpu', f'--rows 2816 --columns 2048 {BIG}'),
    'closed form':  ('the joint fit, and how it grows', 'closed_form', '--grow --device cpu', f'--grow {BIG}'),
    'distillation': ('a step of training one layer', 'distillation', '--device cpu', f'--width 2048 --expert 1408 --tokens 8192 {BIG}'),
    'stock layer':  ('the layer of 10_deepseek_moe', 'moe_layer', '--tokens 512 --repeat 3 --step', '--device cuda --dtype bfloat16 --d_model 2048 --d_expert 1408 --tokens 8192 --step'),
    'fused layer':  ('slim and fused layers forward', 'fused_layer', '--device cpu --no-compile --reps 7', BIG),
    'decode':       ('tokens at batch 1, and llama.cpp', 'decode', '--device cpu', f'--hidden 2048 --width 1408 --layers 12 --dtype bfloat16 {BIG}'),
}

def conditions(device):
    "Whatever a number depends on, but for the commit"
    import torch
    packages = ('moe_fuse', 'torch', 'transformers', 'numba', 'safetensors', 'autoawq', 'mergekit', 'llama_cpp_python')
    def have(p):
        try: return version(p)
        except PackageNotFoundError: return None
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.machine()) if Path('/proc/cpuinfo').exists() else platform.processor() or platform.machine()
    return dict(device=torch.cuda.get_device_name() if device=='cuda' else cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), date=time.strftime('%Y-%m-%d'), python=platform.python_version(),
                system=platform.system(), versions={p: v for p in packages if (v := have(p))})

def run(name, a): # -> what the part gives, or dict(failed=one line)
    _, script, *arguments = PARTS[name]
    cmd = [sys.executable, str(Path(__file__).with_name(f'{script}.py')), *arguments[a.device=='cuda'].split(), '--json']
    try: r = subprocess.run(cmd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=a.timeout)
    except subprocess.TimeoutExpired: return dict(failed=f'longer than {a.timeout} s')
    if r.returncode: return dict(failed=(r.stderr.strip().splitlines() or [f'exit code {r.returncode}'])[-1])
    try: return json.loads(r.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError): return dict(failed='its last line is no JSON')

def parts(text): # names, checked
    names = text.split(',')
    if bad := [n for n in names if n not in PARTS]: raise argparse.ArgumentTypeError(f'{bad[0]!r} is none of {", ".join(PARTS)}')
    return names

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', choices=['cpu', 'cuda'], default='cpu'); p.add_argument('--only', type=parts, default=list(PARTS), help='names of parts, with commas: ' + ', '.join(f'{k} ({v[0]})' for k,v in PARTS.items()))
    p.add_argument('--out', type=Path, help='left out: results/benchmarks-DEVICE.json'); p.add_argument('--timeout', type=int, default=180, help='seconds of a part')
    a = p.parse_args()
    out = a.out or Path(__file__).parents[1]/'results'/f'benchmarks-{a.device}.json'
    if not out.parent.is_dir(): p.error(f'{out.parent}: no such folder')
    if a.device=='cuda':
        import torch
        if not torch.cuda.is_available(): p.error('--device cuda: there is no GPU here')
    from moe_fuse.checkpoint import write_atomic                               # torch comes with it: not before the arguments are known to be good
    found = conditions(a.device) | dict(seconds={}, load={}, machine={}, rows=[], growth=[], failed={})
    for name in a.only:
        start = time.time(); got = run(name, a); found['seconds'][name] = round(time.time()-start, 1)
        if hasattr(os, 'getloadavg'): found['load'][name] = round(os.getloadavg()[0], 1)   # over the last minute: more than the threads, and others computed too
        if 'failed' in got: found['failed'][name] = got['failed']
        for k in 'rows', 'growth': found[k] += [dict(part=name) | r for r in got.get(k, [])]
        found['machine'] |= got.get('machine', {})
        write_atomic(out, json.dumps(found, indent=1)+'\n')
        print(f"{name}: {found['seconds'][name]} s" + (f", FAILED: {got['failed']}" if 'failed' in got else ''), flush=True)
    print(f"{out}: {len(found['rows'])} rows, {sum(found['seconds'].values()):.0f} s" + (f"; failed: {', '.join(found['failed'])}" if found['failed'] else ''))
    sys.exit(bool(found['failed']))
