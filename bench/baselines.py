"""Every baseline beside slim at equal bytes on a trained teacher: KL to the teacher on held-out text, mean and spread over seeds.

    python bench/baselines.py TEACHER results/baselines-v3-20m.json --data DATA
    python bench/baselines.py demo results/baselines-demo.json --tokens 16384 --eval-tokens 16384 --keeps 0.25 --seeds 0

    python bench/baselines.py TEACHER results/baselines-v3-20m.json --data DATA --keeps 0.0625 --method cores     # where slim would have too few neurons

TEACHER is a checkpoint or `demo`, DATA a folder with DOMAIN.train.jsonl.gz and DOMAIN.valid.jsonl.gz; without it the text is the demo's. Rows that are in the
results already are not made again, so the command can be stopped and repeated, or run for one seed at a time. The table is printed at the end, and alone with --table.
"""
import argparse, json, statistics, tempfile
from pathlib import Path

from moe_fuse.checkpoint import write_atomic
from moe_fuse.pipeline import KINDS, compress

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('teacher'); p.add_argument('out', type=Path); p.add_argument('--data', type=Path)
p.add_argument('--keeps', default='0.5,0.25'); p.add_argument('--seeds', default='0,1,2'); p.add_argument('--distill-steps', type=int, default=0); p.add_argument('--lr', type=float, default=2e-3)
p.add_argument('--tokens', type=int, default=262144); p.add_argument('--eval-tokens', type=int, default=None, help='all of the validation text if left out')
p.add_argument('--method', default='slim', help='the student that the others stand beside'); p.add_argument('--baselines', help='all others if left out'); p.add_argument('--table', action='store_true', help='make nothing, print what there is')
a = p.parse_args()

text = {} if a.data is None else {k: ','.join(str(f) for f in sorted(a.data.glob(f'*.{s}.jsonl.gz'))) for k,s in (('calibration', 'train'), ('eval_data', 'valid'))}
rows = json.loads(a.out.read_text()) if a.out.exists() else []
if a.baselines is None: a.baselines = ','.join(k for k in KINDS if k not in (a.method, 'slim'))
for keep in () if a.table else map(float, a.keeps.split(',')):
    for seed in map(int, a.seeds.split(',')):
        key = dict(keep=keep, distill_steps=a.distill_steps, seed=seed, lr=a.lr, tokens=a.tokens) | (dict(method=a.method) if a.method!='slim' else {})
        done = {k for r in rows if r['key']==key for k in r['asked']}
        names = [b for b in a.baselines.split(',') if b not in done]
        if done and not names: continue
        with tempfile.TemporaryDirectory() as d:
            r = compress(a.teacher, Path(d)/'out', baselines=names, eval_tokens=a.eval_tokens, quiet=True, **text, **key).report
        for t in r['calibration'], r['held_out']: t['origins'] = [Path(o).name for o in t['origins']]   # results are published
        rows.append(dict(key=key, asked=names) | {k: r[k] for k in ('evaluation', 'sizes', 'fvu', 'seconds', 'calibration', 'held_out', 'device', 'versions', 'date')})
        a.out.parent.mkdir(exist_ok=True, parents=True); write_atomic(a.out, json.dumps(rows, indent=1)+'\n')
        print(key, {k: round(v['mean']['kl'], 4) for k,v in r['evaluation'].items()}, flush=True)

def shown(v, f='.3f'): return f'{statistics.mean(v):{f}}' + (f' ± {statistics.stdev(v):{f}}' if len(v)>1 else '')
for keep,steps in sorted({(r['key']['keep'], r['key']['distill_steps']) for r in rows}, reverse=True):
    part = [r for r in rows if (r['key']['keep'], r['key']['distill_steps'])==(keep, steps)]
    kl = {k: {r['key']['seed']: r['evaluation'][k]['mean']['kl'] for r in part if k in r['evaluation']} for k in KINDS}        # slim is made with every part of a row that was made in parts
    size = {k: next((r['sizes'][k]['routed']/r['sizes']['teacher']['routed'] for r in part if k in r['sizes']), 0) for k in KINDS}
    built = {k: [s for r in part for n,s in r['seconds'].items() if n==f'{k}: build'] for k in KINDS}
    print(f'\nkeep {keep:g}, {steps} distillation steps, {len({r["key"]["seed"] for r in part})} seeds\n\n| | KL | routed weights | build and measure, s |\n|---|--:|--:|--:|')
    for k in sorted((k for k in KINDS if kl[k]), key=lambda k: statistics.mean(kl[k].values())):
        print(f'| {KINDS[k]} | {shown(list(kl[k].values()))} | {size[k]:.3f} | {statistics.mean(built[k]):.1f} |')
