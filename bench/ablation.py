"""The first recipe's ablation: how experts are grouped, how long the layers are trained, how cores are merged. Layer by layer, and as whole models.

    python bench/ablation.py demo results/ablation-demo.json --tokens 16384 --eval-tokens 16384
    python bench/ablation.py TEACHER results/ablation.json --data DATA --tokens 65536 --eval-tokens 65536
    python bench/ablation.py results/ablation-demo.json                        # the tables of what is there

Every routed layer becomes cores with multiplexing and a mixture of LoRA (04_multiplex_lora) at --keep of its routed weights, from the teacher's own states.
Groups: act_cl (spectral clustering of co-activation), state_cl (of the mean cosine of all experts' outputs on a sample), top_k (the most used experts are the cores as they
are, the others join the one with the most similar router row), random. Cores of the other three are merged by Multi-SLERP with member 0 as the base; --merges adds others for act_cl.
Presets (05_healing): none, False_1, True_1, True_5. A layer's number is the held-out FVU of its routed output; a model's, all layers replaced, the KL and the loss on held-out text.
Rows that are in the results already are not made again; no row is begun after --minutes.
"""
import argparse, copy, json, time
from pathlib import Path

import pandas as pd, torch
from tqdm import tqdm

from moe_fuse.awq_loading import *
from moe_fuse.baselines import layout_shape
from moe_fuse.calibration import *
from moe_fuse.checkpoint import write_atomic
from moe_fuse.evaluation import compare
from moe_fuse.expert_analysis import *
from moe_fuse.fusion import fvu
from moe_fuse.grouping import *
from moe_fuse.headers import *
from moe_fuse.heal import whole_model
from moe_fuse.healing import *
from moe_fuse.merging import *
from moe_fuse.multiplex_lora import *
from moe_fuse.sources import *

def open_study(a): # `teacher`, `data`, `eval_tokens`, `device` -> (model in memory, held-out tokens, function of (tokens, seed) that samples calibration text)
    ck = Checkpoint(resolve_source(a.teacher)); tok = load_tokenizer(ck.folder)
    text = lambda split: 'demo' if a.data is None else ','.join(str(f) for f in sorted(a.data.glob(f'*.{split}.jsonl.gz')))
    model = whole_model(ck, device=a.device); model.config._attn_implementation = 'padded_sdpa'
    return model, sample_tokens(read_docs(text('valid'), 'valid'), tok, a.eval_tokens, 512), lambda tokens, seed: sample_tokens(read_docs(text('train'), seed=seed), tok, tokens, 512, seed)

def made_on(device): return dict(device=torch.cuda.get_device_name() if device=='cuda' else 'CPU', torch=torch.__version__, date=time.strftime('%Y-%m-%d'))

def states_of(model, tokens, blocks={}): # -> (last hidden states [T, H], {layer: inputs of its block}, {layer: outputs})
    "Run a model in memory over packed sequences, some of its blocks replaced."
    h, x, y = model.model.embed_tokens(tokens.ids.to(model.device)), {}, {}
    for i,layer in enumerate(model.model.layers):
        hs, xs, ys = [], [], []
        for a,b,lengths in tokens.batches():
            s = attend(layer, h[a:b], lengths, model.model.rotary_emb)
            z = layer.post_attention_layernorm(s)
            o = blocks[i](z) if i in blocks else layer.mlp(z[None])[0]
            hs.append(s+o); xs.append(z); ys.append(o)
        h, x[i], y[i] = torch.cat(hs), torch.cat(xs), torch.cat(ys)
    return model.model.norm(h), x, y

def gather(moe, x):
    n, h, i = moe.experts.down_proj.shape
    stats = ExpertStats(n, i, h, device=x.device, moments='layer')
    for part in x.split(4096):
        p = route(moe, part); act = expert_hidden(moe.experts, part, p)
        stats.update(moe.experts, act, grouped_linear(act, moe.experts.down_proj, p.counts), p, moe.gate(part)[2].shape[1], x=part)
    return stats

def start(moe, stats, x, how, merge, keep, seed):
    "The fused layer before any training"
    n, h, i = moe.experts.down_proj.shape
    s = layout_shape('multiplex_mixture', n, h, i, keep, moe.gate(x[:2])[2].shape[1])
    e, w = s.cores, moe.experts
    if how=='act_cl': groups = group_by_coactivation(stats.coactivation, e, seed)
    elif how=='state_cl': groups = spectral_groups(output_similarity(w, x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:2048].to(x.device)])[0].clamp(min=0)+1e-6, e, seed)
    elif how=='top_k': groups = dominant_groups(router_similarity(moe.gate.weight), stats.counts, e)
    else: groups = random_groups(n, e, seed)
    groups = groups.cpu()
    if how=='top_k':
        lead = torch.stack([max((groups==c).nonzero()[:,0], key=lambda j: stats.counts[j]) for c in range(e)])
        cores = w.gate_up_proj[lead].clone(), w.down_proj[lead].clone()
    else: cores = merge_experts(w.gate_up_proj, w.down_proj, groups, merge, align=False, **({} if merge=='mean' else dict(base=0)))
    return fuse_moe(moe, groups, stats.counts, s.rank, 'multiplex_mixture', stats.moment(0, shrink=1.).float(), cores=cores)

def study(a, rows):
    model, held, calibration = open_study(a)
    last, xv, yv = states_of(model, held)
    logits = lambda h: (lambda s, e: model.lm_head(h[s:e]))
    todo = [(how, merge, preset, seed) for seed in map(int, a.seeds.split(',')) for how,merge in [(g, 'dominant' if g=='top_k' else 'multislerp') for g in a.groups.split(',')] + [('act_cl', m) for m in a.merges.split(',') if m]
            for preset in ('none', *PRESETS)]
    def key(t): return dict(zip(('groups', 'merge', 'preset', 'seed'), t)) | dict(keep=a.keep, tokens=a.tokens, batch=a.batch, lr=a.lr)
    todo = [t for t in todo if not any(r['key']==key(t) for r in rows)]
    known = {}
    for n,t in enumerate(tqdm(todo)):
        if time.time()-a.start > a.minutes*60: print(f'{len(todo)-n} rows are left; repeat the command'); return
        how, merge, preset, seed = t
        if seed not in known:                                                  # its text, what enters and leaves each layer, and statistics
            cal = calibration(a.tokens, seed)
            _, x, y = states_of(model, cal); known = {seed: (cal, x, y, {})}
        cal, x, y, stats = known[seed]
        blocks, layers, began = {}, {}, time.time()
        for i,layer in enumerate(model.model.layers):
            moe = layer.mlp
            if not hasattr(moe, 'experts'): continue
            if i not in stats: stats[i] = gather(moe, x[i])
            if (i, how, merge) not in stats: stats[i,how,merge] = start(moe, stats[i], x[i], how, merge, a.keep, seed)
            b = copy.deepcopy(stats[i,how,merge])
            losses = [] if preset=='none' else distill_epochs(b, x[i], y[i], preset, a.lr, a.batch, seed)
            per, b = len(x[i])//a.batch, b.requires_grad_(False)
            shared = shared_output(moe, xv[i])
            layers[str(i)] = dict(fvu=fvu(yv[i]-shared, b(xv[i])-shared), epochs=[sum(losses[s:s+per])/per for s in range(0, len(losses), per)])
            blocks[i] = b
        e = compare(held, logits(last), logits(states_of(model, held, blocks)[0]))
        rows.append(dict(key=key(t), layers=layers, evaluation=e, calibration=cal.sha256, held_out=held.sha256, seconds=round(time.time()-began, 1), **made_on(a.device)))
        write_atomic(a.out, json.dumps(rows, indent=1)+'\n')
    print('nothing is left')

def tables(rows):
    if not rows: return
    d = pd.DataFrame([r['key'] | {f'layer {i}': l['fvu'] for i,l in r['layers'].items()} | dict(KL=r['evaluation']['mean']['kl'], loss=r['evaluation']['mean']['loss_student']) for r in rows])
    g = d.drop(columns=['keep','tokens','batch','lr']).groupby(['groups','merge','preset'], sort=False)
    print(g.mean().drop(columns='seed').round(3).assign(seeds=g.size()).to_string(), '\n\nspread (standard deviation over seeds)\n', g.std().drop(columns='seed').round(3).to_string())

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('teacher', help='TEACHER OUT, or OUT alone'); p.add_argument('out', nargs='?', type=Path); p.add_argument('--data', type=Path)
    p.add_argument('--groups', default='act_cl,state_cl,top_k,random'); p.add_argument('--merges', default='sce,mean'); p.add_argument('--seeds', default='0,1,2')
    p.add_argument('--keep', type=float, default=.5); p.add_argument('--tokens', type=int, default=65536); p.add_argument('--eval-tokens', type=int, default=65536)
    p.add_argument('--batch', type=int, default=2048); p.add_argument('--lr', type=float, default=1e-3); p.add_argument('--minutes', type=float, default=9)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    a = p.parse_args(); a.start = time.time(); torch.set_grad_enabled(False)
    if a.out is None: a.out = Path(a.teacher)
    rows = json.loads(a.out.read_text()) if a.out.exists() else []
    if a.teacher!=str(a.out): study(a, rows)
    tables(rows)
