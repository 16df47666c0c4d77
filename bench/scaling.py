"""How the error falls with width, with the number of cores, with rank and with calibration text: FVU layer by layer, and KL of whole models.

    python bench/scaling.py demo results/scaling-demo.json --methods slim,mean,chosen,mixture,exact
    python bench/scaling.py demo results/scaling-demo.json --methods recipe --sizes 2048,4096,8192,16384
    python bench/scaling.py demo results/scaling-demo.json --methods slim --tokens 32768 --sizes 32768
    python bench/scaling.py TEACHER results/scaling.json --data DATA --tokens 65536 --eval-tokens 65536 --sizes 2048,8192,32768,131072,262144
    python bench/scaling.py results/scaling-demo.json                          # the table of what is there

TEACHER is a checkpoint or `demo`, DATA a folder with DOMAIN.train.jsonl.gz and DOMAIN.valid.jsonl.gz; without it the text is the demo's. Every routed layer is replaced,
each built and fitted on the teacher's own states, which are made once for each seed and number of tokens. Methods:
    slim     --widths, shares of the neurons that every expert keeps; down projections fitted
    mean     cores are the weighted means of act_cl groups; down projections fitted
    chosen   cores are the most useful neurons of such groups; down projections fitted
    mixture  mean cores and a mixture of LoRA, as the SVD gives it
    recipe   that with multiplexing, trained as --preset says: the first recipe
    exact    the exact mixture of the same cores and LoRA; down projections fitted
Cores are varied at --rank, ranks at --cores (a share of the experts), calibration tokens for slim of a quarter of the width, exact and the recipe. `fit` is the FVU on 2,048 calibration rows.
Rows that are in the results already are not made again; no row is begun after --minutes.
"""
import argparse, json, time
from pathlib import Path

import pandas as pd, torch
from tqdm import tqdm

from ablation import gather, made_on, open_study, states_of
from moe_fuse.budgets import cut_block
from moe_fuse.calibration import *
from moe_fuse.checkpoint import write_atomic
from moe_fuse.evaluation import compare
from moe_fuse.expert_analysis import *
from moe_fuse.fused_student import *
from moe_fuse.fusion import *
from moe_fuse.headers import *
from moe_fuse.healing import *
from moe_fuse.multiplex_lora import *
from moe_fuse.neuron_choice import *

MODE = dict(mean='cores', chosen='cores', mixture='mixture', recipe='multiplex_mixture', exact='exact')

def plan(n, i, a): # experts, their width -> [key, ...], those of one seed and size side by side
    numbers = lambda s, kind=int: [kind(v) for v in s.split(',') if v]
    e = max(1, round(n*a.cores))
    slim = lambda w: dict(method='slim', width=max(1, int(i*w+1e-6)))
    fused = lambda m, e, r: dict(method=m, cores=e) | ({} if m in ('mean', 'chosen') else dict(rank=r))
    todo = []
    for seed in numbers(a.seeds):
        for t in sorted({a.tokens, *numbers(a.sizes)}):
            at = [slim(.25)] + [fused(m, e, a.rank) for m in ('exact', 'recipe')]
            if t==a.tokens:
                at += [slim(w) for w in numbers(a.widths, float)] + [fused(m, c, a.rank) for m in MODE for c in numbers(a.n_cores) if m!='recipe' or c in numbers(a.few)]
                at += [fused(m, e, r) for m in ('exact', 'mixture', 'recipe') for r in numbers(a.ranks) if m!='recipe' or r in numbers(a.few)]
            todo += [k | dict(tokens=t, eval_tokens=a.eval_tokens, seed=seed) | (dict(preset=a.preset, batch=a.batch, lr=a.lr) if k['method']=='recipe' else {}) for k in at if k['method'] in a.methods.split(',')]
    return [k for j,k in enumerate(todo) if k not in todo[:j]]

def block_of(key, moe, stats, x, y, groups): # -> a block, built and fitted
    m = key['method']
    if m=='slim': return fit_outputs(cut_block(moe, stats.usefulness, key['width']), [(x, y)])
    if key['cores'] not in groups: groups[key['cores']] = group_by_coactivation(stats.coactivation, key['cores'], key['seed'])
    g, cores = groups[key['cores']], None
    if m=='chosen': cores = core_neurons(moe.experts, g, stats.usefulness, moe.experts.down_proj.shape[2])
    b = fuse_moe(moe, g, stats.counts, key.get('rank', 0), MODE[m], stats.moment(0, shrink=1.).float(), cores=cores)
    if m=='recipe': distill_epochs(b, x, y, key['preset'], key['lr'], key['batch'], key['seed'])
    return (b if m in ('mixture', 'recipe') else fit_outputs(b, [(x, y)])).requires_grad_(False)

def study(a, rows):
    model, held, calibration = open_study(a)
    last, xv, yv = states_of(model, held)
    logits = lambda h: (lambda s, e: model.lm_head(h[s:e]))
    moes = {i: l.mlp for i,l in enumerate(model.model.layers) if hasattr(l.mlp, 'experts')}
    n, h, width = next(iter(moes.values())).experts.down_proj.shape
    todo, known = [k for k in plan(n, width, a) if not any(r['key']==k for r in rows)], (None,)
    def routed_fvu(moe, b, x, y): shared = shared_output(moe, x); return fvu(y-shared, block_forward(b, x)-shared)
    for done,key in enumerate(tqdm(todo)):
        if time.time()-a.start > a.minutes*60: print(f'{len(todo)-done} rows are left; repeat the command'); return
        t = key['tokens'], key['seed']
        if t!=known[0]:
            cal = calibration(key['tokens'], key['seed'])
            _, x, y = states_of(model, cal)
            known = t, {i: gather(m, x[i]) for i,m in moes.items()}, {i: {} for i in moes}
            some = torch.linspace(0, len(cal)-1, min(2048, len(cal)), device=a.device).long()
        _, stats, groups = known
        began = time.time()
        blocks = {i: block_of(key, m, stats[i], x[i], y[i], groups[i]) for i,m in moes.items()}
        built = time.time()
        layers = {str(i): dict(fvu=routed_fvu(m, blocks[i], xv[i], yv[i]), fit=routed_fvu(m, blocks[i], x[i][some], y[i][some])) for i,m in moes.items()}
        e = compare(held, logits(last), logits(states_of(model, held, blocks)[0]))['mean']
        size = n*3*h*key['width'] if key['method']=='slim' else fused_parameters(n, h, width, key['cores'], key.get('rank', 0), MODE[key['method']])
        rows.append(dict(key=key, layers=layers, kl=e['kl'], loss=e['loss_student'], loss_teacher=e['loss_teacher'], keep=size/(n*3*h*width), experts=n, width=width, calibration=cal.sha256, held_out=held.sha256,
                         seconds=round(built-began, 2), **made_on(a.device)))
        write_atomic(a.out, json.dumps(rows, indent=1)+'\n')
    print('nothing is left')

def table(rows):
    if not rows: return
    d = pd.DataFrame([{'rank': 0, **{k: v for k,v in r['key'].items() if k in ('method', 'tokens', 'rank', 'seed')}, 'width or cores': r['key'].get('width', r['key'].get('cores'))} | {f'layer {i}': l['fvu'] for i,l in r['layers'].items()}
                      | dict(keep=r['keep'], KL=r['kl'], seconds=r['seconds']) for r in rows])
    g = d.groupby(['method', 'width or cores', 'rank', 'tokens'])
    print(g.mean().drop(columns='seed').assign(spread=g.KL.std(), seeds=g.size()).round(3).to_string())

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('teacher', help='TEACHER OUT, or OUT alone'); p.add_argument('out', nargs='?', type=Path); p.add_argument('--data', type=Path)
    p.add_argument('--methods', default=','.join(['slim', *MODE])); p.add_argument('--seeds', default='0,1,2')
    p.add_argument('--widths', default='.0625,.125,.25,.375,.5,.75'); p.add_argument('--n-cores', default='2,4,8,16,24'); p.add_argument('--ranks', default='1,2,4,8,16,32'); p.add_argument('--few', default='2,4,8,16', help='of both, for the recipe')
    p.add_argument('--cores', type=float, default=.25); p.add_argument('--rank', type=int, default=8)
    p.add_argument('--tokens', type=int, default=8192); p.add_argument('--sizes', default='2048,4096,8192,16384,32768,65536'); p.add_argument('--eval-tokens', type=int, default=8192)
    p.add_argument('--preset', default='False_1'); p.add_argument('--batch', type=int, default=512); p.add_argument('--lr', type=float, default=1e-3); p.add_argument('--minutes', type=float, default=9)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    a = p.parse_args(); a.start = time.time(); torch.set_grad_enabled(False)
    if a.out is None: a.out = Path(a.teacher)
    rows = json.loads(a.out.read_text()) if a.out.exists() else []
    if a.teacher!=str(a.out): study(a, rows)
    table(rows)
