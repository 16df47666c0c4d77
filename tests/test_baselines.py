"Every baseline is the teacher where nothing has to go, stays within its bytes, and survives experts that never fire, odd sizes and every seed."
import itertools, json
import pytest, torch
from moe_fuse.awq_loading import *
from moe_fuse.baselines import *
from moe_fuse.calibration import *
from moe_fuse.cli import main, parser
from moe_fuse.expert_analysis import *
from moe_fuse.fusion import *
from moe_fuse.headers import *
from moe_fuse.merging import *
from moe_fuse.multiplex_lora import *
from moe_fuse.pipeline import KINDS, check_recipe
from tiny_models import *

def stats_of(moe, x, moments='full'):
    n, hid, i = moe.experts.down_proj.shape
    stats, p = ExpertStats(n, i, hid, moments=moments), route(moe, x)
    h = expert_hidden(moe.experts, x, p)
    stats.update(moe.experts, h, grouped_linear(h, moe.experts.down_proj, p.counts), p, moe.experts.config.num_experts_per_tok, x)
    return stats

def block_of(folder, base):
    ck = Checkpoint(write(folder, *tiny(base, seed=3)))
    with torch.no_grad(): return load_module(ck, empty_model(ck).model.layers[1], 'model.layers.1').mlp

@pytest.fixture(scope='module', params=['v2', 'v3'])
def case(request, tmp_path_factory):
    "A routed block, inputs, and their statistics"
    moe, x = block_of(tmp_path_factory.mktemp(request.param), dict(v2=V2, v3=V3)[request.param]), torch.randn(600, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): return moe, x, stats_of(moe, x)

@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(): yield

def close(a, b, tol=1e-5): assert (a-b).abs().max() <= tol*b.abs().max(), f'{(a-b).abs().max()/b.abs().max():.2g}'

@pytest.mark.parametrize('name', BASELINES)
@pytest.mark.parametrize('keep', [.5, .6, .75])
def test_within_the_bytes_and_as_large_as_said(case, name, keep):
    moe, x, stats = case; b, (n, h, i) = BASELINES[name], moe.experts.down_proj.shape
    z = layout_shape(b.layout, n, h, i, keep, moe.experts.config.num_experts_per_tok)
    block = b.build(moe, stats, keep, 0, x)
    size = routed_parameters(block)
    assert size==z.routed <= keep*routed_parameters(moe)
    spare = dict(whole=3*h*i, novices=3*h*i, lowrank=n*3*(h+i), base=n*3*(h+i), multiplex_mixture=n*3*(h+i), exact=n*3*(h+i))[b.layout]
    assert size+spare > keep*routed_parameters(moe) or z.rank==min(h, i)       # the next larger one would not fit
    y = block_forward(block, x)
    assert y.shape==x.shape and y.isfinite().all()
    assert torch.equal(y, block_forward(block, x)) and ('router' in name or (len(block.gate.weight)==z.cores)==b.pruned if hasattr(block.gate, 'weight') else True)

@pytest.mark.parametrize('name', [k for k,b in BASELINES.items() if b.layout=='whole'])
def test_everything_kept_is_the_teacher(case, name):
    moe, x, stats = case
    close(block_forward(BASELINES[name].build(moe, stats, 1., 0, x), x), moe_forward(moe, x))

def test_full_rank_and_all_novices_whole_are_the_teacher(case):
    moe, x, stats = case; n, h, i = moe.experts.down_proj.shape
    big = 2*(n*3*min(h, i)*(h+i)+3*h*i*n+n*h)/(n*3*h*i)                        # more than the teacher's bytes: full rank
    y = moe_forward(moe, x)
    for name in 'svd', 'd2_moe', 'fused', 'seeds':
        z = layout_shape(BASELINES[name].layout, n, h, i, big, 2)
        assert z.rank==min(h, i)
        if name!='seeds' and z.cores<=n: close(block_forward(BASELINES[name].build(moe, stats, big, 0, x), x), y, 2e-3)    # the root of a moment and its inverse, float32, condition up to 1e6
    close(block_forward(NoviceMoE(moe, torch.arange(n), stats.mean_output.float()), x), y)

def test_a_novice_is_the_mean_of_what_it_replaces(case):
    moe, x, stats = case
    n = len(moe.experts.down_proj); keep = torch.arange(0, n, 2)
    block, p = NoviceMoE(moe, keep, stats.mean_output.float()), route(moe, x)
    f = grouped_linear(expert_hidden(moe.experts, x, p), moe.experts.down_proj, p.counts)
    want = torch.where((p.expert%2==0)[:,None], f, stats.mean_output.float()[p.expert])
    close(block_forward(block, x), combine(want, p, len(x))+shared_output(moe, x))
    m = mone(moe, stats, .5)
    score = stats.spread*stats.mass/stats.n
    assert min(score[m.ids]) >= max(score[[i for i in range(n) if i not in m.ids]])

def test_hc_smoe_is_the_mean_of_clusters_of_means(case):
    moe, x, stats = case; n = len(moe.experts.down_proj)
    block = hc_smoe(moe, stats, .5, x=x)
    mean = torch.stack([((moe.experts.act_fn(x@w[:len(w)//2].T)*(x@w[len(w)//2:].T))@d.T).mean(0) for w,d in zip(moe.experts.gate_up_proj, moe.experts.down_proj)])
    from scipy.cluster.hierarchy import fcluster, linkage
    want = fcluster(linkage(mean.double().numpy(), 'average'), n//2, 'maxclust')
    assert len(set(zip(want, block.groups.tolist())))==n//2
    for c in range(n//2):
        ids = (block.groups==c).nonzero()[:,0]
        if (a := stats.counts[ids].float()).sum(): close(block.down_proj[c], (moe.experts.down_proj[ids]*(a/a.sum())[:,None,None]).sum(0), 1e-4)

def test_dominants_are_the_most_frequent(case):
    moe, x, stats = case; n = len(moe.experts.down_proj)
    top = stats.counts.argsort(descending=True, stable=True)[:n//2]
    for f in m_smoe, merge_moe: assert len(f(moe, stats, .5, x=x).groups[top].unique())==n//2

def test_least_squares_explains_more_of_the_outputs_than_the_mean(case):
    moe, x, stats = case
    block = merge_moe(moe, stats, .5, x=x); p = route(moe, x)
    outs, mean = torch.stack([*expert_outputs(moe, x)]), mean_cores(moe.experts.down_proj, block.groups, stats.counts)
    for c in range(len(block.down_proj)):
        ids = (block.groups==c).nonzero()[:,0]; a = stats.counts[ids].float()
        if len(ids)==1 or not a.sum(): continue
        t = p.token[torch.isin(p.expert, ids)].unique()
        y = (outs[ids][:,t]*(a/a.sum())[:,None,None]).sum(0); h = block.act_fn(x[t]@block.gate_up_proj[c].chunk(2)[0].T)*(x[t]@block.gate_up_proj[c].chunk(2)[1].T)
        assert (y-h@block.down_proj[c].T).square().sum() < (y-h@mean[c].T).square().sum()

def test_ream_keeps_centroids_of_each_router_group(case):
    moe, x, stats = case; n, c = len(moe.experts.down_proj), moe.experts.config
    block = ream(moe, stats, .5, x=x)
    same = pruned_moe(moe, stats.saliency, n//2)
    assert type(block) is type(moe) and torch.equal(block.gate.weight, same.gate.weight)
    alone = [e for e in range(n//2) if torch.equal(block.experts.down_proj[e], same.experts.down_proj[e])]
    assert len(alone)<n//2                                                     # somebody took somebody in

def test_the_static_gate_keeps_a_cores_weight_and_the_shuffled_one_its_members(case):
    moe, x, stats = case; n = len(moe.experts.down_proj)
    groups = torch.arange(n)%3
    _, w, i = moe.gate(x); _, ws, same = StaticGate(moe.gate, groups, stats.counts)(x); _, w2, j = ShuffledGate(moe.gate, groups, 1)(x)
    assert torch.equal(same, i) and torch.equal(w, w2) and torch.equal(groups[j], groups[i]) and (i!=j).all()
    core = lambda w, i: torch.zeros(len(w), 3).scatter_add_(1, groups[i], w)
    close(core(ws, i), core(w, i)); close(core(w, j), core(w, i))
    for t in range(20):                                                        # inside a core, shares are those of usage
        for c in range(3):
            m = groups[i[t]]==c
            if m.any(): a = stats.counts[i[t][m]].float()+1; close(ws[t][m]/ws[t][m].sum(), a/a.sum(), 1e-4)
    assert ShuffledGate(moe.gate, torch.arange(n)).to_id.tolist()==list(range(n))                    # alone in a core: nothing to shuffle

@pytest.mark.parametrize('name', BASELINES)
def test_experts_that_never_fire(case, name):
    "Half of them are dead: five tokens of calibration text, which the other half takes"
    moe, x, _ = case
    few = x[:2]
    stats = stats_of(moe, few)
    assert (stats.counts==0).any()
    block = BASELINES[name].build(moe, stats, .5, 0, few)
    assert all(p.isfinite().all() for p in block.parameters()) and block_forward(block, x).isfinite().all()

@pytest.mark.parametrize('name', [k for k,b in BASELINES.items() if b.rich])
def test_moments_of_the_layer_are_enough(case, name):
    moe, x, _ = case
    stats = stats_of(moe, x, 'layer')
    assert block_forward(BASELINES[name].build(moe, stats, .5, 0, x), x).isfinite().all()

@pytest.mark.parametrize('name', BASELINES)
def test_seeds(case, name):
    "The same seed gives the same block; where lots are drawn, another seed another"
    moe, x, stats = case
    a, b, c = (block_forward(BASELINES[name].build(moe, stats, .5, s, x), x) for s in (0, 0, 1))
    assert torch.equal(a, b)
    if name in ('random', 'random_groups'): assert not torch.equal(a, c)

@pytest.mark.parametrize('name', [k for k,b in BASELINES.items() if b.layout not in ('whole',)])
def test_it_can_be_distilled(case, name):
    "Every parameter but the router's is reached by a gradient or is of an expert that did not fire"
    moe, x, stats = case
    block = BASELINES[name].build(moe, stats, .5, 0, x)
    with torch.enable_grad():
        ps = {k: p.requires_grad_() for k,p in block.named_parameters() if not k.startswith('gate.')}
        block_forward(block, x).square().sum().backward()
    assert not [k for k,p in ps.items() if p.grad is None or not p.grad.isfinite().all()]

def test_bytes_at_sizes_of_real_models():
    for n,h,i,k in (64, 2048, 1408, 6), (256, 7168, 2048, 8), (128, 2048, 768, 8):
        for layout,keep in itertools.product(BASELINE_LAYOUTS, (.5, .25, .125)):
            z = layout_shape(layout, n, h, i, keep, k)
            assert z.routed <= keep*n*3*h*i and z.active <= z.routed and z.routed > .85*keep*n*3*h*i
            if layout in ('multiplex_mixture', 'exact'): assert z.routed==fused_parameters(n, h, i, z.cores, z.rank, layout)

def test_what_does_not_fit_is_named():
    with pytest.raises(BadInput, match='keep 0.01 of 32 experts leaves none whole, layout novices'): layout_shape('novices', 32, 192, 64, .01, 4)
    with pytest.raises(BadInput, match='leaves no room for a rank, layout base'): layout_shape('base', 32, 192, 64, .03, 4)
    with pytest.raises(BadInput, match='leaves none whole'): layout_shape('whole', 8, 192, 64, .1, 4)

# the pipeline

def test_the_pipeline_measures_any_of_them(tiny_teacher, small, tmp_path):
    names = list(BASELINES)
    run = small(tiny_teacher, tmp_path/'out', keep=.6, baselines=names, dtype='float32')
    r = run.report
    assert r['kinds']==['slim', *names] and set(r['evaluation'])==set(r['fvu'])==set(r['kinds'])
    t = r['sizes']['teacher']
    for k in names:
        assert r['sizes'][k]['routed'] <= .6*t['routed'] and r['sizes'][k]['active'] <= r['sizes'][k]['total'] < t['total'] and 0<r['evaluation'][k]['mean']['kl']<float('inf')
    for k in names: assert BASELINES[k].title in repr(run)
    assert (tmp_path/'out'/'report.png').exists()

def test_baselines_are_the_same_with_and_without_others(tiny_teacher, small, tmp_path):
    "Richer statistics change nothing for those that don't need them"
    a = small(tiny_teacher, tmp_path/'a', keep=.5, baselines=['frequency', 'reap']).report['evaluation']
    b = small(tiny_teacher, tmp_path/'b', keep=.5, baselines=['reap', 'svd', 'frequency', 'mone']).report['evaluation']
    for k in 'slim', 'reap', 'frequency': assert a[k]==b[k]

def test_baselines_can_be_distilled_in_a_run(tiny_teacher, small, tmp_path):
    r = small(tiny_teacher, tmp_path/'out', keep=.6, baselines=['mone', 'svd', 'd2_moe', 'seeds', 'shuffled'], distill_steps=3, dtype='float32').report
    for k in r['kinds'][1:]: assert all({'built', 'distilled'} <= set(f) for f in r['fvu'][k].values())

@pytest.mark.parametrize('family', ['qwen2_moe', 'mixtral', 'glm4_moe'])
def test_other_families(family, texts, tmp_path):
    "A gated shared expert, none, and router groups of one"
    from test_families import run, tiny as tiny_family
    r = run(write(tmp_path/'src', *tiny_family(family)), tmp_path/'out', texts, keep=.67, baselines=list(BASELINES), tokens=2048).report
    assert r['kinds']==['slim', *BASELINES]
    for k in BASELINES: assert r['sizes'][k]['routed'] <= .67*r['sizes']['teacher']['routed'] and 0<r['evaluation'][k]['mean']['kl']<float('inf')

def test_experts_that_stay_packed_give_the_same_baselines(small, tmp_path):
    from moe_fuse.streaming import layer_bytes
    config, disk, _ = pack(*tiny(V3), 'fp8')
    teacher = write(tmp_path/'teacher', config, disk)
    b = layer_bytes(Checkpoint(teacher), 'model.layers.2')
    names = list(BASELINES)
    floats, packed = (small(teacher, tmp_path/k, keep=.6, baselines=names, device_budget=n).report for k,n in (('floats', None), ('packed', b.rest+b.packed+2*b.expert)))
    for k in names: assert abs(floats['evaluation'][k]['mean']['kl']-packed['evaluation'][k]['mean']['kl']) <= 1e-3*floats['evaluation'][k]['mean']['kl'], k

def test_what_can_not_exist_is_left_out(tmp_path):
    "One expert of eight is none that a router of two could choose from, and leaves nothing beside a base or a core"
    ck = Checkpoint(write(tmp_path/'src', *tiny(V3, n_routed_experts=8, moe_intermediate_size=64, n_group=1, topk_group=1)))
    recipe = dict(method='slim', keep=.125, shared_share=0., distill_steps=0, seed=0, dtype='bfloat16', states='float32', baselines=['reap', 'mean', *BASELINES])
    assert check_recipe(ck, recipe)==['slim', 'mean', 'hc_smoe', 'm_smoe', 'merge_moe', 'svd']
    assert check_recipe(ck, recipe | dict(keep=.5))==['slim', 'reap', 'mean', *BASELINES]

def test_the_command_line_takes_them_and_lists_them(capfd, tmp_path):
    assert main(['run', 'demo', str(tmp_path/'out'), '--baselines', 'mone,nope'])==2
    err = capfd.readouterr().err
    assert err==f"moe-fuse: baseline 'nope' is none of {', '.join(k for k in KINDS if k!='slim')}\n" and set(BASELINES) <= set(err.replace(',', '').split()) and not (tmp_path/'out').exists()
    help = next(a for a in parser()._subparsers._group_actions[0].choices['run']._actions if a.dest=='baselines').help
    assert all(k in help.replace(',', '').replace(';', '').split() for k in KINDS if k!='slim')

@pytest.mark.parametrize('keep', [float('nan'), float('inf'), 0, -1])
def test_shares_of_no_layer_are_refused(keep):
    for layout in BASELINE_LAYOUTS:
        with pytest.raises(BadInput, match='keep'): layout_shape(layout, 32, 192, 64, keep, 4)

def test_more_than_all_and_unknown_layouts_are_refused():
    for layout in 'whole', 'novices':
        with pytest.raises(BadInput, match='keep 1.5 of 32 experts is more than there are'): layout_shape(layout, 32, 192, 64, 1.5, 4)
    with pytest.raises(BadInput, match="layout 'half' is none of whole"): layout_shape('half', 32, 192, 64, .5, 4)

@pytest.mark.parametrize('name', ['svd', 'd2_moe'])
def test_low_rank_of_experts_that_saw_two_tokens(case, name):
    "Moments of rank two at most, whose smallest eigenvalues are rounding"
    moe, x, _ = case
    assert block_forward(BASELINES[name].build(moe, stats_of(moe, x[:2]), .5, 0, x[:2]), x).isfinite().all()
