"""Every method at equal bytes on a trained teacher, with the pipeline itself: KL to the teacher on held-out text.

    python bench/teacher_study.py TEACHER DATA results/v3-20m.json

TEACHER is a checkpoint, DATA a folder with DOMAIN.train.jsonl.gz and DOMAIN.valid.jsonl.gz. Rows that are in the results
already are not made again, so the command can be stopped and repeated, or run for one seed at a time. 262,144 calibration tokens; all of the validation text.
"""
import argparse, json, tempfile
from pathlib import Path

from moe_fuse.checkpoint import write_atomic
from moe_fuse.headers import inspect
from moe_fuse.pipeline import compress

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('teacher'); p.add_argument('data', type=Path); p.add_argument('out', type=Path)
p.add_argument('--rows', default='0.5:0,0.25:0,0.25:400,0.125:0', help='KEEP:DISTILL_STEPS[,...]')
p.add_argument('--seeds', default='0,1,2'); p.add_argument('--lr', type=float, default=2e-3); p.add_argument('--tokens', type=int, default=262144)
p.add_argument('--drift', type=float, default=.5)
a = p.parse_args()

files = lambda split: ','.join(str(f) for f in sorted(a.data.glob(f'*.{split}.jsonl.gz')))
rows = json.loads(a.out.read_text()) if a.out.exists() else []
for keep,steps in (r.split(':') for r in a.rows.split(',')):
    for seed in map(int, a.seeds.split(',')):
        key = dict(keep=float(keep), distill_steps=int(steps), seed=seed, lr=a.lr, tokens=a.tokens)
        if any(r['key']==key for r in rows): continue
        with tempfile.TemporaryDirectory() as d:
            r = compress(a.teacher, Path(d)/'out', calibration=files('train'), eval_data=files('valid'), eval_tokens=None, quiet=True, drift=a.drift, **key).report
        rows.append(dict(key=key) | {k: r[k] for k in ('evaluation', 'sizes', 'fvu', 'calibration', 'held_out', 'device', 'versions', 'date')})
        a.out.parent.mkdir(exist_ok=True, parents=True); write_atomic(a.out, json.dumps(rows, indent=1)+'\n')
        print(key, {k: round(v['mean']['kl'], 4) for k,v in r['evaluation'].items()}, {k: round(v) for k,v in r['seconds'].items() if v>1}, flush=True)
