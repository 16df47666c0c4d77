"Averages are mergekit's, nothing changes at full size, and neither padding nor batches nor experts that never fire make a difference."
import copy
import pytest, torch
from hypothesis import given, settings, strategies as st
from moe_fuse.awq_loading import *
from moe_fuse.baselines import *
from moe_fuse.calibration import *
from moe_fuse.checkpoint import *
from moe_fuse.evaluation import compare, logits_of
from moe_fuse.expert_analysis import *
from moe_fuse.fusion import *
from moe_fuse.headers import *
from moe_fuse.multiplex_lora import *
from moe_fuse.pipeline import *
from tiny_models import *

@pytest.fixture(scope='module', params=['v2','v3'])
def block(request, tmp_path_factory):
    "One routed block with weights, and inputs for it"
    ck = Checkpoint(write(tmp_path_factory.mktemp(request.param), *tiny(dict(v2=V2, v3=V3)[request.param], seed=3)))
    return load_module(ck, empty_model(ck).model.layers[1], 'model.layers.1').mlp, torch.randn(300, 48, generator=torch.Generator().manual_seed(0))

def close(a, b, tol=1e-5): assert (a-b).abs().max() <= tol*b.abs().max(), f'{(a-b).abs().max()/b.abs().max():.2g}'

def stats_of(moe, x):
    n, _, i = moe.experts.down_proj.shape
    stats, p = LayerStats(n, i), route(moe, x)
    act = expert_hidden(moe.experts, x, p)
    stats.update(moe.experts, act, grouped_linear(act, moe.experts.down_proj, p.counts), p, moe.config.num_experts_per_tok)
    return stats

# averages

@settings(max_examples=30, deadline=None)
@given(st.integers(1,9), st.integers(1,4), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0,2**31-1))
def test_mean_cores_is_mergekits_linear(n, cores, dtype, seed):
    "Up to the 1e-6 of the mean usage that every member is given"
    linear = pytest.importorskip('mergekit.merge_methods', reason='mergekit is not installed; make set-up installs it').merge_tensors
    g = torch.Generator().manual_seed(seed)
    groups = torch.cat([torch.arange(min(cores, n)), torch.randint(min(cores, n), (max(n-cores, 0),), generator=g)])
    w, usage = torch.randn(n, 5, 7, generator=g).to(dtype), torch.randint(1, 1000, (n,), generator=g)
    got = mean_cores(w, groups, usage)
    assert got.dtype==dtype and len(got)==groups.max()+1
    for e in range(len(got)):
        ids = (groups==e).nonzero()[:,0].tolist()
        want = linear([w[i].float() for i in ids], 'linear', parameters={'weight': [float(usage[i]) for i in ids], 'normalize': True})
        eps = 2**-8 if dtype==torch.bfloat16 else 2**-22
        assert ((got[e].float()-want).abs() <= eps*want.abs() + (2e-6*len(ids)*max(1, usage.float().mean()/usage[ids].sum())+1e-6)*w[ids].float().abs().max()).all()

def test_mean_of_identical_members_is_the_member():
    w = torch.randn(1, 6, 5).expand(7, -1, -1)
    close(mean_cores(w, torch.tensor([0,1,0,1,1,0,2]), torch.tensor([3,0,9,0,0,1,5])), w[:3], 1e-6)

def test_members_that_nobody_used_count_alike():
    w = torch.randn(4, 3, 2)
    close(mean_cores(w, torch.tensor([0,0,1,1]), torch.tensor([0,0,5,5]))[0], w[:2].mean(0), 1e-6)
    close(mean_cores(w, torch.zeros(4, dtype=torch.long), torch.zeros(4))[0], w.mean(0), 1e-6)

def test_order_of_the_members_does_not_matter():
    w, groups, usage, order = torch.randn(9, 4, 4), torch.tensor([0,1,2,0,1,2,0,1,2]), torch.arange(9)+1, torch.randperm(9)
    close(mean_cores(w[order], groups[order], usage[order]), mean_cores(w, groups, usage), 1e-6)

# what a stock engine accepts

@settings(max_examples=300, deadline=None)
@given(st.integers(1,12), st.integers(2,32), st.data())
def test_pruned_router_is_one_that_engines_accept(n_group, per_group, data):
    "transformers wants equal groups of 2 or more and enough candidates for top_k; llama.cpp wants some group left out wherever there are groups"
    topk_group = data.draw(st.integers(1, n_group)); n = n_group*per_group
    top_k = data.draw(st.integers(1, topk_group*per_group)); n_keep = data.draw(st.integers(max(top_k, 2), n))
    g, t = pruned_groups(n_keep, n_group, topk_group, top_k)
    assert n_keep%g==0 and n_keep//g>=2 and 1<=t<=g and t*(n_keep//g)>=top_k
    assert g==1 or t<g, f'{n} experts in {n_group} groups, {topk_group} used; {n_keep} stay in {g}, {t} used'
    ids = prune_experts(torch.rand(n), n_keep, g)
    assert len(set(ids.tolist()))==n_keep and (ids.diff()>0).all()
    assert (ids//(n//g)).bincount(minlength=g).tolist()==[n_keep//g]*g

@settings(max_examples=300, deadline=None)
@given(st.integers(1,64), st.integers(1,128), st.integers(0,3), st.floats(.001, 1) | st.just(1.), st.sampled_from([0, .1, .25, .5, .9]))
def test_slim_widths_spend_no_more_than_the_budget(n, width, n_shared, keep, share):
    "Widths are multiples of 8, whole 16 bytes in bfloat16, for a stock grouped product takes no other; none is refused that 8 neurons an expert would fit"
    try: r, on, new = slim_widths(n, width, n_shared, keep, share)
    except BadInput: assert int(n*width*keep)*(1-share) < 8*n+8; return
    assert r%8==0 or (keep==1 and r==width)
    assert n*r + on <= n*width*keep + 1e-6 and r*new==n_shared*width+on and on>=0 and 1<=r<=width

# full size

@pytest.mark.parametrize('mode', ['exact'])
def test_full_rank_is_the_teacher(block, mode):
    moe, x = block
    for cores in 1, 3, 5:                                                      # 16 experts: 3 and 5 do not divide them
        groups = torch.arange(16)%cores
        close(fuse_moe(moe, groups, torch.rand(16), rank=32, mode=mode)(x), moe(x[None])[0])

@pytest.mark.parametrize('mode', MODES)
def test_a_core_for_every_expert_is_the_teacher(block, mode):
    moe, x = block
    if mode=='cores': close(fuse_moe(moe, torch.randperm(16), torch.ones(16), mode=mode)(x), moe(x[None])[0])
    else: close(fuse_moe(moe, torch.randperm(16), torch.ones(16), rank=2, mode=mode)(x), moe(x[None])[0])

def test_slim_and_pruned_at_full_size_are_the_teacher(block):
    moe, x = block
    stats = stats_of(moe, x)
    close(slim_moe(moe, stats.usefulness, 1.)(x[None])[0], moe(x[None])[0])
    close(pruned_moe(moe, stats.saliency, 16)(x[None])[0], moe(x[None])[0])

def test_neurons_that_do_nothing_cost_nothing(block):
    "Cut in half, an expert whose other half was dead is what it was; the fit finds nothing to repair"
    moe, x = copy.deepcopy(block[0]), block[1]
    dead = torch.stack([torch.randperm(32)[:16] for _ in range(16)])
    for e in range(16): moe.experts.down_proj.data[e,:,dead[e]] = 0
    slim = slim_moe(moe, stats_of(moe, x).usefulness, .5)
    close(slim(x[None])[0], moe(x[None])[0])
    fit, p, s = JointRidge(slim.experts.down_proj, slim.shared_experts.down_proj.weight), route(slim, x), slim.shared_experts
    fit.add(expert_hidden(slim.experts, x, p), p, s.act_fn(s.gate_proj(x))*s.up_proj(x), moe(x[None])[0])
    down, shared = fit.solve()
    close(down, slim.experts.down_proj, 1e-4); close(shared, s.down_proj.weight, 1e-4)

def test_joint_ridge_is_the_dense_solve(block):
    "Against normal equations on the dense features, summed over unequal batches, one expert left out; its neurons do not count in the ridge"
    moe, x = block
    y, s = torch.randn(300, 48, generator=torch.Generator().manual_seed(5)), moe.shared_experts
    fit, phi = JointRidge(moe.experts.down_proj, s.down_proj.weight), []
    for xb,yb in zip(x.split([1, 120, 179]), y.split([1, 120, 179])):
        _, weights, indices = moe.gate(xb)
        for row in indices: row[row==7] = next(e for e in range(16) if e!=7 and e not in row)
        p = sort_pairs(indices, weights, 16)
        h, sh = expert_hidden(moe.experts, xb, p), s.act_fn(s.gate_proj(xb))*s.up_proj(xb)
        fit.add(h, p, sh, yb)
        dense = torch.zeros(len(xb), 16, 32, dtype=torch.float64)
        for t,e,w,row in zip(p.token, p.expert, p.weight, h): dense[t,e] = w*row
        phi.append(torch.cat([dense.flatten(1), sh], 1))
    phi, d0 = torch.cat(phi), torch.cat([moe.experts.down_proj.transpose(1,2).reshape(512, 48), s.down_proj.weight.T]).double()
    gram = phi.T@phi
    want = d0 + torch.linalg.solve(gram + 1e-2*gram.diagonal()[gram.diagonal()>0].mean()*torch.eye(len(gram)), phi.T@(y-phi@d0))
    down, shared = fit.solve(1e-2)
    close(down.transpose(1,2).reshape(512, 48).double(), want[:512], 1e-4); close(shared.T.double(), want[512:], 1e-4)
    assert torch.equal(down[7], moe.experts.down_proj[7]), 'an expert that was never used keeps its weights'

@pytest.mark.parametrize('direct', [True, False])
def test_ridge_follows_the_tokens(block, direct):
    "Two tokens an unknown: a fixed small ridge learns what was cut off by heart, the usual one does not; both solvers penalise alike"
    moe, _ = block
    few, s = slim_moe(moe, torch.rand(16, 32, generator=torch.Generator().manual_seed(1)), .25), moe.shared_experts
    f, shared = 16*8+s.down_proj.in_features, lambda v: s.act_fn(s.gate_proj(v))*s.up_proj(v)
    x, held = torch.randn(2*f+4000, 48, generator=torch.Generator().manual_seed(2)).split([2*f, 4000])
    def pairs(v): _, w, ids = moe.gate(v); return sort_pairs(ids, w, 16)
    def off(ridge): # what is unexplained of held-out tokens
        fit, p, ph = JointRidge(few.experts.down_proj, s.down_proj.weight, direct=direct), pairs(x), pairs(held)
        fit.add(expert_hidden(few.experts, x, p), p, shared(x), moe(x[None])[0])
        d, sh = fit.solve(ridge)
        return fvu(moe(held[None])[0], combine(grouped_linear(expert_hidden(few.experts, held, ph), d, ph.counts), ph, len(held)) + shared(held)@sh.T), d
    (usual, d), (small, _), (_, same) = off(None), off(1e-4), off(1.)            # 2F/T
    assert usual<.8*small
    close(d, same, 1e-4)

def test_train_and_eval_route_alike(block):
    moe, x = block
    fused, slim = fuse_moe(moe, torch.arange(16)%5, torch.ones(16), rank=4), slim_moe(moe, stats_of(moe, x).usefulness, .5)
    for m in moe, fused, slim:
        got = [(m.train(t).gate(x), m(x[None])) for t in (True, False)]
        for a,b in zip(got[0][0], got[1][0]): assert torch.equal(a, b)
        assert torch.equal(got[0][1], got[1][1])
    for k,v in moe.gate.state_dict().items(): assert torch.equal(v, slim.gate.state_dict()[k]) and torch.equal(v, fused.gate.state_dict()[k])

# save -> load -> forward

def save(folder, ck, layers, block=None, dtype=torch.float32):
    "Write a checkpoint of the teacher with other blocks in some layers"
    model = empty_model(ck)
    w = CheckpointWriter(folder, model.config.num_hidden_layers+1)
    w.write(0, head_tensors(ck, dtype))
    for i,layer in stream_layers(ck, model):
        if i in layers:
            layer.mlp = layers[i](layer.mlp)
            size = block_sizes(layer.mlp)
        w.write(i+1, layer_tensors(layer, f'model.layers.{i}.', dtype))
    w.close(student_config(ck.config, size, str(dtype).removeprefix('torch.')), ck.folder); w.publish()
    return folder

@pytest.mark.parametrize('shape', ['v2','v3','v3-384','v3-512'])
def test_saved_and_loaded_slim_is_the_one_in_memory(shape, tmp_path):
    n = int(shape[3:] or 16)
    base = (V2 if shape=='v2' else V3) | (dict(num_hidden_layers=2) if n>16 else {})
    ck, made = Checkpoint(write(tmp_path/'t', *tiny(base, n_routed_experts=n))), {}
    def slim(i):
        def make(moe):
            made[i] = slim_moe(moe, torch.rand(n, 32, generator=torch.Generator().manual_seed(i)), .5, .5)
            return copy.deepcopy(made[i])                                      # whoever streams layers frees them
        return make
    layers = range(1, base['num_hidden_layers'])
    model = stock(save(tmp_path/'s', ck, {i: slim(i) for i in layers}))
    x = torch.randn(1, 50, 48)
    for i in layers:
        assert torch.equal(model.model.layers[i].mlp.experts.gate_up_proj, made[i].experts.gate_up_proj)
        assert torch.equal(model.model.layers[i].mlp(x), made[i](x))
    ids, c = torch.randint(5, 2048, (1,30)), Checkpoint(tmp_path/'s')
    with torch.no_grad(): close(logits_of(c, TokenSet([('a', ids[0].tolist())]))(0, 30), model(ids).logits[0])
    info = inspect(c)
    assert info['total']==sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path/'again')                                    # the next tool in line
    again = stock(tmp_path/'again')
    with torch.no_grad(): assert torch.equal(again(ids).logits, model(ids).logits)

# padding and batches

@pytest.fixture(scope='module', params=['v2','v3'])
def teacher(request, tmp_path_factory):
    g = torch.Generator().manual_seed(2)
    toks = TokenSet([('ab'[n%2], torch.randint(5, 2048, (n,), generator=g).tolist()) for n in (1, 3, 130, 7, 64, 65, 200, 2, 2, 90)])
    return Checkpoint(write(tmp_path_factory.mktemp(request.param), *tiny(dict(v2=V2, v3=V3)[request.param]))), toks

def statistics(ck, toks, max_tokens):
    "Statistics of each routed layer, last states and logits, with batches of one size"
    model, h, out = empty_model(ck), States(len(toks), 48), []
    embed_tokens(ck, toks.ids, h)
    with torch.no_grad():
        for i,layer in stream_layers(ck, model):
            stats = LayerStats(16, 32)
            for a,b,lengths in toks.batches(max_tokens):
                x = attend(layer, h.read(a, b), lengths, model.model.rotary_emb)
                z = layer.post_attention_layernorm(x)
                if i==0: h.write(a, x+layer.mlp(z)); continue
                p = route(layer.mlp, z); act = expert_hidden(layer.mlp.experts, z, p)
                part = LayerStats(16, 32)
                part.update(layer.mlp.experts, act, grouped_linear(act, layer.mlp.experts.down_proj, p.counts), p, 4)
                stats += part; h.write(a, x+moe_forward(layer.mlp, z))
            if i: out.append(stats)
    return out, h.read(0, len(toks))

def test_padding_changes_neither_statistics_nor_states(teacher):
    "One sequence a batch has no padding at all"
    ck, toks = teacher
    (a, ha), (b, hb) = statistics(ck, toks, 1), statistics(ck, toks, 10**9)
    assert len(list(toks.batches(1)))==len(toks.lengths) and len(list(toks.batches(10**9)))==1
    close(hb, ha)
    for s,t in zip(a, b):
        assert torch.equal(s.coactivation, t.coactivation) and s.counts.sum()==len(toks)*4
        for k in 'mass','output','usefulness': close(getattr(s, k), getattr(t, k))
        assert torch.equal(choose_neurons(s.usefulness, 8), choose_neurons(t.usefulness, 8))

def test_padding_changes_no_loss(teacher):
    "Losses and logits are those of each sequence alone in the model that `transformers` loads"
    ck, toks = teacher
    model, logits = stock(ck.folder), logits_of(ck, toks)(0, len(toks))
    with torch.no_grad(): want = torch.cat([model(ids[None]).logits[0] for ids in toks.ids.split(toks.lengths)])
    close(logits, want)
    sums, at = {d: [] for d in 'ab'}, 0
    for dom,n in zip(toks.domains, toks.lengths):
        if n>1: sums[dom].append(torch.nn.functional.cross_entropy(want[at:at+n-1].double(), toks.ids[at+1:at+n], reduction='none'))
        at += n
    got, sums = compare(toks, lambda a,b: logits[a:b], lambda a,b: logits[a:b]), {d: torch.cat(v) for d,v in sums.items()}
    for d,v in sums.items(): assert got[d]['tokens']==len(v) and abs(got[d]['loss_student']/v.mean()-1) <= 1e-5 and got[d]['kl']==0
    assert abs(got['mean']['loss_student']/torch.stack([v.mean() for v in sums.values()]).mean()-1) <= 1e-5, 'the mean is over domains'

def test_statistics_of_shards_add_up(teacher):
    ck, toks = teacher
    layer = next(l for i,l in stream_layers(ck, empty_model(ck)) if i==1)
    x = torch.randn(90, 48)
    parts, whole = [stats_of(layer.mlp, p) for p in x.split([1, 40, 49])], stats_of(layer.mlp, x)
    total = parts[0]
    for p in parts[1:]: total += p
    assert torch.equal(total.coactivation, whole.coactivation)
    for k in 'mass','output','usefulness','saliency': close(getattr(total, k), getattr(whole, k))

# an expert that never fires

def mute(state, config, dead):
    "Push some experts' router bias so far down that nobody chooses them; V2 has no bias, so their logits are sunk through the router's weight"
    state = dict(state)
    for i in range(1, config['num_hidden_layers']):
        k = f'model.layers.{i}.mlp.gate.e_score_correction_bias'
        state[k] = state[k].clone(); state[k][dead] = -1e9
    return state

@pytest.mark.parametrize('method', METHODS)
def test_an_expert_that_never_fires_breaks_nothing(small, method, tmp_path):
    "3 of 16 experts, two of one group, through the whole run; they are legal, get no weight, and the rest is fitted around them"
    config, state = tiny(V3)
    dead = [2, 4, 5]
    folder = write(tmp_path/'t', config, mute(state, config, dead))
    run = small(folder, tmp_path/'s', keep=.5, method=method, dtype='float32')
    for k,r in run.report['evaluation'].items():
        assert all(v==v and 0<=v<100 for n,v in r['mean'].items() if n!='tokens'), (k, r)
    for layers in run.report['fvu'].values():
        for f in layers.values(): assert all(0<=v<float('inf') for v in f.values()) and list(f.values())[-1]<2, f   # cores of other experts' neurons may be far off until they are fitted
    model, ids = stock(tmp_path/'s'), run.held.ids[-run.held.lengths[-1]:]
    with torch.no_grad(): got = model(ids[None]).logits[0]
    n = len(run.held)
    close(got, run.logits[method](n-len(ids), n), 1e-4)
    pruned = method=='reap' or (method in BASELINES and BASELINES[method].pruned)
    if not pruned:                                                             # the router stays
        for i in 1, 2: assert (model.model.layers[i].mlp.gate.e_score_correction_bias[dead]==-1e9).all()
    elif method!='random':
        kept = tensors_of(tmp_path/'s')
        for i in 1, 2: assert (kept[f'model.layers.{i}.mlp.gate.e_score_correction_bias']>-1).all(), 'a dead expert is the first to go'
