"""Does the prediction of `moe-fuse analyse` hold? Real runs at four sizes beside what was predicted, layer by layer.

    python bench/prediction.py demo demo results/prediction-demo.json
    python bench/prediction.py TEACHER DATA results/prediction-v3-20m.json

TEACHER is a checkpoint or `demo`, DATA a folder with DOMAIN.train.jsonl.gz and DOMAIN.valid.jsonl.gz, or `demo`. Both fit on the training text and
measure on the validation text. A run that is in the results already is not made again. 37.5 % rounds down to a quarter of the neurons, and the rest is
always-on. 6.25 % is not among the sizes: the experts of these teachers have 64 neurons, and a stock layer takes no fewer than 8.
"""
import argparse, json, tempfile
from pathlib import Path

from scipy.stats import spearmanr

from moe_fuse.analysis import analyse
from moe_fuse.checkpoint import write_atomic
from moe_fuse.pipeline import compress

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('teacher'); p.add_argument('data'); p.add_argument('out', type=Path)
p.add_argument('--keeps', default='0.25,0.5,0.125,0.375'); p.add_argument('--tokens', type=int, default=65536); p.add_argument('--eval-tokens', type=int, default=16384)
a = p.parse_args()

files = lambda split: 'demo' if a.data=='demo' else ','.join(str(f) for f in sorted(Path(a.data).glob(f'*.{split}.jsonl.gz')))
keeps = [float(k) for k in a.keeps.split(',')]
res = json.loads(a.out.read_text()) if a.out.exists() else dict(measured=[])
def save(): a.out.parent.mkdir(exist_ok=True, parents=True); write_atomic(a.out, json.dumps(res, indent=1)+'\n')

for keep in keeps:
    key = dict(keep=keep, tokens=a.tokens, eval_tokens=a.eval_tokens)
    if any(r['key']==key for r in res['measured']): continue
    with tempfile.TemporaryDirectory() as d:
        r = compress(a.teacher, Path(d)/'out', calibration=files('train'), eval_data=files('valid'), baselines=(), quiet=True, **key).report
    res['measured'].append(dict(key=key, fvu={i: f['fitted'] for i,f in r['fvu']['slim'].items()}, kl=r['evaluation']['slim']['mean']['kl'], seconds=sum(r['seconds'].values()), versions=r['versions'], date=r['date']))
    save()
if 'predicted' not in res:
    with tempfile.TemporaryDirectory() as d: r = analyse(a.teacher, Path(d)/'out', files('train'), files('valid'), a.tokens, keeps, pilot_tokens=a.eval_tokens, quiet=True)
    res['predicted'] = dict(layers={str(l['layer']): l['predicted'] for l in r['layers']}, seconds=r['seconds'], **{k: r[k] for k in ('kl', 'tokens', 'held_out', 'fit_tokens', 'seed')})

names = 'fvu', 'fvu_alone', 'energy_dropped'
points = [dict(keep=r['key']['keep'], layer=i, measured=v) | {n: res['predicted']['layers'][i][str(r['key']['keep'])][n] for n in names} for r in res['measured'] for i,v in r['fvu'].items()]
column = lambda k: [p[k] for p in points]
res['points'] = points
res['rank_correlation'] = {n: spearmanr(column('measured'), column(n)).statistic for n in names}
res['rank_correlation_of_layers'] = {str(k): {n: spearmanr(*[[p[c] for p in points if p['keep']==k] for c in ('measured', n)]).statistic for n in names} for k in keeps}
res['median_ratio'] = {n: sorted(p[n]/p['measured'] for p in points)[len(points)//2] for n in names}
res['kl'] = {str(r['key']['keep']): dict(measured=r['kl'], predicted=res['predicted']['kl'][str(r['key']['keep'])]) for r in res['measured']}
save()
for p in points: print('keep {keep:<6} layer {layer:>2}: measured {measured:.3f}, predicted {fvu:.3f} (this layer alone {fvu_alone:.3f}, energy dropped {energy_dropped:.3f})'.format(**p))
for k in 'rank_correlation', 'rank_correlation_of_layers', 'median_ratio', 'kl': print(k, json.dumps(res[k]))
