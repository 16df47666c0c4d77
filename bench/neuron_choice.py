"""Which neurons to keep, and in which form: KL to the teacher on held-out text, one variant a row, the same bytes in all.

    python bench/neuron_choice.py TEACHER DATA results/neuron-choice.json --keep 0.25 --variants energy,subset
    python bench/neuron_choice.py TEACHER DATA results/neuron-choice.json --keep 0.0625 --steps 400 --variants energy,cores1 --tokens 262144 --eval-tokens 0

TEACHER is a checkpoint, DATA a folder with DOMAIN.train.jsonl.gz and DOMAIN.valid.jsonl.gz. Rows that are in the results already
are not made again. A row is the pipeline's own run, layer after layer on the student's own states, but for how the block is built;
nothing is written, so that widths are possible which no stock engine can load.
"""
import argparse, json, tempfile, time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from moe_fuse.awq_loading import *
from moe_fuse.calibration import *
from moe_fuse.checkpoint import write_atomic
from moe_fuse.evaluation import compare
from moe_fuse.expert_analysis import *
from moe_fuse.fusion import *
from moe_fuse.grouping import *
from moe_fuse.headers import *
from moe_fuse.multiplex_lora import *
from moe_fuse.neuron_choice import *
from moe_fuse.pipeline import *
from moe_fuse.streaming import *

# the teacher's loss seen from each block's output

def loss_gradients(ck, tokens, device):
    "Gradient of the log-likelihood of a sampled next token, for every layer's block output: {layer: [T, H]} on the CPU"
    model = empty_model(ck); rotary = model.model.rotary_emb.to(device); model.config._attn_implementation = 'padded_sdpa'
    layers = [load_layer(ck, l, f'model.layers.{i}', torch.float32, device, None) for i,l in enumerate(model.model.layers)]
    emb, head, out = ck.weight('model.embed_tokens.weight', torch.float32).to(device), last_layer(ck, empty_model(ck), device=device), {}
    for a,b,lengths in tokens.batches(4096):
        s, ys = emb[tokens.ids[a:b].to(device)].requires_grad_(), {}
        for i,layer in enumerate(layers):
            h = attend(layer, s, lengths, rotary); x = layer.post_attention_layernorm(h)
            ys[i] = moe_forward(layer.mlp, x) if hasattr(layer.mlp, 'experts') else layer.mlp(x); ys[i].retain_grad()
            s = h+ys[i]
        z = head(s).log_softmax(-1)
        z.gather(1, torch.multinomial(z.detach().exp().cpu(), 1, generator=torch.Generator().manual_seed(a)).to(device)).sum().backward()
        for i,y in ys.items(): out.setdefault(i, []).append(y.grad.cpu())
    return {i: torch.cat(g) for i,g in out.items()}

# what a variant knows of its layer, each computed when first asked for

class Layer:
    def __init__(self, i, moe, stats, targets, job, grads): self.i, self.moe, self.stats, self.targets, self.job, self.grads, self.known = i, moe, stats, targets, job, grads, {}
    def batches(self): # (x, p, h, first row, end)
        for a,b,_ in self.job.batches(held=False):
            x = self.targets.for_teacher(a, b)[0]; p = route(self.moe, x)
            yield x, p, expert_hidden(self.moe.experts, x, p), a, b
    def __getattr__(self, k):
        if k not in ('grams', 'seen', 'taylor', 'metric'): raise AttributeError(k)
        if k not in self.known: self.known[k] = getattr(self, '_'+k)()
        return self.known[k]
    def _grams(self): return sum(feature_grams(h, p) for _,p,h,_,_ in self.batches())
    def _metric(self): g = self.grads[self.i].double(); return g.T@g/len(g)
    def _taylor(self): return sum(taylor_usefulness(h, p, self.moe.experts.down_proj, self.grads[self.i][a:b].to(h.device)) for _,p,h,a,b in self.batches())
    def _seen(self): d = self.moe.experts.down_proj.double(); return torch.einsum('nhi,hg,ngi->ni', d, self.metric.to(d), d)*self.stats.usefulness/d.square().sum(1).clamp(min=1e-30)

def width(l, keep): return max(1, round(l.moe.experts.down_proj.shape[2]*keep))
def ordered(order, r): return order[:,:r].sort(1).values
def pooled(u, r): return choose_uneven(u, pool_widths([u], [1.], r*len(u), least=0)[0])

CHOICES = {   # layer, r -> [N, r] neurons, or N lists of them, N*r in all
    'energy':        lambda l,r: choose_neurons(l.stats.usefulness, r),
    'random':        lambda l,r: choose_neurons(torch.rand(l.stats.usefulness.shape, generator=torch.Generator().manual_seed(l.job.recipe['seed'])), r),
    'subset':        lambda l,r: ordered(greedy_subset(l.grams, l.moe.experts.down_proj, r)[0], r),
    'backward':      lambda l,r: backward_subset(l.grams, l.moe.experts.down_proj, r),
    'taylor':        lambda l,r: choose_neurons(l.taylor, r),
    'seen':          lambda l,r: choose_neurons(l.seen, r),
    'energy-pooled': lambda l,r: pooled(l.stats.usefulness, r),
    'seen-pooled':   lambda l,r: pooled(l.seen, r),
    'taylor-pooled': lambda l,r: pooled(l.taylor, r),
    'backward-pooled': lambda l,r: pooled(backward_usefulness(l.grams, l.moe.experts.down_proj), r),
    'subset-pooled': lambda l,r: pooled(subset_usefulness(l.grams, l.moe.experts.down_proj), r),
}

def slim_block(moe, idx, on=None):
    "A stock block of any width; lists of unequal lengths are padded with neurons that stay zero"
    gate_up, down = take_padded(moe.experts, idx)
    s, r, state = moe.shared_experts, down.shape[2], {k: v for k,v in moe.state_dict().items() if not k.startswith('experts.')}
    if on is not None:
        e, j = on; i = moe.experts.down_proj.shape[2]; w = moe.experts.gate_up_proj
        state['shared_experts.gate_proj.weight'] = torch.cat([s.gate_proj.weight, w[e,j]]); state['shared_experts.up_proj.weight'] = torch.cat([s.up_proj.weight, w[e,i+j]])
        state['shared_experts.down_proj.weight'] = torch.cat([s.down_proj.weight, down.new_zeros(down.shape[1], len(e))], 1)
    block = with_config(moe, moe_intermediate_size=r, n_shared_experts=1)
    S = len(state['shared_experts.gate_proj.weight']); h = down.shape[1]
    with torch.device('meta'): block.shared_experts.gate_proj, block.shared_experts.up_proj, block.shared_experts.down_proj = (nn.Linear(a, b, bias=False) for a,b in ((h,S),(h,S),(S,h)))
    return fill(block, **{k: v.clone() for k,v in state.items()}, experts__gate_up_proj=gate_up, experts__down_proj=down)

def always_on(share): # that share of the neurons serves every token
    def make(l, keep):
        n, r = len(l.stats.usefulness), max(1, round(width(l, keep)*(1-share)))
        idx = choose_neurons(l.stats.usefulness, r)
        return slim_block(l.moe, idx, choose_always_on(l.stats.usefulness, idx, n*(width(l, keep)-r)))
    return make

def cores(share, groups): # cores as wide as that share of an expert, of their members' most useful neurons
    def make(l, keep):
        n, i = l.stats.usefulness.shape; w = max(1, round(i*share)); e = round(n*i*keep/w)
        g = groups(l, e)
        gate_up, down = core_neurons(l.moe.experts, g, l.stats.usefulness, w)
        return FusedMoE(l.moe, g, gate_up, down, mode='cores').requires_grad_(False)
    return make

def by_coactivation(l, e): return group_by_coactivation(l.stats.coactivation, e, l.job.recipe['seed'])
def at_random(l, e): return torch.randperm(len(l.stats.usefulness), generator=torch.Generator().manual_seed(l.job.recipe['seed']*100+l.i))%e

VARIANTS = {k: (lambda l,keep,f=f: slim_block(l.moe, f(l, width(l, keep)))) for k,f in CHOICES.items()} | {
    'on25': always_on(.25), 'on50': always_on(.5), 'on75': always_on(.75),
    'cores1': cores(1, by_coactivation), 'cores1-random': cores(1, at_random), 'cores2': cores(.5, by_coactivation), 'cores2-random': cores(.5, at_random),
    'cores4': cores(.25, by_coactivation), 'cores4-random': cores(.25, at_random), 'cores8': cores(.125, by_coactivation),
    'merged': lambda l,keep: slim_block_of(l, merge_neurons(l.moe.experts, l.grams, l.stats.usefulness, width(l, keep))),
}
def slim_block_of(l, weights):
    b = slim_block(l.moe, choose_neurons(l.stats.usefulness, weights[1].shape[2])); b.experts.gate_up_proj.data, b.experts.down_proj.data = weights
    return b

# one student, one layer

@torch.no_grad()
def student(variant, i, layer, stats, targets, job, grads):
    s, r = targets.student, job.recipe
    for a,b,lengths in job.batches():
        h = attend(layer, s.old.read(a, b, job.device), lengths, job.rotary)
        s.new.write(a, h if stats else h+layer.mlp(layer.post_attention_layernorm(h)))
    if stats is None: return {}
    moe = VARIANTS[variant](Layer(i, layer.mlp, stats, targets, job, grads), r['keep'])
    shared = lambda x: shared_output(layer.mlp, x)
    found = {'built': routed_fvu(moe, shared, targets, job)}
    fit_down(moe, targets, job); found['fitted'] = routed_fvu(moe, shared, targets, job)
    if r['steps']:
        for n in range(max(1, r['rounds'])):
            distill_block(moe, targets, replace(job, recipe=r | dict(seed=r['seed']+1000*n)), r['steps']//max(1, r['rounds']))
            if n==r['rounds']-1 or not r['rounds']: found['distilled'] = routed_fvu(moe, shared, targets, job)
            if r['rounds']: fit_down(moe, targets, job)
        if r['rounds']: found['refitted'] = routed_fvu(moe, shared, targets, job)
    round_weights(moe, job.dtype)
    for a,b,_ in job.batches():
        h = s.new.read(a, b, job.device); s.new.write(a, h + block_forward(moe, layer.post_attention_layernorm(h)))
    return found

def study(teacher, data, variants, recipe, tokens, eval_tokens, device):
    "{variant: (evaluation, FVU by layer, seconds)}"
    files = lambda split: ','.join(str(f) for f in sorted(data.glob(f'*.{split}.jsonl.gz')))
    ck = Checkpoint(resolve_source(teacher)); tok = load_tokenizer(ck.folder)
    cal, held = sample_tokens(read_docs(files('train'), seed=recipe['seed']), tok, tokens, 512, recipe['seed']), sample_tokens(read_docs(files('valid'), 'valid'), tok, eval_tokens, 512)
    grads = loss_gradients(ck, cal, device) if any(v.startswith(('taylor','seen')) for v in variants) else None
    model = empty_model(ck); n, h = len(cal)+len(held), model.config.hidden_size
    job = Job(cal, held, recipe, device, torch.bfloat16, model.model.rotary_emb, None, {}, 8192)
    fvus, seconds = {v: {} for v in variants}, dict.fromkeys(variants, 0)
    with tempfile.TemporaryDirectory() as d:
        streams = {k: Stream(k, d, n, h, 0) for k in ('teacher', *variants)}
        y = States(n, h, Path(d)/'y')
        for k,s in streams.items(): embed_tokens(ck, torch.cat([cal.ids, held.ids]), s.old, torch.float32 if k=='teacher' else job.dtype)
        for i,layer in stream_layers(ck, model, device=device):
            with torch.no_grad(): stats = teacher_layer(layer, streams['teacher'], y, job)
            round_weights(layer, job.dtype)
            for v in variants:
                t = time.perf_counter()
                if found := student(v, i, layer, stats, Targets(layer, streams['teacher'], streams[v], y, device, recipe['drift']), job, grads): fvus[v][str(i)] = found
                seconds[v] += time.perf_counter()-t
            for s in streams.values(): s.step()
        heads = [last_layer(ck, empty_model(ck), device=device) for _ in range(2)]; round_weights(heads[1], job.dtype)
        states = {k: s.old.read(len(cal), n) for k,s in streams.items()}
        for s in streams.values(): s.close()
        logits = {k: (lambda a,b,s=s,head=heads[k!='teacher']: head(s[a:b].to(device))) for k,s in states.items()}
        with torch.no_grad(): return {v: (compare(held, logits['teacher'], logits[v]), fvus[v], seconds[v]) for v in variants}

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('teacher'); p.add_argument('data', type=Path); p.add_argument('out', type=Path)
    p.add_argument('--variants', required=True, help=', '.join(VARIANTS)); p.add_argument('--keep', type=float, required=True)
    p.add_argument('--steps', type=int, default=0); p.add_argument('--rounds', type=int, default=0, help='so many times: a share of the steps, then the solve for the down projections; 0 for no solve after the steps')
    p.add_argument('--seeds', default='0'); p.add_argument('--lr', type=float, default=2e-3); p.add_argument('--drift', type=float, default=.5)
    p.add_argument('--tokens', type=int, default=40960); p.add_argument('--eval-tokens', type=int, default=30720, help='0 for all')
    a = p.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    for seed in map(int, a.seeds.split(',')):
        rows = json.loads(a.out.read_text()) if a.out.exists() else []
        recipe = dict(keep=a.keep, steps=a.steps, rounds=a.rounds, lr=a.lr, drift=a.drift, seed=seed)
        key = lambda v: dict(variant=v) | recipe | dict(tokens=a.tokens, eval_tokens=a.eval_tokens)
        left = [v for v in a.variants.split(',') if not any(r['key']==key(v) for r in rows)]
        if not left: continue
        for v,(e,f,s) in study(a.teacher, a.data, left, recipe, a.tokens, a.eval_tokens or None, device).items():
            rows.append(dict(key=key(v), kl=e['mean']['kl'], loss=e['mean']['loss_student'], teacher=e['mean']['loss_teacher'], agreement=e['mean']['agreement'], held_out=e['mean']['tokens'],
                             fvu=f, seconds=round(s, 1), device=torch.cuda.get_device_name() if device=='cuda' else 'cpu', torch=torch.__version__, date=time.strftime('%Y-%m-%d')))
            print(v, a.keep, a.steps, seed, f"KL {e['mean']['kl']:.4f}", f'{s:.0f} s', {i: round(list(x.values())[-1], 3) for i,x in f.items()}, flush=True)
        a.out.parent.mkdir(exist_ok=True, parents=True); write_atomic(a.out, json.dumps(rows, indent=1)+'\n')
