"""Does the prediction of `moe-fuse analyse` hold? Real runs at four sizes beside what was predicted, layer by layer.

    python bench/prediction.py demo demo results/prediction-demo.json
    python bench/prediction.py TEACHER DATA results/prediction-v3-20m.json

TEACHER is a checkpoint or `demo`, DATA a folder with DOMAIN.train.jsonl.gz and DOMAIN.valid.jsonl.gz, or `demo`. A run that is in the results already is
not made again. 6.25 % is not among the sizes: the experts of these teachers have 64 neurons, and a stock layer takes no fewer than 8.
"""
import argparse, json, tempfile
from pathlib import Path

from moe_fuse.checkpoint import write_atomic
from moe_fuse.pipeline import compress

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('teacher'); p.add_argument('data'); p.add_argument('out', type=Path)
p.add_argument('--keeps', default='0.25,0.5,0.125,0.375'); p.add_argument('--tokens', type=int, default=32768); p.add_argument('--eval-tokens', type=int, default=16384)
a = p.parse_args()

files = lambda split: 'demo' if a.data=='demo' else ','.join(str(f) for f in sorted(Path(a.data).glob(f'*.{split}.jsonl.gz')))
rows = json.loads(a.out.read_text())['measured'] if a.out.exists() else []
for keep in map(float, a.keeps.split(',')):
    key = dict(keep=keep, tokens=a.tokens, eval_tokens=a.eval_tokens)
    if any(r['key']==key for r in rows): continue
    with tempfile.TemporaryDirectory() as d:
        r = compress(a.teacher, Path(d)/'out', calibration=files('train'), eval_data=files('valid'), baselines=(), quiet=True, **key).report
    rows.append(dict(key=key, fvu={i: f['fitted'] for i,f in r['fvu']['slim'].items()}, kl=r['evaluation']['slim']['mean']['kl'], versions=r['versions'], date=r['date']))
    a.out.parent.mkdir(exist_ok=True, parents=True); write_atomic(a.out, json.dumps(dict(measured=rows), indent=1)+'\n')
    print(key, rows[-1]['fvu'], rows[-1]['kl'], flush=True)
