"""Do widths that differ pay? Students made by `compress` with four budgets of the same size, beside what was predicted.

    python bench/budgets.py demo demo results/budgets-demo.json
    python bench/budgets.py TEACHER DATA results/budgets-v3-20m.json --tokens 40960

TEACHER is a checkpoint or `demo`, DATA a folder with DOMAIN.train.jsonl.gz and DOMAIN.valid.jsonl.gz, or `demo`. Widths are chosen and students fitted on the
same training tokens; the probes run on the first tokens of the validation text, KL is measured on more of it. A run that is in the results already is not made
again.
"""
import argparse, json, tempfile
from pathlib import Path

from moe_fuse.budgets import budgets
from moe_fuse.checkpoint import write_atomic
from moe_fuse.pipeline import compress

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('teacher'); p.add_argument('data'); p.add_argument('out', type=Path)
p.add_argument('--keeps', default='0.25,0.5'); p.add_argument('--tokens', type=int, default=65536); p.add_argument('--eval-tokens', type=int, default=16384)
p.add_argument('--probe-tokens', type=int, default=4096); p.add_argument('--seed', type=int, default=0)
a = p.parse_args()

files = lambda split: 'demo' if a.data=='demo' else ','.join(str(f) for f in sorted(Path(a.data).glob(f'*.{split}.jsonl.gz')))
res = json.loads(a.out.read_text()) if a.out.exists() else {}
def save(): a.out.parent.mkdir(exist_ok=True, parents=True); write_atomic(a.out, json.dumps(res, indent=1)+'\n')

for keep in a.keeps.split(','):
    r = res.setdefault(keep, dict(settings=dict(tokens=a.tokens, eval_tokens=a.eval_tokens, probe_tokens=a.probe_tokens, seed=a.seed), measured={}))
    if 'budget' not in r: r['budget'] = budgets(a.teacher, float(keep), files('train'), files('valid'), a.tokens, a.probe_tokens, seed=a.seed, quiet=True); save()
    students = {k: dict(keep={int(l): w for l,w in v['widths'].items()}) for k,v in r['budget']['plans'].items()}
    uniform = next(iter(r['budget']['plans']['uniform']['widths'].values()))
    students |= {f'stock {s}': dict(keep=float(keep), shared_share=float(s)) for s,v in r['budget']['stock'].items() if (v['width'], v['always_on'])!=(uniform, 0)}   # the others are uniform
    for k,kw in students.items():
        if k in r['measured']: continue
        with tempfile.TemporaryDirectory() as d:
            rep = compress(a.teacher, Path(d)/'out', **kw, calibration=files('train'), eval_data=files('valid'), tokens=a.tokens, eval_tokens=a.eval_tokens, baselines=(), seed=a.seed, quiet=True).report
        r['measured'][k] = dict(kl=rep['evaluation']['slim']['mean']['kl'], agreement=rep['evaluation']['slim']['mean']['agreement'], fvu={i: f['fitted'] for i,f in rep['fvu']['slim'].items()},
                                sizes=rep['sizes']['slim'], seconds=sum(rep['seconds'].values()), versions=rep['versions'], date=rep['date'])
        save()
        plan = r['budget']['plans'].get(k) or r['budget']['stock'][k.split()[1]]
        print(f"keep {keep} {k:<10} predicted {plan.get('predicted', float('nan')):.3f}, pilot {plan['tried']:.3f}, measured {r['measured'][k]['kl']:.3f}, routed weights {rep['sizes']['slim']['routed']:,}", flush=True)
