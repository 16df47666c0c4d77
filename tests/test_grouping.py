"Every grouping is a partition into the cores asked for, the same each time, whatever N, E, dead experts and outliers are."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import pdist
from moe_fuse.grouping import *
from moe_fuse.headers import *

def coactivation_of(n, seed, dead=0):
    r = np.random.default_rng(seed)
    c = torch.from_numpy(r.integers(0, 50, (n, n))); c = c + c.T
    c[n-dead:] = 0; c[:,n-dead:] = 0
    return c

def all_groupings(n, e, seed=0, dead=0, protect=()):
    c = coactivation_of(n, seed, dead)
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, 5)))
    cos = torch.nn.functional.cosine_similarity(x[:,None], x[None], dim=2)
    return dict(act=group_by_coactivation(c, e, seed, protect), state=spectral_groups((1+cos).clamp(min=0), e, seed, protect), outputs=linkage_groups(torch.cdist(x, x), e, protect),
                router=dominant_groups(router_similarity(x), c.diagonal(), e, protect), balanced=balanced_groups(cos, e, protect), random=random_groups(n, e, seed, protect))

@settings(max_examples=60, deadline=None)
@given(st.integers(1,20), st.data())
def test_a_partition_into_the_cores_asked_for(n, data):
    e, seed, dead = data.draw(st.integers(1, n)), data.draw(st.integers(0, 99)), data.draw(st.integers(0, n))
    protect = data.draw(st.sets(st.integers(0, n-1), max_size=min(e-1, 3)))
    first, again = (all_groupings(n, e, seed, dead, protect) for _ in range(2))
    for k,g in first.items():
        assert g.dtype==torch.int64 and g.shape==(n,) and set(g.tolist())==set(range(e)), (k, g)
        assert torch.equal(g, again[k]), k
        for i in protect: assert (g==g[i]).sum()==1, (k, i)
    for k in 'balanced', 'random':
        sizes = first[k][[i for i in range(n) if i not in protect]].bincount()
        sizes = sizes[sizes>0]
        assert sizes.max()-sizes.min()<=1, (k, sizes)

@settings(max_examples=30, deadline=None)
@given(st.integers(3,25), st.integers(0,99), st.data())
def test_average_linkage_is_scipys(n, seed, data):
    x, e = np.random.default_rng(seed).normal(size=(n, 6)), data.draw(st.integers(2, n-1))
    want = fcluster(linkage(pdist(x), 'average'), e, 'maxclust')
    got = linkage_groups(torch.cdist(torch.from_numpy(x), torch.from_numpy(x)), e).numpy()
    assert len(set(zip(got, want)))==e                                         # the same sets under other names

def test_blocks_are_found():
    truth = torch.arange(12)%3
    c = torch.where(truth[:,None]==truth, 100, 1)
    for g in group_by_coactivation(c, 3), spectral_groups(c.double(), 3), linkage_groups(1/c, 3), dominant_groups(c.double(), torch.tensor([9,8,7]+[1]*9), 3), balanced_groups(c.double(), 3):
        assert len(set(zip(g.tolist(), truth.tolist())))==3

def test_dominants_are_the_most_used():
    s = torch.tensor([[1,.9,.1,.2],[.9,1,.3,.4],[.1,.3,1,.8],[.2,.4,.8,1]])
    assert dominant_groups(s, torch.tensor([1,5,0,5]), 2).tolist()==[0,0,1,1]
    assert dominant_groups(s, torch.tensor([1,5,0,5]), 3, protect=[1]).tolist()==[0,2,1,1]

# neurons

@settings(max_examples=20, deadline=None)
@given(st.integers(1,12), st.integers(0,99))
def test_a_shuffled_expert_is_the_same_expert(i, seed):
    r = torch.Generator().manual_seed(seed)
    gate_up, down, perm = torch.randn(1, 2*i, 5, generator=r), torch.randn(1, 5, i, generator=r), torch.randperm(i, generator=r)
    other = torch.cat([gate_up[:,:i][:,perm], gate_up[:,i:][:,perm]], 1), down[:,:,perm]
    a, b = neuron_rows(gate_up, down)[0], neuron_rows(*other)[0]
    order, d = match_neurons(a, b)
    assert torch.equal(b[order], a) and d <= 1e-5*a.square().sum()             # |a|^2 + |b|^2 - 2ab in float32
    assert aligned_distance(*(torch.cat([v, w]) for v,w in zip((gate_up, down), other))).max() <= 1e-5*a.square().sum()

def test_aligned_distance_is_the_assignment_in_float64():
    torch.manual_seed(0)
    gate_up, down = torch.randn(4, 14, 6), torch.randn(4, 6, 7)
    d, rows = aligned_distance(gate_up, down), neuron_rows(gate_up, down).double()
    assert torch.equal(d, d.T) and (d.diagonal()==0).all()
    for a in range(4):
        for b in range(a):
            cost = (rows[a][:,None]-rows[b]).square().sum(2).numpy(); i, j = linear_sum_assignment(cost)
            assert abs(d[a,b]-cost[i,j].sum()) <= 1e-5*cost[i,j].sum() and d[a,b] <= (rows[a]-rows[b]).square().sum()

def test_outliers():
    assert outliers(torch.tensor([1.,2.,1.5,40.,1.2]))==[3]
    assert outliers(torch.ones(4))==[]

# what is refused

@pytest.mark.parametrize('e', [0, -1, 9])
def test_too_many_or_too_few_cores(e):
    with pytest.raises(BadInput, match=f'{e} cores for 8 experts'): group_by_coactivation(coactivation_of(8, 0), e)
    with pytest.raises(BadInput, match=f'{e} cores for 8 experts'): random_groups(8, e)

def test_bad_matrices_and_ids():
    c = coactivation_of(8, 0).double()
    with pytest.raises(BadInput, match=r'\[8, 7\]'): linkage_groups(c[:,:7], 2)
    with pytest.raises(BadInput, match='finite'): balanced_groups(c*float('nan'), 2)
    with pytest.raises(BadInput, match='-3 is negative'): spectral_groups(-3*torch.ones(4, 4), 2)
    with pytest.raises(BadInput, match=r'protected experts \[8\], there are 8'): linkage_groups(c, 3, protect=[8])
    with pytest.raises(BadInput, match='2 cores for 8 experts, 2 of them protected'): linkage_groups(c, 2, protect=[0,1])
    with pytest.raises(BadInput, match='usage of 7 experts, similarity of 8'): dominant_groups(c, torch.ones(7), 2)

def test_it_can_be_had_from_fusion_too():
    from moe_fuse import fusion
    assert fusion.group_by_coactivation is group_by_coactivation and 'group_by_coactivation' in fusion.__all__
