"The layer against plain loops and against transformers' blocks, its limits on random routers, its gradients in float64, and what it refuses."
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, CONFIG_MAPPING
from moe_fuse.deepseek_moe import *
from moe_fuse.expert_analysis import *
from moe_fuse.headers import *
from tiny_models import *

SMALL = dict(d_model=16, d_expert=8, n_shared=1, n_routed=8, top_k=2)

def layer(seed=0, **kw):
    torch.manual_seed(seed)
    return DeepSeekMoE(**SMALL | kw)

def tokens(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

sizes = st.fixed_dictionaries(dict(d=st.integers(1, 5), per=st.integers(1, 5), seed=st.integers(0, 99), t=st.integers(1, 40), b=st.integers(1, 4))) # D, N/D, tokens, sequences

def draw_sizes(v, data):
    "A router's k and M that fit"
    m = data.draw(st.integers(1, v['d'])); k = data.draw(st.integers(1, m*v['per']))
    return v['d']*v['per'], v['d'], m, k

# routing

@settings(max_examples=60, deadline=None)
@given(sizes, st.data(), st.sampled_from(['softmax', 'sigmoid']))
def test_a_token_touches_at_most_m_devices_and_those_are_the_best(v, data, score):
    n, d, m, k = draw_sizes(v, data)
    best = data.draw(st.integers(1, v['per']))
    torch.manual_seed(v['seed'])
    r = CentroidRouter(16, n, k, score, d, m, best)
    if score=='sigmoid': r.e_score_correction_bias.uniform_(-1, 1)
    logits, g, idx = r(tokens(v['t'], 16, seed=v['seed']))
    assert devices_of(idx, n, d).sum(1).max()<=m
    s = logits.softmax(1) if score=='softmax' else logits.sigmoid()
    c = s if score=='softmax' else s + r.e_score_correction_bias
    for t in range(v['t']):
        value = [sum(sorted(c[t,i*v['per']:(i+1)*v['per']].tolist())[-best:]) for i in range(d)]
        allowed = sorted(range(d), key=lambda i: -value[i])[:m]
        want = sorted((i for i in range(n) if i//v['per'] in allowed), key=lambda i: -c[t,i].item())[:k]
        assert sorted(want)==sorted(idx[t].tolist())
        assert torch.equal(g[t], s[t,idx[t]])

def test_affinities_are_float32_in_a_bfloat16_layer():
    m = layer().bfloat16()
    y, _ = m(tokens(2, 5, 16).bfloat16())
    assert y.dtype==torch.bfloat16 and m.gate(tokens(5, 16).bfloat16())[0].dtype==torch.float32

def test_the_bias_stays_in_float32():
    m = layer(score='sigmoid')
    m.gate.e_score_correction_bias += torch.rand(8)
    b = m.gate.e_score_correction_bias.clone()
    for cast in (m.bfloat16(), m.half(), m.float()): assert torch.equal(cast.gate.e_score_correction_bias, b)
    assert m.double().gate.e_score_correction_bias.dtype==torch.float64
    assert m.to('meta').gate.e_score_correction_bias.is_meta and m.gate.weight.is_meta

# losses

def loops(s, idx, d, m): # one sequence, the reports' formulas with plain loops
    (t, n), k = s.shape, idx.shape[1]
    f = [n/(k*t)*sum(i in row for row in idx.tolist()) for i in range(n)]
    P = [sum((s[j,i]/s[j].sum()).item() for j in range(t))/t for i in range(n)]
    blocks = [range(e*n//d, (e+1)*n//d) for e in range(d)]
    sent = [d/(m*t)*sum(any(i in b for i in row) for row in idx.tolist()) for b in blocks]
    Pd = [sum(P[i] for i in b) for b in blocks]
    return dict(expert=sum(a*b for a,b in zip(f, P)), device=sum(sum(f[i] for i in b)/len(b)*p for b,p in zip(blocks, Pd)), communication=sum(a*b for a,b in zip(sent, Pd)))

@settings(max_examples=40, deadline=None)
@given(sizes, st.data())
def test_losses_are_those_of_loops(v, data):
    n, d, m, k = draw_sizes(v, data)
    s = tokens(v['b'], v['t'], n, seed=v['seed']).sigmoid()
    idx = s.topk(k).indices
    got, want = balance_sums(s, idx, d, m), [loops(a, b, d, m) for a,b in zip(s, idx)]
    for name in got: assert abs(got[name].item() - sum(w[name] for w in want)/len(want))<1e-4

def even(score='softmax'):
    "A router and inputs with a perfectly even load"
    ring = torch.eye(4) + torch.eye(4).roll(1, 0)
    m = DeepSeekMoE(16, 8, 1, 16, 4, score=score, n_devices=4, max_devices=2, alpha1=.3, alpha2=.5, alpha3=.7, alpha_seq=.9)
    m.gate.weight.data = 3*torch.kron(ring, ring)
    return m, torch.eye(16).expand(3, 16, 16)

@pytest.mark.parametrize('score', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('over', ['sequence', 'batch'])
def test_each_loss_is_its_alpha_at_perfect_balance(score, over):
    m, x = even(score)
    m.over = over
    losses = m(x)[1]
    assert list(losses)==['expert', 'device', 'communication', 'sequence']
    for v,alpha in zip(losses.values(), (.3, .5, .7, .9)): assert abs(v.item()-alpha)<1e-6

def test_over_says_where_load_is_counted():
    "Sequences that each use other experts: uneven in each of them, even in the batch"
    m, x = even()
    x = x[:1].transpose(0, 1).contiguous()                                     # 16 sequences of one token
    m.over = 'batch'; batch = m(x)[1]
    m.over = 'sequence'; seq = m(x)[1]
    assert abs(batch['expert'].item()-.3)<1e-6 and seq['expert']>.3*1.5 and torch.equal(batch['sequence'], seq['sequence'])

def test_only_losses_with_an_alpha_are_returned():
    assert layer()(tokens(2, 5, 16))[1]=={} and list(layer(alpha2=.1)(tokens(2, 5, 16))[1])==['device'] and list(layer(alpha_seq=.1)(tokens(2, 5, 16))[1])==['sequence']

@pytest.mark.parametrize('name', ['alpha1', 'alpha2', 'alpha3', 'alpha_seq'])
def test_descent_on_a_loss_alone_evens_out_what_it_names(name):
    m = layer(n_routed=16, top_k=4, n_devices=4, max_devices=2, **{name: 1.})
    x = tokens(4, 64, 16) + 1.5*tokens(16, seed=1)                                 # a common direction: uneven from the start
    def uneven():
        idx = m.gate(x.flatten(0, 1))[2]
        f = expert_load(idx, 16)
        return {'alpha1': f, 'alpha_seq': f, 'alpha2': f.view(4, 4).mean(1), 'alpha3': devices_of(idx, 16, 4).float().mean(0)*2}[name].max().item()
    before, opt = uneven(), torch.optim.Adam(m.gate.parameters(), lr=.02)
    for _ in range(100): opt.zero_grad(); sum(m(x)[1].values()).backward(); opt.step()
    assert before>1.5 and uneven()-1<(before-1)/2

# bias

def test_bias_step():
    b = bias_step(torch.tensor([0., 0., 1., 0.]), torch.tensor([9, 1, 5, 5]), .1)
    assert torch.allclose(b, torch.tensor([-.1, .1, 1., 0.]))

def test_update_bias_uses_the_load_of_training_alone_and_counts_anew():
    m = layer(score='sigmoid')
    x = tokens(2, 30, 16)
    m.eval()(x)
    assert m.load.sum()==0
    m.train()(x); m(x)
    want = 2*m.gate(x.flatten(0, 1))[2].flatten().bincount(minlength=8)
    assert torch.equal(m.load, want)
    m.update_bias(.25)
    assert m.load.sum()==0 and torch.equal(m.gate.e_score_correction_bias, .25*torch.sign(want.float().mean()-want))
    assert 'load' not in m.state_dict()
    with pytest.raises(BadInput, match='gamma is -1'): m.update_bias(-1)

def test_the_bias_gets_no_gradient_and_is_not_in_the_gate_value():
    m = layer(score='sigmoid')
    x = tokens(30, 16)
    a = m.gate(x)[1]
    m.gate.e_score_correction_bias += 7.
    assert torch.equal(a, m.gate(x)[1]) and all('bias' not in k for k,_ in m.named_parameters())

# dropping

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 60), st.integers(0, 30), st.integers(0, 99), st.floats(0, .5))
def test_dropping_keeps_the_best_within_the_budget(d, p, budget, seed, share):
    g = torch.Generator().manual_seed(seed)
    a, dev, exempt = torch.rand(p, generator=g), torch.randint(d, (p,), generator=g), torch.rand(p, generator=g)<share
    kept = within_budget(a, dev, d, budget, exempt)
    for i in range(d):
        mine, safe = (dev==i).nonzero()[:,0].tolist(), (exempt & (dev==i)).sum().item()
        rest = sorted((j for j in mine if not exempt[j]), key=lambda j: -a[j])
        want = {j for j in mine if exempt[j]} | set(rest[:max(0, budget-safe)])
        assert {j for j in mine if kept[j]}==want and len(want)<=max(budget, safe)

@pytest.mark.parametrize('capacity', [.5, 1., 1.3, 100.])
def test_the_layer_drops_what_is_over_budget(capacity):
    m = layer(n_routed=8, top_k=3, n_devices=4, max_devices=3, capacity=capacity, never_dropped=0.)
    x = tokens(4, 25, 16) + 1.5*tokens(16, seed=1)
    flat = x.flatten(0, 1)
    logits, g, idx = m.gate(flat)
    p = sort_pairs(idx, g, 8)
    s, device = logits.softmax(1)[p.token,p.expert], p.expert//2
    kept = within_budget(s, device, 4, int(capacity*300/4), torch.zeros(300, dtype=torch.bool))
    assert device[kept].bincount(minlength=4).max()<=capacity*75 and (kept.all()==(capacity==100))
    dropped = torch.zeros(100, 8).index_put_((p.token, p.expert), kept.float())
    want = experts_loop(m.experts, flat, idx, g*dropped.gather(1, idx)) + m.shared_experts(flat)
    assert torch.allclose(m(x)[0].flatten(0, 1), want, atol=1e-6)
    assert torch.allclose(m.eval()(x)[0].flatten(0, 1), experts_loop(m.experts, flat, idx, g) + m.shared_experts(flat), atol=1e-6)

def test_sequences_that_are_never_dropped():
    m = layer(n_devices=4, max_devices=2, capacity=.3)
    x = tokens(20, 9, 16)
    y, whole = m(x)[0], m.eval()(x)[0]
    same = (y-whole).abs().amax((1,2))<1e-6
    assert same[:2].all() and not same.all()                                      # a tenth of 20
    keep = torch.zeros(20, dtype=torch.bool); keep[[5,17]] = True
    assert ((m.train()(x, never_drop=keep)[0]-whole).abs().amax((1,2))<1e-6)[keep].all()
    for bad in torch.ones(3, dtype=torch.bool), torch.ones(20), [True]*20:
        with pytest.raises(BadInput, match=r'never_drop is (bool \[3\]|float32 \[20\]|a list), it must be bool \[20\]'): m(x, never_drop=bad)

def test_dropped_pairs_get_no_gradient():
    m = layer(n_devices=4, max_devices=2, capacity=1e-9, never_dropped=0.)
    y, _ = m(tokens(2, 9, 16))
    y.square().sum().backward()
    assert m.experts.down_proj.grad is None or not m.experts.down_proj.grad.any()
    assert m.shared_experts.down_proj.weight.grad.any()

# transformers

def stock_block(base, seed=0, **changes):
    config = base | dict(num_hidden_layers=2) | changes
    torch.manual_seed(seed)
    block = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config['model_type']].from_dict(config), dtype=torch.float32).model.layers[1].mlp
    for v in block.parameters(): nn.init.normal_(v, std=.15)
    if hasattr(block.gate, 'e_score_correction_bias'): block.gate.e_score_correction_bias.uniform_(0, .2)
    return block

STOCK = dict(v2=(V2, {}), v2_scaled=(V2, dict(routed_scaling_factor=16., n_shared_experts=1)), v2_groups=(V2, dict(topk_method='group_limited_greedy', n_group=4, topk_group=2)),
             v3=(V3, {}), v3_one_group=(V3, dict(n_group=1, topk_group=1)), v3_sum_kept=(V3, dict(norm_topk_prob=False)), v3_k6=(V3, dict(num_experts_per_tok=6)))

@pytest.mark.parametrize('name', STOCK)
def test_the_same_as_transformers(name):
    "Outputs and all gradients, to 1e-6 of the largest entry; in training mode, where losses are added up too"
    base, changes = STOCK[name]
    block = stock_block(base, **changes)
    ours, x, g = from_transformers(block, alpha1=.1), tokens(2, 100, 48), tokens(2, 100, 48, seed=1)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, want = ours(a)[0], block(b)
    (y*g).sum().backward(); (want*g).sum().backward()
    theirs = dict(block.named_parameters())
    assert {k for k,_ in ours.named_parameters()}==set(theirs) and set(ours.state_dict())==set(block.state_dict())
    for got,ref in [(y, want), (a.grad, b.grad)] + [(v.grad, theirs[k].grad) for k,v in ours.named_parameters()]: assert (got-ref).abs().max()<=1e-6*ref.abs().max()
    block.load_state_dict(ours.state_dict())                                     # and back

def test_moe_forward_of_the_library_takes_the_layer():
    m = layer().eval()
    with torch.no_grad(): assert torch.equal(moe_forward(m, tokens(20, 16)), m(tokens(20, 16))[0])

def test_other_blocks_are_refused():
    with pytest.raises(BadInput, match='block is .Linear.'): from_transformers(nn.Linear(2, 2))
    block = stock_block(V2); block.config.hidden_act = 'gelu'
    with pytest.raises(BadInput, match="hidden_act is 'gelu'"): from_transformers(block)

# gradients

@pytest.mark.parametrize('kw', [dict(alpha1=.1, alpha2=.2, alpha3=.3), dict(score='sigmoid', alpha_seq=.1), dict(mode='simple', alpha1=.1), dict(capacity=.7, never_dropped=0.)])
def test_gradients_in_float64(kw):
    m = layer(d_model=6, d_expert=4, n_routed=4, n_devices=2, max_devices=1, **kw).double()
    x, names, values = tokens(2, 4, 6).double().requires_grad_(), *zip(*m.named_parameters())
    def f(x, *ps):
        y, losses = torch.func.functional_call(m, dict(zip(names, ps)), (x,))
        return y, *losses.values()
    assert torch.autograd.gradcheck(f, (x, *values), atol=1e-7)

# the simple layer

def test_quick_start():
    torch.manual_seed(0)
    m = MixtureOfExperts(d_model=16, d_expert=8, K=2, N_s=1, N_r=8, alpha1=.1, alpha2=.2, alpha3=0., D=4, M=2)
    out, expert_loss, device_loss, commu_loss = m(tokens(2, 9, 16))
    assert out.shape==(2, 9, 16) and expert_loss>0 and device_loss>0 and commu_loss==0
    (out.sum()+expert_loss+device_loss+commu_loss).backward()
    assert all(v.grad is not None for v in m.parameters())
    assert torch.equal(m(tokens(9, 16))[0], MixtureOfExperts.forward(m, tokens(1, 9, 16))[0][0])
    for change,key in (dict(K=9), 'K is 9'), (dict(N_s=-1), 'N_s is -1'), (dict(N_r=0), 'N_r is 0'), (dict(D=3), 'D is 3.*divisor of N_r = 8'), (dict(M=5), 'M is 5'), (dict(K=5, M=2), 'M is 2.*from 3 to 4'):
        with pytest.raises(BadInput, match=key): MixtureOfExperts(**dict(d_model=16, d_expert=8, K=2, N_s=1, N_r=8, alpha1=0, alpha2=0, alpha3=0, D=4, M=2) | change)

def test_the_residual_is_inside():
    m = layer(mode='simple', n_shared=0)
    for v in m.experts.parameters(): v.data.zero_()
    assert torch.equal(m(tokens(2, 3, 16))[0], tokens(2, 3, 16))

# shapes and refusals

@pytest.mark.parametrize('kw', [{}, dict(n_shared=0), dict(top_k=8), dict(n_routed=1, top_k=1), dict(score='sigmoid', n_devices=4, max_devices=2), dict(mode='simple', n_shared=0)])
def test_shapes(kw):
    m = layer(**kw)
    for shape in (1, 16), (7, 16), (1, 1, 16), (3, 5, 16): assert m(tokens(*shape))[0].shape==shape
    y, _ = m(tokens(3, 5, 16).transpose(0, 1))                                    # not contiguous
    assert torch.allclose(y, m(tokens(3, 5, 16))[0].transpose(0, 1), atol=1e-6)

BAD = [(dict(d_model=0), 'd_model is 0, it must be a whole number of at least 1'), (dict(d_expert=2.), r'd_expert is 2\.0'), (dict(n_shared=-1), 'n_shared is -1, it must be a whole number of at least 0'),
       (dict(n_routed=True), 'n_routed is True'), (dict(n_routed='8'), "n_routed is '8'"), (dict(top_k=9), 'top_k is 9, it must be a whole number from 1 to 8'), (dict(top_k=0), 'top_k is 0'),
       (dict(n_devices=3), 'n_devices is 3, it must be a divisor of n_routed = 8'), (dict(n_devices=4, max_devices=5), 'max_devices is 5, it must be a whole number from 1 to 4'),
       (dict(n_devices=4, max_devices=1, top_k=3), 'max_devices is 1, it must be from 2 to 4'), (dict(n_best=9), 'n_best is 9, it must be a whole number from 1 to 8'),
       (dict(score='sigmoid', n_devices=4, max_devices=2, top_k=3), 'n_best is None, it must be given'), (dict(score='relu'), "score is 'relu', it must be 'softmax' or 'sigmoid'"),
       (dict(mode='v2'), "mode is 'v2', it must be 'swiglu' or 'simple'"), (dict(over='token'), "over is 'token', it must be 'sequence' or 'batch'"), (dict(normalize='no'), "normalize is 'no', it must be True or False"),
       (dict(alpha1=-.1), 'alpha1 is -0.1, it must be a finite number of at least 0'), (dict(alpha2=math.nan), 'alpha2 is nan'), (dict(alpha3=math.inf), 'alpha3 is inf'), (dict(alpha_seq=None), 'alpha_seq is None'),
       (dict(scale=0), 'scale is 0, it must be a positive'), (dict(capacity=0), 'capacity is 0, it must be None or a positive'), (dict(capacity='1'), "capacity is '1'"),
       (dict(never_dropped=1.1), 'never_dropped is 1.1, it must be a share from 0 to 1')]

@pytest.mark.parametrize('change,message', BAD, ids=[next(iter(c)) + str(i) for i,(c,_) in enumerate(BAD)])
def test_refused_by_name(change, message):
    with pytest.raises(BadInput, match=message): layer(**change)

@pytest.mark.parametrize('x', [torch.zeros(3, 15), torch.zeros(16), torch.zeros(1, 2, 3, 16), torch.zeros(0, 16), torch.zeros(2, 0, 16), torch.zeros(3, 16, dtype=torch.long)], ids=lambda x: f'{x.dtype} {list(x.shape)}')
def test_inputs_of_another_kind_are_refused(x):
    with pytest.raises(BadInput, match=r'x is .*it must be floating and \[B, T, 16\] or \[T, 16\]'): layer()(x)
