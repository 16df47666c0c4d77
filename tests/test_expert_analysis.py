"Counts are those of a plain loop, statistics those of float64 sums over each expert's own tokens, and shards add up to one run."
import itertools
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from moe_fuse.awq_loading import *
from moe_fuse.expert_analysis import *
from moe_fuse.headers import *
from tiny_models import *

def chosen(t, n, k, seed, dtype=np.int64): # k distinct ids a token, some far more often than others
    return (np.random.default_rng(seed).gumbel(size=(t, n)) + np.linspace(0, 3, n)).argsort(1)[:,-k:].astype(dtype)

@settings(max_examples=40, deadline=None)
@given(st.integers(0,300), st.integers(1,40), st.data())
def test_coactivation_is_that_of_a_loop(t, n, data):
    idx = chosen(t, n, data.draw(st.integers(1, n)), data.draw(st.integers(0, 99)), data.draw(st.sampled_from([np.int64, np.int32])))
    want = np.zeros((n, n), np.int64)
    for row in idx:
        for i,j in itertools.product(row, row): want[i,j] += 1
    assert (coactivation_numpy(idx, n)==want).all()
    for alone in 2**22, 0: assert (coactivation(idx, n, alone)==want).all()
    assert (coactivation_torch(torch.from_numpy(idx), n, chunk=64).numpy()==want).all()

def test_strided_ids_count_alike():
    idx = chosen(200, 16, 8, 0)
    assert (coactivation(idx[::2,::2], 16)==coactivation(np.ascontiguousarray(idx[::2,::2]), 16)).all()

@pytest.mark.parametrize('bad', [-1, 16])
@pytest.mark.parametrize('count', [lambda i: coactivation(i, 16), lambda i: coactivation(i, 16, alone=0), lambda i: coactivation_torch(torch.from_numpy(i), 16)])
def test_an_id_outside_is_named(count, bad):
    idx = chosen(50, 16, 4, 0); idx[7,2] = bad
    with pytest.raises(ValueError, match=f'{bad}.*outside 0..15'): count(idx)

def test_ids_of_another_kind_are_named():
    with pytest.raises(ValueError, match='float64'): coactivation(np.zeros((3, 2)), 4)
    with pytest.raises(ValueError, match=r'\[3\]'): coactivation(np.zeros(3, np.int64), 4)
    with pytest.raises(ValueError, match=r'\[3, 2\] and weights \[3, 3\]'): sort_pairs(torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 3), 4)

# statistics

@pytest.fixture(scope='module', params=['v2','v3'])
def block(request, tmp_path_factory):
    ck = Checkpoint(write(tmp_path_factory.mktemp(request.param), *tiny(dict(v2=V2, v3=V3)[request.param], seed=3)))
    return load_module(ck, empty_model(ck).model.layers[1], 'model.layers.1').mlp, torch.randn(400, 48, generator=torch.Generator().manual_seed(0))

@torch.no_grad()
def gather(moe, x, moments='full', kind=ExpertStats, step=10**9):
    n, h, i = moe.experts.down_proj.shape
    s = kind(n, i, h, moments=moments) if kind is ExpertStats else kind(n, i)
    for xb in x.split(step):
        p = route(moe, xb); act = expert_hidden(moe.experts, xb, p)
        s.update(moe.experts, act, grouped_linear(act, moe.experts.down_proj, p.counts), p, 4, *([xb] if kind is ExpertStats else []))
    return s

def close(a, b, tol): assert (a-b).abs().max() <= tol*b.abs().max().clamp(min=1e-12), f'{(a-b).abs().max()/b.abs().max():.2g}'

@torch.no_grad()
def test_statistics_are_those_of_a_loop_in_float64(block):
    "A batch is multiplied and summed in float32: some hundred terms, 1e-5 of the largest entry"
    moe, x = block
    s, (_, w, ids) = gather(moe, x), moe.gate(x)
    n, h, i = moe.experts.down_proj.shape
    g, d, xd = moe.experts.gate_up_proj.double(), moe.experts.down_proj.double(), x.double()
    act = lambda e, v: torch.nn.functional.silu(v@g[e,:i].T)*(v@g[e,i:].T)
    f = torch.stack([act(e, xd)@d[e].T for e in range(n)])                                     # [N, T, H]
    for e in range(n):
        t, slot = (ids==e).nonzero().T; we, fe = w[t,slot].double(), f[e,t]
        assert s.counts[e]==len(t)
        for got, want in ((s.mass, we.sum()), (s.mean_norm, fe.norm(dim=1).mean()), (s.saliency, (we*fe.norm(dim=1)).mean()), (s.peak, fe.abs().max()), (s.spread, fe.var(0, correction=0).sum().sqrt())):
            assert abs(got[e]-want) <= 1e-5*want
        close(s.mean_output[e], fe.mean(0), 1e-5)
        close(s.moment(e), (we[:,None]*xd[t]).T@(we[:,None]*xd[t]), 1e-5)
        close(s.usefulness[e], (we[:,None]*act(e, xd[t])).square().sum(0)*d[e].square().sum(0), 1e-5)
        for o in range(n):
            both = [v for v in t.tolist() if (ids[v]==o).any()]
            want = torch.nn.functional.cosine_similarity(f[e,both], f[o,both], dim=1).mean() if both else 0
            assert abs(s.similarity[e,o]-want) <= 1e-5
    cos, mean = output_similarity(moe.experts, x)
    close(mean, f.mean(1), 1e-5)
    close(cos, torch.einsum('ith,jth->ij', *[torch.nn.functional.normalize(f, dim=2)]*2)/len(x), 1e-5)

@pytest.mark.parametrize('moments', [None, 'full', 'layer'])
def test_shards_add_up_to_one_run(block, moments):
    "The same batches, so only float64 sums change their order"
    moe, x = block
    one, a, b = gather(moe, x, moments, step=100), gather(moe, x[:200], moments, step=100), gather(moe, x[200:], moments, step=100)
    a += b
    for k,v in vars(one).items(): close(vars(a)[k].double(), v.double(), 1e-14)

def test_what_a_run_gathers_is_part_of_it(block):
    moe, x = block
    for k,v in vars(gather(moe, x, kind=LayerStats)).items(): assert torch.equal(v, vars(gather(moe, x))[k])

def test_moments_from_the_layer(block):
    "The diagonal is exact and the sum over experts is near; where all experts see alike inputs it is right"
    moe, x = block
    full, layer = gather(moe, x), gather(moe, x, 'layer')
    for e in range(16): close(layer.moment(e).diagonal(), full.moment(e).diagonal(), 1e-5)
    close(layer.moment(3, shrink=1.), full.moments.sum(0)/16, 1e-5)
    with pytest.raises(ValueError, match='half'): ExpertStats(4, 4, 4, moments='half')

def test_an_expert_that_never_fires(block):
    moe, x = block
    n, h, i = moe.experts.down_proj.shape
    p = sort_pairs(torch.randint(3, (50, 1)), torch.ones(50, 1), n)
    s, act = ExpertStats(n, i, h), expert_hidden(moe.experts, x[:50], p)
    s.update(moe.experts, act, grouped_linear(act, moe.experts.down_proj, p.counts), p, 1)
    for v in (s.counts, s.saliency, s.mean_norm, s.mean_output, s.spread, s.similarity, s.peak): assert v.isfinite().all() and (v[3:]==0).all()

def test_nothing_and_other_layers_are_refused(block):
    moe, x = block
    s = ExpertStats(16, 32, 48)
    p = sort_pairs(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4), 16)
    with pytest.raises(ValueError, match='empty'): s.update(moe.experts, x.new_zeros(0, 32), x.new_zeros(0, 48), p, 4)
    with pytest.raises(ValueError, match='differ'): s += ExpertStats(8, 32, 48)
    with pytest.raises(ValueError, match='kind|differ'): s += LayerStats(16, 32)
    p, act = route(moe, x), expert_hidden(moe.experts, x, route(moe, x))
    with pytest.raises(ValueError, match='inputs'): ExpertStats(16, 32, 48, moments='full').update(moe.experts, act, grouped_linear(act, moe.experts.down_proj, p.counts), p, 4)
