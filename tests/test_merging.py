"Merges are mergekit's where both have an answer, and keep what any merge should: identity, order, scale, dtype."
import pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment
from moe_fuse.expert_analysis import *
from moe_fuse.fusion import *
from moe_fuse.grouping import *
from moe_fuse.headers import *
from moe_fuse.merging import *

@pytest.fixture(scope='module')
def oracle():
    "mergekit, asked in float32"
    f = pytest.importorskip('mergekit.merge_methods', reason='mergekit is not installed; make set-up installs it').merge_tensors
    return lambda w, how, base=None, **kw: f([*w] if base is None else [base, *w], how, base_index=None if base is None else 0, parameters=kw)

def some(n, shape=(4, 6), seed=0, dtype=torch.float32): return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
def close(a, b, tol=1e-5): assert a.shape==b.shape and (a.float()-b.float()).abs().max() <= tol*b.float().abs().max().clamp(min=1e-6), f'{(a-b).abs().max():.3g}'

sizes, seeds, fractions = st.integers(1, 6), st.integers(0, 2**31-1), st.one_of(st.just(1.), st.floats(.001, 1.))
few = settings(max_examples=40, deadline=None)
PAIRS_ONLY = {'slerp'}
names = [k for k in MERGES if k not in PAIRS_ONLY]

# mergekit

@few
@given(sizes, seeds, st.data())
def test_mean_and_multislerp_are_mergekits(oracle, n, seed, data):
    w, a = some(n, seed=seed), data.draw(st.lists(st.sampled_from([0., .1, 1., 7.]), min_size=n, max_size=n))
    if sum(a):
        close(merge_mean(w, a), oracle(w, 'linear', weight=a))
        close(merge_multislerp(w, a), oracle(w, 'multislerp', weight=a))
        close(merge_multislerp(w, a, base=some(1, seed=seed+1)[0]), oracle(w, 'multislerp', base=some(1, seed=seed+1)[0], weight=a))
    else: close(merge_mean(w, a), w.mean(0)); assert oracle(w, 'linear', weight=a).isnan().all()      # experts that nobody used: it has no answer, we do

@few
@given(sizes, seeds, fractions, st.booleans())
def test_sce_is_mergekits(oracle, n, seed, p, far):
    w, base = some(n, seed=seed), some(1, seed=seed+1)[0]*(3 if far else .1)
    close(merge_sce(w, p=p, base=base), oracle(w, 'sce', base, select_topk=p))

@few
@given(st.integers(2, 6), seeds, fractions, st.data())
def test_a_member_as_base_is_mergekits(oracle, n, seed, p, data):
    w, i = some(n, seed=seed), data.draw(st.integers(0, n-1))
    rest = w[[j for j in range(n) if j!=i]]
    close(merge_sce(w, p=p, base=i), oracle(rest, 'sce', w[i], select_topk=p))
    close(merge_ties(w, p=p, base=i), oracle(rest, 'ties', w[i], weight=1., density=p))
    close(merge_multislerp(w, base=i), oracle(rest, 'multislerp', w[i], weight=1.))

@few
@given(sizes, seeds, fractions, st.data())
def test_ties_is_mergekits(oracle, n, seed, p, data):
    w, base, a = some(n, seed=seed), some(1, seed=seed+1)[0], data.draw(st.lists(st.sampled_from([0., .1, 1., 7.]), min_size=n, max_size=n))
    if sum(a): close(merge_ties(w, a, p=p, base=base), oracle(w, 'ties', base, weight=a, density=p))
    close(merge_ties(w, p=p, base=base), oracle(w, 'ties', base, weight=1., density=p))

@few
@given(seeds, st.floats(0, 1), st.sampled_from(['random', 'same', 'near', 'antipodal', 'parallel', 'zero', 'zeros']))
def test_slerp_is_mergekits(oracle, seed, t, case):
    a, b = some(2, seed=seed)
    a, b = dict(random=(a, b), same=(a, a), near=(a, a+1e-3*b), antipodal=(a, -2*a), parallel=(a, 3*a), zero=(a, 0*a), zeros=(0*a, 0*a))[case]
    want = oracle(torch.stack([b]), 'slerp', a, t=t)
    close(merge_slerp([a, b], [1-t, t]), want, 1e-5 if case!='antipodal' else 1e-4)

@few
@given(sizes, seeds, st.booleans(), st.floats(0, 2))
def test_karcher_is_mergekits(oracle, n, seed, zero, spread):
    "Asked for more steps than its default of 10, or it stops before it is there"
    w = some(n, seed=seed)*spread + some(1, seed=seed+1)
    if zero: w[0] = 0
    if n>1 or not zero: close(merge_karcher(w), oracle(w, 'karcher', max_iter=1000, tol=1e-9), 2e-5)

@few
@given(st.integers(4, 40), seeds, st.floats(0, 1))
def test_karcher_of_more_members_than_dimensions_is_mergekits(oracle, n, seed, spread):
    w = some(n, (3,), seed=seed)*spread + some(1, (3,), seed=seed+1)
    close(merge_karcher(w), oracle(w, 'karcher', max_iter=1000, tol=1e-9), 2e-4)

@pytest.mark.parametrize('how', ['mean', 'sce', 'multislerp', 'karcher', 'ties'])
@pytest.mark.parametrize('seed', range(3))
def test_bfloat16_is_mergekits_float32_rounded(oracle, how, seed):
    "Given bfloat16, mergekit computes in bfloat16. Every number occurs once in a member: of equal ones at the edge of what is trimmed, each trims another"
    r, base = torch.Generator().manual_seed(seed), torch.zeros(8, 12, dtype=torch.bfloat16)
    values = torch.cat([1+torch.arange(128)/128, 2+torch.arange(128)/64]).bfloat16()
    w = torch.stack([values[torch.randperm(256, generator=r)[:96]]*(2*torch.randint(2, (96,), generator=r)-1) for _ in range(5)]).view(5, 8, 12)
    kw, theirs = dict(sce=(dict(p=.5, base=base), dict(base=base.float(), select_topk=.5)), ties=(dict(p=.5, base=base), dict(base=base.float(), weight=1., density=.5))).get(how, ({}, {}))
    if how in ('mean', 'multislerp'): theirs = dict(weight=1.)
    if how=='karcher': theirs = dict(max_iter=1000, tol=1e-9)
    got, want = merge(w, how, **kw), oracle(w.float(), dict(mean='linear').get(how, how), **theirs)
    assert got.dtype==torch.bfloat16 and ((got.float()-want).abs() <= 2**-8*want.abs()+1e-5).all()

def test_where_we_differ_from_mergekit(oracle):
    "Each of these is shown in the notebook"
    pair = some(2, (1000,))
    theirs = oracle(pair, 'sce', pair.mean(0), select_topk=1.)
    assert ((theirs-pair.max(0).values).abs()<1e-6).sum() + ((theirs-pair.min(0).values).abs()<1e-6).sum()==1000     # the sign of a rounding error
    close(merge_sce(pair), pair.mean(0))
    a = pair[0]
    close(oracle([a, -a], 'karcher'), a); close(oracle([-a, a], 'karcher'), -a); assert not merge_karcher([a, -a]).any()
    assert not oracle([a, -a], 'multislerp', weight=1.).any() and not merge_multislerp([a, -a]).any()

# what any merge keeps

BASES = [(k, {}) for k in MERGES] + [('sce', dict(p=.3)), ('ties', dict(p=.3))]

@pytest.mark.parametrize('how,kw', BASES, ids=str)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 6), seed=seeds, scale=st.sampled_from([1e-4, 1., 1e3]))
def test_identical_members_are_the_member(how, kw, n, seed, scale):
    w = scale*some(1, seed=seed).expand(2 if how in PAIRS_ONLY else n, -1, -1)
    close(merge(w, how, **kw), w[0], 1e-6)

@few
@given(st.integers(2, 64), st.sampled_from([1, 3, 30_000]), seeds)
def test_karcher_of_members_on_a_line_has_their_mean_norm(n, size, seed):
    "Or is zero, where as many pull one way as the other"
    g = torch.Generator().manual_seed(seed)
    w, a = some(1, (size,), seed=seed)*(torch.randn(n, 1, generator=g)+.1), torch.rand(n, generator=g)
    got = merge_karcher(w, a)
    assert not got.any() or abs(got.double().norm()/(a.double()@w.double().norm(dim=1)/a.double().sum())-1)<1e-5

@pytest.mark.parametrize('apart', [1e-6, 1e-4, 1e-2])
def test_medoid_of_a_pair_is_the_longer_one(apart):
    for seed in range(20):
        w = some(1, (300,), seed=seed) + apart*some(2, (300,), seed=seed+100)
        assert torch.equal(merge_medoid(w), w[w.double().norm(dim=1).argmax()])

def test_members_of_very_unequal_norms():
    w = torch.tensor([[1e-38, 0], [0, 100]])
    for how in 'karcher', 'multislerp': close(merge(w, how), torch.full((2,), 50/2**.5))
    for how in names: assert merge(torch.zeros(2, 0), how, **(dict(p=.5) if how in ('sce', 'ties') else {})).shape==(0,)

@pytest.mark.parametrize('how,kw', BASES, ids=str)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 6), seed=seeds, scale=st.sampled_from([.25, 3., 1000.]))
def test_order_and_scale(how, kw, n, seed, scale):
    n = 2 if how in PAIRS_ONLY else n
    w, order = some(n, seed=seed), torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    a = torch.rand(n, generator=torch.Generator().manual_seed(seed)) + .1
    close(merge(w[order], how, a[order], **kw), merge(w, how, a, **kw), 1e-5)
    close(merge(w[order], how, **kw), merge(w, how, **kw), 1e-5)
    close(merge(scale*w, how, a, **kw), scale*merge(w, how, a, **kw), 1e-5)
    close(merge(w, how, a*7, **kw), merge(w, how, a, **kw), 1e-5)

@pytest.mark.parametrize('how', [*MERGES])
@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_a_pair_is_symmetric(how, seed):
    a, b = some(2, seed=seed)
    close(merge([a, b], how), merge([b, a], how), 1e-5)
    if how in ('mean', 'sce', 'ties'): close(merge([a, b], how), (a+b)/2, 1e-5)

@pytest.mark.parametrize('how', names)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 5), seed=seeds)
def test_a_member_of_weight_zero_has_no_say(how, n, seed):
    w = some(n, seed=seed)
    close(merge(w, how, [1.]*(n-1)+[0]), merge(w[:-1], how), 1e-5)

@pytest.mark.parametrize('how', [*MERGES])
def test_zeros_and_unused_members(how):
    w = torch.zeros(2, 3, 4)
    assert torch.equal(merge(w, how), w[0])
    w = some(2)
    close(merge(w, how, [0, 0]), merge(w, how))
    w[0] = 0
    assert merge(w, how).isfinite().all()

@pytest.mark.parametrize('how', names)
def test_float32_accumulation(how):
    "A thousand members in bfloat16; summed in bfloat16 they would stop growing"
    w = torch.full((1000, 3), 1., dtype=torch.bfloat16); w[::2] += 2**-7
    got = merge(w, how, **(dict(base=torch.zeros(3)) if how in ('sce', 'ties') else {}))
    assert got.dtype==torch.bfloat16 and (got.float()-1-2**-8).abs().max() <= 2**-8+1e-6
    want = merge(w.float(), how, **(dict(base=torch.zeros(3)) if how in ('sce', 'ties') else {}))
    assert torch.equal(got, want.bfloat16())

@few
@given(st.integers(1, 7), seeds)
def test_medoid_is_the_best_member(n, seed):
    w, a = some(n, seed=seed), torch.rand(n, generator=torch.Generator().manual_seed(seed))+.1
    cost = [sum(a[j]*(w[i]-w[j]).norm() for j in range(n)) for i in range(n)]
    got = merge_medoid(w, a)
    i, = [i for i in range(n) if torch.equal(w[i], got)]
    assert cost[i] <= min(cost)*(1+1e-5)

@few
@given(st.integers(2, 5), seeds)
def test_karcher_is_where_logarithms_cancel(n, seed):
    u = some(n, (5,), seed).double().abs(); u = u/u.norm(dim=1, keepdim=True)   # one orthant: the mean is unique
    m = merge_karcher(u.float()).double(); m = m/m.norm()
    c = (u@m).clamp(-1, 1)[:,None]
    t = u-c*m
    assert (t*c.arccos()/t.norm(dim=1, keepdim=True).clamp(min=1e-12)).mean(0).norm() <= 1e-5

# what is refused

@pytest.mark.parametrize('how', ['sce', 'ties'])
@pytest.mark.parametrize('p', [0, -1, 1.0001, 2, float('nan'), float('inf')])
def test_a_fraction_lies_in_0_1(how, p):
    with pytest.raises(ValueError, match=f'p is {p}, it must lie in'): merge(some(3), how, p=p)

@pytest.mark.parametrize('how', names)
def test_bad_groups(how):
    w = some(3)
    with pytest.raises(ValueError, match=r'unequal shapes: \(4, 6\), \(6, 4\)'): merge([w[0], w[1].T], how)
    with pytest.raises(ValueError, match='without members'): merge([], how)
    for bad in float('nan'), float('inf'):
        v = w.clone(); v[1,2,3] = bad
        with pytest.raises(ValueError, match='member 1 holds NaN or infinity'): merge(v, how)
        with pytest.raises(ValueError, match=f'{bad}.*expected 3 finite'): merge(w, how, [1., bad, 1.])
    with pytest.raises(ValueError, match=r'\[1.0, 2.0\]: expected 3'): merge(w, how, [1, 2])
    with pytest.raises(ValueError, match=r'-2.0.*>= 0'): merge(w, how, [1, -2, 1])

def test_other_refusals():
    with pytest.raises(ValueError, match="'fisher' is none of mean, sce, multislerp, slerp, karcher, ties, medoid"): merge(some(2), 'fisher')
    with pytest.raises(ValueError, match='base is member 2, there are 2'): merge_sce(some(2), base=2)
    with pytest.raises(ValueError, match='base is member -1'): merge_ties(some(2), base=-1)
    with pytest.raises(ValueError, match=r'base is \[3\], members are \[4, 6\]'): merge_multislerp(some(2), base=torch.zeros(3))
    with pytest.raises(ValueError, match='the group has 3 members'): merge_slerp(some(3))
    with pytest.raises(ValueError, match='core 0 has no members'): merge_experts(some(2, (6, 4)), some(2, (4, 3)), torch.tensor([1,1]))
    with pytest.raises(ValueError, match='groups of 3 experts, weights of 2'): merge_experts(some(2, (6, 4)), some(2, (4, 3)), torch.tensor([0,0,1]))

# neurons

def expert(g, d, x): a, b = (x@g.T).chunk(2, -1); return (torch.nn.functional.silu(a)*b)@d.T

@few
@given(st.integers(1, 12), seeds)
def test_a_permutation_changes_nothing(i, seed):
    g, d, x = some(1, (2*i, 7), seed)[0], some(1, (7, i), seed+1)[0], some(1, (20, 7), seed+2)[0]
    order = torch.randperm(i, generator=torch.Generator().manual_seed(seed))
    y = expert(g, d, x)
    assert (expert(*permute_neurons(g, d, order), x)-y).abs().max() <= 1e-6*y.abs().max().clamp(min=1)

@pytest.mark.parametrize('how', [*MERGES])
@settings(max_examples=15, deadline=None)
@given(i=st.integers(1, 12), n=st.integers(2, 4), seed=seeds)
def test_shuffled_copies_merge_to_themselves(how, i, n, seed):
    n = 2 if how in PAIRS_ONLY else n
    r = torch.Generator().manual_seed(seed)
    g, d = some(1, (2*i, 5), seed)[0], some(1, (5, i), seed+1)[0]
    copies = [permute_neurons(g, d, torch.randperm(i, generator=r)) for _ in range(n)]
    gate_up, down = map(torch.stack, zip(*copies))
    got_g, got_d = merge_experts(gate_up, down, torch.zeros(n, dtype=torch.long), how)
    close(got_g[0], gate_up[0], 1e-6); close(got_d[0], down[0], 1e-6)          # the order of the reference, member 0

@few
@given(st.integers(2, 5), seeds)
def test_aligned_members_are_as_near_as_they_get(n, seed):
    gate_up, down = some(n, (16, 5), seed), some(n, (5, 8), seed+1)
    rows, ref = neuron_rows(*align_neurons(gate_up, down, n-1)), neuron_rows(gate_up, down)
    assert torch.equal(rows[n-1], ref[n-1])
    for i in range(n):
        cost = torch.cdist(ref[n-1].double(), ref[i].double(), compute_mode='donot_use_mm_for_euclid_dist').square().numpy(); a, b = linear_sum_assignment(cost)
        assert abs((rows[i]-ref[n-1]).square().sum().item()-cost[a,b].sum()) <= 1e-4*cost[a,b].sum()+1e-4

# layers

def test_merge_experts_is_a_merge_of_each_matrix_of_each_group():
    gate_up, down, groups, use = some(5, (6, 4)), some(5, (4, 3), 1), torch.tensor([1,0,1,2,1]), torch.tensor([3.,1,0,5,2])
    g, d = merge_experts(gate_up, down, groups, 'multislerp', use, align=False)
    ids = [0,2,4]
    close(g[1,:3], merge_multislerp(gate_up[ids,:3], use[ids])); close(g[1,3:], merge_multislerp(gate_up[ids,3:], use[ids])); close(d[1], merge_multislerp(down[ids], use[ids]))
    assert torch.equal(g[0], gate_up[1]) and torch.equal(d[2], down[3])        # alone in a core: bit for bit

def layer(n=6, k=2, t=400, seed=0):
    class Experts: act_fn = staticmethod(torch.nn.functional.silu)
    r, e = torch.Generator().manual_seed(seed), Experts()
    e.gate_up_proj, e.down_proj = some(n, (14, 5), seed), some(n, (5, 7), seed+1)
    p = sort_pairs(torch.stack([torch.randperm(n, generator=r)[:k] for _ in range(t)]), torch.rand(t, k, generator=r), n)
    return e, torch.randn(t, 5, generator=r), p

@few
@given(st.integers(2, 7), st.data())
def test_routing_of_cores_is_the_routing_of_experts_with_shared_weights(n, data):
    k = data.draw(st.integers(1, n)); e = data.draw(st.integers(1, n))
    groups = torch.cat([torch.arange(e), torch.tensor(data.draw(st.lists(st.integers(0, e-1), min_size=n-e, max_size=n-e)), dtype=torch.long)])
    ex, x, p = layer(n, k, 50, data.draw(seeds)%1000)
    g, d = merge_experts(ex.gate_up_proj, ex.down_proj, groups)
    q = route_cores(p, groups, len(x))
    class Cores(type(ex)): gate_up_proj, down_proj = g, d
    class Copies(type(ex)): gate_up_proj, down_proj = g[groups], d[groups]
    out = lambda m, p: combine(grouped_linear(expert_hidden(m, x, p), m.down_proj, p.counts), p, len(x))
    close(out(Cores, q), out(Copies, p), 1e-5)
    assert len(q.expert)==50*min(k, e) and len(q.counts)==e
    for c in q.expert.view(-1).unique().tolist(): assert q.token[q.expert==c].unique().numel()==(q.expert==c).sum()     # a core at most once a token

def test_least_squares_is_numpys():
    ex, x, p = layer()
    groups, use = torch.tensor([0,0,1,1,1,2]), torch.tensor([3.,1,1,1,2,9])
    g = merge_experts(ex.gate_up_proj, ex.down_proj, groups, usage=use)[0]
    got = merge_outputs(ex, g, groups, use, x, p)
    for c,ids in enumerate(([0,1], [2,3,4])):
        seen = torch.isin(p.expert, torch.tensor(ids)); xc = x[p.token[seen].unique()].double()
        y = sum(use[i]/use[ids].sum()*expert(ex.gate_up_proj[i].double(), ex.down_proj[i].double(), xc) for i in ids)
        a, b = (xc@g[c].double().T).chunk(2, -1); h = torch.nn.functional.silu(a)*b
        best = torch.linalg.lstsq(h, y).solution
        err = lambda d: (h@d-y).square().sum()
        assert err(got[c].double().T) <= err(best)*(1+1e-3) < err(mean_cores(ex.down_proj, groups, use)[c].double().T)
    assert torch.equal(got[2], ex.down_proj[5])
    assert torch.equal(merge_outputs(ex, g, groups, use, x[:0], sort_pairs(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2), 6)), mean_cores(ex.down_proj, groups, use).index_copy(0, torch.tensor([2]), ex.down_proj[[5]]))

@few
@given(st.integers(2, 12), seeds, st.data())
def test_pairs(n, seed, data):
    m = data.draw(st.integers(0, n//2))
    d = some(1, (n, n), seed)[0].abs(); d = d+d.T
    g = nearest_pairs(d, m)
    size = g.bincount()
    assert set(g.tolist())==set(range(n-m)) and (size==2).sum()==m and size.max() <= 2
    if m: i, j = min(((d[i,j], i, j) for i in range(n) for j in range(i)))[1:]; assert g[i]==g[j]

@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), seeds, st.data())
def test_by_halves_every_step_looks_anew(n, seed, data):
    e, sizes = data.draw(st.integers(1, n)), []
    def look(g, d, groups):
        assert len(g)==len(d)==int(groups.max())+1 and len(groups)==n
        sizes.append(len(d))
        return torch.cdist(d.flatten(1), d.flatten(1)), torch.ones(len(d))
    g, d, groups = merge_by_halves(some(n, (6, 4), seed), some(n, (4, 3), seed+1), e, look)
    assert len(g)==len(d)==e and set(groups.tolist())==set(range(e))
    assert sizes==[s for s in [n, *[-(-n//2**k) for k in range(1, 9)]] if s>e][:len(sizes)] and (n==e or sizes)
    with pytest.raises(ValueError, match=f'{n+1} cores for {n} experts'): merge_by_halves(some(n, (6, 4)), some(n, (4, 3)), n+1, look)

# what is refused, and numbers at the edge

@pytest.mark.parametrize('scale', [1e-30, 1e30])
@pytest.mark.parametrize('how', MERGES)
def test_tiny_and_huge_members_merge_alike(how, scale):
    w = some(2)
    close(merge(w*scale, how)/scale, merge(w, how), 1e-4)

def test_layers_that_do_not_fit_are_refused():
    up, down, groups = some(6, (8, 5)), some(6, (5, 4)), torch.arange(6)%3
    bad = up.clone(); bad[4,0,0] = torch.nan
    for message,args in {'gate_up of 5 experts': (up[:5], down, groups), r'groups \[-1, 0, 1': (up, down, groups-1), 'core 1: one of the experts \\[1, 4\\] holds NaN': (bad, down, groups)}.items():
        with pytest.raises(BadInput, match=message): merge_experts(*args)
    with pytest.raises(BadInput, match='expected a core'): merge_experts(up[:0], down[:0], groups[:0])
    with pytest.raises(BadInput, match='base holds NaN'): merge(up, 'sce', base=bad[4])
    for base in 6, -1, 1.5, 'first':
        with pytest.raises(BadInput, match=f'base is member {base}'): merge(up, 'ties', base=base)
    p = sort_pairs(torch.tensor([[0,1],[1,2],[4,5]]), torch.rand(3, 2), 6)
    for n in 0, 4:
        with pytest.raises(BadInput, match=f'6 pairs are not k for each of {n} tokens'): route_cores(p, groups, n)
