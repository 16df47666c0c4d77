"Selection against brute force and plain least squares; the iterative solve against the direct one; what is refused."
import pytest, torch
from moe_fuse.awq_loading import *
from moe_fuse.calibration import *
from moe_fuse.expert_analysis import *
from moe_fuse.fusion import *
from moe_fuse.headers import *
from moe_fuse.neuron_choice import *
from tiny_models import *

@pytest.fixture(scope='module')
def block(tmp_path_factory):
    "A routed block of 16 experts of 32 neurons, and 600 inputs"
    ck = Checkpoint(write(tmp_path_factory.mktemp('v3'), *tiny(V3, seed=3)))
    return load_module(ck, empty_model(ck).model.layers[1], 'model.layers.1').mlp, torch.randn(600, 48, generator=torch.Generator().manual_seed(0))

def close(a, b, tol=1e-5): assert (a-b).abs().max() <= tol*b.abs().max(), f'{(a-b).abs().max()/b.abs().max():.2g}'

def grams_of(moe, x):
    p = route(moe, x)
    return feature_grams(expert_hidden(moe.experts, x, p), p)

def left(gram, down, idx):
    "What the best map from some neurons leaves of an expert's output"
    s = gram[idx][:,idx]
    return torch.trace(down@(gram - gram[:,idx]@torch.linalg.pinv(s, hermitian=True)@gram[idx])@down.T)

def random_problem(seed, n=3, i=7, h=5, t=60):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, t, 4, generator=g, dtype=torch.float64)@torch.randn(n, 4, i, generator=g, dtype=torch.float64) + .3*torch.randn(n, t, i, generator=g, dtype=torch.float64)
    return z.mT@z, torch.randn(n, h, i, generator=g, dtype=torch.float64)

# selection

@pytest.mark.parametrize('ridge', [0, .1])
@pytest.mark.parametrize('seed', range(3))
def test_gains_are_what_least_squares_gains(seed, ridge):
    "Each step takes the best single addition, and its gain is what ridge regression explains more"
    gram, down = random_problem(seed)
    def explained(e, idx):
        c = down[e]@gram[e][:,idx]
        return torch.trace(c@torch.linalg.solve(gram[e][idx][:,idx] + ridge*gram[e].diagonal().mean()*torch.eye(len(idx), dtype=torch.float64), c.T))
    order, gain = greedy_subset(gram, down, 7, ridge)
    for e in range(3):
        had = 0.
        for k in range(7):
            ids = order[e].tolist(); now = explained(e, ids[:k+1])
            assert abs(now-had-gain[e,k]) <= 1e-8*gain[e].max()
            assert all(explained(e, ids[:k]+[j]) <= now + 1e-8*gain[e].max() for j in range(7) if j not in ids[:k])
            had = now

@pytest.mark.parametrize('seed', range(3))
def test_each_neuron_dropped_is_the_one_least_missed(seed):
    gram, down = random_problem(seed)
    had = torch.arange(7).repeat(3, 1)
    for r in range(6, 0, -1):
        got = backward_subset(gram, down, r, 1e-10)
        for e in range(3):
            assert set(got[e].tolist()) < set(had[e].tolist())
            each = [left(gram[e], down[e], had[e][had[e]!=j]) for j in had[e]]
            assert left(gram[e], down[e], got[e]) <= min(each)*(1+1e-6)
        had = got

def test_a_copy_is_the_first_to_go():
    "Two neurons that fire alike: both ways keep one of them, energy keeps both"
    gram, down = random_problem(0, n=1)
    i = [0, 1, 2, 3, 4, 5, 6, 0]
    twin, d = gram[:,i][:,:,i], down[:,:,i]*torch.tensor([9.,1,1,1,1,1,1,9])
    for got in greedy_subset(twin, d, 3, ridge=1e-3)[0], backward_subset(twin, d, 3): assert len({0,7} & set(got[0].tolist()))==1
    assert {0,7} <= set(choose_neurons(twin.diagonal(dim1=1, dim2=2)*d.square().sum(1), 3)[0].tolist())

def test_neurons_that_never_fire_are_picked_last_and_break_nothing():
    gram, down = random_problem(1)
    gram[:,2] = 0; gram[:,:,2] = 0; gram[2] = 0                                # one neuron of each expert, and all of one expert
    order, gain = greedy_subset(gram, down, 7)
    assert (order[:2,-1]==2).all() and gain.isfinite().all() and (gain[2]==0).all() and sorted(order[2].tolist())==list(range(7))
    assert backward_subset(gram, down, 6).shape==(3, 6) and not (backward_subset(gram, down, 6)[:2]==2).any()

def test_budgets_are_shared_and_spent():
    u = torch.rand(5, 8, generator=torch.Generator().manual_seed(0)); u[3] = 0
    widths, = pool_widths([u], [1.], 17, least=0); got = choose_uneven(u, widths)
    assert sum(map(len, got))==17 and len(got[3])==0
    assert min(u[e,j] for e in range(5) for j in got[e]) >= max(u[e,j] for e in range(5) for j in range(8) if j not in got[e])
    assert pool_widths([u], [1.], 40, least=0)==[[8]*5]

def test_padding_is_worth_nothing(block):
    "Unequal widths: the padded experts are those of the chosen neurons alone"
    moe, x = block
    u = torch.rand(16, 32, generator=torch.Generator().manual_seed(1)); idx = choose_uneven(u, pool_widths([u], [1.], 200, least=0)[0])
    gate_up, down = take_padded(moe.experts, idx)
    for e,j in enumerate(idx):
        f = lambda gu, d: (lambda z: (torch.nn.functional.silu(z[:,:len(z.T)//2])*z[:,len(z.T)//2:])@d.T)(x@gu.T)
        close(f(gate_up[e], down[e]), f(moe.experts.gate_up_proj[e][torch.cat([j, j+32])], moe.experts.down_proj[e][:,j]))

def test_taylor_is_the_gradient_with_respect_to_a_mask(block):
    moe, x = block
    p = route(moe, x[:40]); h = expert_hidden(moe.experts, x[:40], p)
    mask = torch.ones_like(h, requires_grad=True)                              # one factor a pair and neuron
    target = torch.randn(40, 48, generator=torch.Generator().manual_seed(4))
    y = combine(torch.cat([hi@d.T for hi,d in zip((h*mask).split(p.counts), moe.experts.down_proj)]), p, 40); y.retain_grad()
    (y*target).sin().sum().backward()
    close(taylor_usefulness(h, p, moe.experts.down_proj, y.grad), sum_by_expert(mask.grad.square(), p))

def test_neurons_that_fire_alike_merge_into_one(block):
    "Every neuron twice, with its output split between the two: half the width is the same expert"
    moe, x = block
    i = torch.arange(32)//2*2                                                  # neurons 0 0 2 2 4 4 ...
    class Twice: pass
    e = Twice(); e.gate_up_proj = moe.experts.gate_up_proj[:,torch.cat([i, i+32])]; e.down_proj = moe.experts.down_proj[:,:,i]*(torch.arange(32)%2*2+1); e.act_fn = moe.experts.act_fn
    p = route(moe, x); h = expert_hidden(e, x, p); gram = feature_grams(h, p)
    gate_up, down = merge_neurons(e, gram, torch.rand(16, 32) + torch.arange(32)%2, 16)   # of each two the odd one stays
    used = [n for n in range(16) if p.counts[n]]
    f = lambda gu, d: (lambda z: (torch.nn.functional.silu(z[:,:len(z.T)//2])*z[:,len(z.T)//2:])@d.T)(x@gu.T)
    for n in used: close(f(gate_up[n], down[n]), f(e.gate_up_proj[n], e.down_proj[n]), 1e-4)

def test_merging_leaves_experts_that_never_fired_as_they_are(block):
    moe, x = block
    gram = grams_of(moe, x); gram[3] = 0
    u = gram.diagonal(dim1=1, dim2=2)*moe.experts.down_proj.square().sum(1)
    gate_up, down = merge_neurons(moe.experts, gram, u, 8)
    want_gate_up, want_down = take_neurons(moe.experts, choose_neurons(u, 8))
    assert torch.equal(gate_up[3], want_gate_up[3]) and torch.equal(down[3], want_down[3])
    close(merge_neurons(moe.experts, gram, u, 32)[1], moe.experts.down_proj)   # nothing to merge

def test_a_core_of_all_neurons_of_one_expert_is_that_expert(block):
    moe, _ = block
    gate_up, down = core_neurons(moe.experts, torch.arange(16), torch.rand(16, 32), 32)
    for e in range(16): assert torch.equal(gate_up[e].sort(0).values, moe.experts.gate_up_proj[e].sort(0).values) and torch.equal(down[e].sort(1).values, moe.experts.down_proj[e].sort(1).values)

# the solve without a normal matrix

def sums(block, tokens=600, **kw):
    moe, x = block
    y = torch.randn(600, 48, generator=torch.Generator().manual_seed(5))
    fit = JointRidge(moe.experts.down_proj[:,:,:6].contiguous(), moe.shared_experts.down_proj.weight, **kw)
    for xb,yb in zip(x[:tokens].split([1, 120, tokens-121]), y[:tokens].split([1, 120, tokens-121])):
        p = route(moe, xb)
        fit.add(expert_hidden(moe.experts, xb, p)[:,:6], p, shared_hidden(moe, xb), yb)
    return fit

@pytest.mark.parametrize('budget', [None, 300_000])
def test_iterations_find_the_direct_solution(block, budget):
    "With room for all columns at once, and for a few; the residual that is reported is the one against the matrix"
    direct = sums(block)
    A = direct.gram.triu() + direct.gram.triu(1).T; A.diagonal().add_(2*A.trace()/direct.tokens); b = direct.rhs.clone()
    fit, (want, shared) = sums(block, direct=False, budget=budget), direct.solve()
    if budget: assert (budget-fit.used)//(4*(6*len(fit.d0)+2*600)) < 48, 'all columns fit: nothing is tested'
    d0 = fit.d0
    got, got_shared = fit.solve()
    close(got, want, 1e-4); close(got_shared, shared, 1e-4)
    x = torch.cat([got.transpose(1,2).reshape(96, 48), got_shared.T]).double() - d0.double()
    true = ((A@x-b).norm()/b.norm()).item()
    assert fit.residual <= 1.2e-5 and abs(true-fit.residual) <= 5e-6, (true, fit.residual)
    assert 3 <= fit.iterations <= 60

def test_the_solver_is_chosen_by_what_fits(block):
    f = 96+block[0].shared_experts.down_proj.in_features; need = f*(f+48)*8
    assert sums(block, budget=need).direct and not sums(block, tokens=130, budget=need-1).direct

def test_an_expert_that_never_fired_keeps_its_weights(block):
    moe, x = block
    fit = JointRidge(moe.experts.down_proj, moe.shared_experts.down_proj.weight, direct=False)
    _, w, ids = moe.gate(x)
    for row in ids: row[row==7] = next(e for e in range(16) if e!=7 and e not in row)
    p = sort_pairs(ids, w, 16)
    fit.add(expert_hidden(moe.experts, x, p), p, shared_hidden(moe, x), torch.randn(600, 48))
    assert torch.equal(fit.solve()[0][7], moe.experts.down_proj[7])

# what is refused

@pytest.mark.parametrize('direct', [True, False])
def test_nan_in_the_states_is_refused(block, direct):
    moe, x = block[0], block[1].clone()
    fit, p = JointRidge(moe.experts.down_proj, moe.shared_experts.down_proj.weight, direct=direct), route(moe, x)
    h = expert_hidden(moe.experts, x, p); h[5,3] = torch.nan
    fit.add(h, p, shared_hidden(moe, x), torch.randn(600, 48))
    with pytest.raises(BadInput, match='NaN'): fit.solve()
    gram = feature_grams(h, p)
    for f in greedy_subset, backward_subset:
        with pytest.raises(BadInput, match='1 of 16 Gram matrices hold NaN'): f(gram, moe.experts.down_proj, 4)
    with pytest.raises(BadInput, match='gradients'): taylor_usefulness(h, p, moe.experts.down_proj, x.fill_(torch.inf))

def test_widths_that_cannot_be_are_refused(block):
    moe, x = block; gram = grams_of(moe, x)
    for r in 0, 33:
        for f in greedy_subset, backward_subset:
            with pytest.raises(BadInput, match=f'width is {r}'): f(gram, moe.experts.down_proj, r)
        with pytest.raises(BadInput, match=f'width is {r}'): choose_neurons(torch.rand(16, 32), r)
    with pytest.raises(BadInput, match='Gram matrices'): greedy_subset(gram[:4], moe.experts.down_proj, 4)
    for n in 0, 513:
        with pytest.raises(BadInput, match=f'{n} neurons'): pool_widths([torch.rand(16, 32)], [1.], n, least=0)
    for r in 0, 65:
        with pytest.raises(BadInput, match=f'core 0 of width {r}: its 2 experts have 64 neurons'): core_neurons(moe.experts, torch.arange(16)//2, torch.rand(16, 32), r)

def test_what_makes_no_choice_is_refused(block):
    moe, x = block; gram, u = grams_of(moe, x), torch.rand(16, 32)
    for f in greedy_subset, backward_subset:
        with pytest.raises(BadInput, match='ridge is -1'): f(gram, moe.experts.down_proj, 4, ridge=-1)
        with pytest.raises(BadInput, match='down projections hold NaN'): f(gram, moe.experts.down_proj*torch.nan, 4)
        f(gram.float(), moe.experts.down_proj, 4)
    dead = gram.clone(); dead[0] = 0; dead[0,0,0] = 1
    with pytest.raises(BadInput, match='ridge is 0, too small'): backward_subset(dead, moe.experts.down_proj, 4, ridge=0)
    for price in 0., -1., torch.nan:
        with pytest.raises(BadInput, match='must be positive'): pool_widths([u, u], [1., price], 100)
    bad = u.clone(); bad[3,2] = torch.nan
    for f in (lambda: choose_neurons(bad, 4), lambda: choose_uneven(bad, [4]*len(u))):
        with pytest.raises(BadInput, match=f'usefulness is NaN in 1 of {len(u)} experts, first in 3'): f()
    with pytest.raises(BadInput, match=f'saliency is NaN in 1 of {len(u)} experts, first in 3'): prune_experts(bad[:,2], len(u)//2, 1)
    with pytest.raises(BadInput, match='usefulness holds NaN'): pool_widths([u*torch.nan], [1.], 100)

def test_budgets_too_small_are_refused(block):
    for budget,why in (1000, 'one block an expert'), (130_000, 'features of'), (220_000, 'one column'):
        with pytest.raises(BadInput, match=f'{budget:,} bytes is too small.*{why}'): sums(block, budget=budget, direct=False).solve()
    with pytest.raises(BadInput, match='the direct solve takes'): sums(block, budget=1000, direct=True)

def test_what_was_dropped_adds_up():
    "The score of a neuron is the rise of what least squares leaves, as the kept ones shrink; all of them are the whole output"
    gram, down = random_problem(3)
    u = backward_usefulness(gram, down, 1e-10)
    for e in range(3):
        order, was = u[e].argsort(), 0.
        for k in range(1, 7):
            now = left(gram[e], down[e], order[k:].sort().values)
            assert abs(u[e,order[k-1]]-(now-was)) <= 1e-5*u[e].max() or u[e,order[k-1]] >= now-was, 'costs are made to rise'
            was = now
    low = backward_usefulness(gram*1e-3, down)
    assert torch.allclose(low, backward_usefulness(gram, down)*1e-3)
