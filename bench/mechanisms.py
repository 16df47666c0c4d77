"""Why does one layer lose more than another? What may explain it, measured beside what slim and shared cores lose there.

    python bench/mechanisms.py demo results/mechanisms-demo.json
    python bench/mechanisms.py TEACHER results/mechanisms.json --data DATA --tokens 262144 --eval-tokens 65536
    python bench/mechanisms.py results/mechanisms-demo.json                    # the table of what is there

TEACHER is a checkpoint or `demo`, DATA a folder with DOMAIN.train.jsonl.gz and DOMAIN.valid.jsonl.gz; without it the text is the demo's. Of every layer, on the calibration
text: how the members of a core share their gate (variance of p_i = w_i / s_e where core e fires, summed over its members, mean over the cores weighted by how often they fire;
act_cl groups and groups drawn by lot, a quarter as many as experts), how often they fire together, the share of the energy in a quarter of the neurons and in a quarter of
the directions (of D R D', R the weighted second moment of the neurons), and the effective rank of the routed output. On held-out text: FVU of slim at --keep, and of a quarter
as many mean cores, on the teacher's inputs (`alone`); of slim on its own inputs (`both`); of the teacher's layer on slim's inputs (`inherited`), and the share of routed experts that are still the same.
Of every expert: what it loses when it alone keeps its best neurons, its own down projection fitted. Rows that are in the results already are not made again.
"""
import argparse, json, time
from pathlib import Path

import pandas as pd, torch

from ablation import gather, made_on, open_study, states_of
from moe_fuse.analysis import describe_layer, effective_rank, energy_at, fire_together
from moe_fuse.budgets import cut_block
from moe_fuse.calibration import *
from moe_fuse.checkpoint import write_atomic
from moe_fuse.expert_analysis import *
from moe_fuse.fused_student import *
from moe_fuse.fusion import *
from moe_fuse.grouping import *
from moe_fuse.headers import *
from moe_fuse.multiplex_lora import *
from moe_fuse.neuron_choice import *

def gate_shares(moe, x, groups): # -> (variance of p_i over the tokens where its core fires [N], how many those are [N])
    p, n = route(moe, x), len(groups)
    w = torch.zeros(len(x), n, device=x.device).index_put_((p.token, p.expert), p.weight)
    s = w @ (groups[:,None]==groups).to(w)                                     # [T, N] s_e of each expert's core
    on = s>0; p = torch.where(on, w/s.clamp(min=1e-30), 0); k = on.sum(0).clamp(min=1)
    return (p.square().sum(0)/k - (p.sum(0)/k).square()).clamp(min=0).double().cpu(), on.sum(0).cpu()

def of_cores(groups, var, k): # -> sum over the members, mean over cores of more than one
    cores = [(var[m].sum().item(), k[m][0].item()) for e in groups.unique() if (m := groups==e).sum()>1]
    return sum(v*c for v,c in cores)/max(1, sum(c for _,c in cores))

def grams(moe, x): # -> [N, I, I] float64
    parts = []
    for xb in x.split(4096): p = route(moe, xb); parts.append(feature_grams(expert_hidden(moe.experts, xb, p), p))
    return sum(parts)

def of_experts(moe, stats, r, rv, width): # Gram matrices of calibration and held-out text -> {name: [N]}
    d, n, out = moe.experts.down_proj.double(), len(r), dict(lost=[], directions=[], rank=[])
    idx = choose_neurons(stats.usefulness, width)
    for i in range(n):
        j = idx[i].to(d.device); a = r[i][j][:,j]
        a = a + (1e-4*a.diagonal().mean() + 1e-30)*torch.eye(width, dtype=a.dtype, device=a.device)
        e = d[i].clone(); e[:,j] -= torch.linalg.solve(a, r[i][j]@d[i].T).T    # what the fitted columns leave
        out['lost'].append(((e@rv[i])*e).sum().item()/max(((d[i]@rv[i])*d[i]).sum().item(), 1e-30))
        c = d[i]@r[i]@d[i].T; lam = torch.linalg.eigvalsh(c).clamp(min=0)
        out['directions'].append((lam[-width:].sum()/lam.sum().clamp(min=1e-30)).item()); out['rank'].append(effective_rank(c))
    u = stats.usefulness
    return out | dict(neurons=(u.topk(width, 1).values.sum(1)/u.sum(1).clamp(min=1e-30)).tolist(), energy=u.sum(1).tolist(), weight=(stats.mass/stats.n).tolist())

def study(a, rows):
    model, held, calibration = open_study(a)
    _, xv, yv = states_of(model, held)
    for seed in map(int, a.seeds.split(',')):
        key = dict(seed=seed, keep=a.keep, tokens=a.tokens, eval_tokens=a.eval_tokens)
        if any(r['key']==key for r in rows): continue
        began, cal = time.time(), calibration(a.tokens, seed)
        _, x, y = states_of(model, cal)
        layers, blocks = {}, {}
        for i,layer in enumerate(model.model.layers):
            moe = layer.mlp
            if not hasattr(moe, 'experts'): continue
            (n, h, width), k = moe.experts.down_proj.shape, moe.experts.config.num_experts_per_tok
            stats, few = gather(moe, x[i]), torch.linspace(0, len(cal)-1, min(512, len(cal)), device=a.device).long()
            routed, target = y[i]-shared_output(moe, x[i]), yv[i]-shared_output(moe, xv[i])
            l = describe_layer(i, stats, torch.cov(routed.T.double(), correction=0), output_similarity(moe.experts, x[i][few])[0], k, seed)
            groups = torch.tensor(l['groups']); by_lot = random_groups(n, int(groups.max())+1, seed)
            shares = {g: gate_shares(moe, x[i], v.to(a.device)) for g,v in (('act_cl', groups), ('random', by_lot))}
            blocks[i] = fit_outputs(cut_block(moe, stats.usefulness, max(1, int(width*a.keep))), [(x[i], y[i])])
            cores = {g: fit_outputs(fuse_moe(moe, v, stats.counts, mode='cores'), [(x[i], y[i])]) for g,v in (('act_cl', groups), ('random', by_lot))}
            alone = lambda b: fvu(target, block_forward(b, xv[i])-shared_output(moe, xv[i]))
            e = of_experts(moe, stats, grams(moe, x[i]), grams(moe, xv[i]), max(1, int(width*a.keep)))
            weight = torch.tensor(e['energy']); weight /= weight.sum()
            layers[str(i)] = {k: l[k] for k in ('effective_rank', 'hidden', 'mean_cosine', 'fire_together', 'fire_together_chance', 'groups', 'counts')} | dict(
                neurons=energy_at(l['energy_curve'], a.keep), directions=(torch.tensor(e['directions'])*weight).sum().item(), expert_rank=(torch.tensor(e['rank'])*weight).sum().item(),
                fire_together_random=fire_together(stats.coactivation, by_lot),
                share_variance={g: of_cores(v, *shares[g]) for g,v in (('act_cl', groups), ('random', by_lot))}, alone=alone(blocks[i]), cores={g: alone(b) for g,b in cores.items()},
                experts=e | dict(share_variance=shares['act_cl'][0].tolist()))
        _, xs, ys = states_of(model, held, blocks)
        for i in blocks:
            moe = model.model.layers[i].mlp; target = yv[i]-shared_output(moe, xv[i]); off = lambda out: fvu(target, out-shared_output(moe, xs[i]))
            chosen = [torch.zeros(len(held), len(moe.gate.weight), device=a.device).scatter_(1, moe.gate(v)[2], 1) for v in (xv[i], xs[i])]
            layers[str(i)] |= dict(both=off(ys[i]), inherited=off(block_forward(moe, xs[i])), same_experts=((chosen[0]*chosen[1]).sum()/chosen[0].sum()).item())
        rows.append(dict(key=key, layers=layers, calibration=cal.sha256, held_out=held.sha256, seconds=round(time.time()-began, 1), **made_on(a.device)))
        write_atomic(a.out, json.dumps(rows, indent=1)+'\n')

def table(rows):
    d = pd.DataFrame([dict(layer=int(i)) | {k: v for k,v in l.items() if isinstance(v, (int, float))} | {f'{k} {g}': v for k in ('share_variance', 'cores') for g,v in l[k].items()} for r in rows for i,l in r['layers'].items()])
    if rows: print(d.groupby('layer').mean().round(3).T.to_string())

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('teacher', help='TEACHER OUT, or OUT alone'); p.add_argument('out', nargs='?', type=Path); p.add_argument('--data', type=Path)
    p.add_argument('--seeds', default='0,1,2'); p.add_argument('--keep', type=float, default=.25); p.add_argument('--tokens', type=int, default=32768); p.add_argument('--eval-tokens', type=int, default=8192)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    a = p.parse_args(); torch.set_grad_enabled(False)
    if a.out is None: a.out = Path(a.teacher)
    rows = json.loads(a.out.read_text()) if a.out.exists() else []
    if a.teacher!=str(a.out): study(a, rows)
    table(rows)
