"Budgets are spent to the last neuron, no plan is worse than it must be, and the command says what it found."
import itertools, json
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from moe_fuse.awq_loading import *
from moe_fuse.budgets import *
from moe_fuse.calibration import *
from moe_fuse.cli import main
from moe_fuse.headers import *
from moe_fuse.neuron_choice import *
from moe_fuse.pipeline import compress
from tiny_models import *

@given(st.integers(1, 4), st.integers(1, 4), st.data())
@settings(max_examples=60, deadline=None)
def test_spend_is_the_best_of_all_ways(layers, units, data):
    cost = np.array(data.draw(st.lists(st.lists(st.floats(0, 9), min_size=units, max_size=units), min_size=layers, max_size=layers)))
    budget = data.draw(st.integers(layers, layers*units+2))
    total = lambda ks: sum(c[k-1] for c,k in zip(cost, ks))
    got = spend(cost, budget)
    assert len(got)==layers and sum(got)<=budget and min(got)>=1
    assert abs(total(got)-min(total(ks) for ks in itertools.product(range(1, units+1), repeat=layers) if sum(ks)<=budget)) < 1e-9

@given(st.integers(0, 99), st.integers(1, 3), st.integers(2, 6), st.integers(2, 8), st.data())
@settings(max_examples=60, deadline=None)
def test_pooling_keeps_the_most_that_can_be_kept(seed, layers, n, i, data):
    "Against a plain sort of everything that isn't reserved"
    g = torch.Generator().manual_seed(seed)
    us = [torch.rand(n, i, generator=g)*(torch.rand(n, 1, generator=g)>.2) for _ in range(layers)]
    price = [1., 3., .5][:layers]; fires = sum(int((u.sum(1)>0).sum()) for u in us)
    total = data.draw(st.integers(fires, layers*n*i))
    if not fires: return
    got = pool_widths(us, price, total)
    assert sum(map(sum, got))==total and all(len(w)==n and 0<=min(w)<=max(w)<=i for w in got)
    assert all(w>=1 for u,ws in zip(us, got) for row,w in zip(u, ws) if row.sum()>0)
    rows = [(u*p).sort(dim=1, descending=True).values for u,p in zip(us, price)]
    best = sum(r[:,0].sum().item() for r in rows) + sum(sorted((v for r in rows for v in r[:,1:].flatten().tolist()), reverse=True)[:total-fires])
    kept = sum((r*(torch.arange(i)<torch.tensor(w)[:,None])).sum().item() for r,w in zip(rows, got))
    assert abs(kept-best) <= 1e-4*max(best, 1)

def test_a_layer_that_costs_nothing_to_cut_keeps_its_best_neurons():
    "Measured on few tokens, a KL of nothing can come out below zero"
    u = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    seen = {i: dict(usefulness=u, stream=1., kl={1: k, 2: k/2, 4: k/4}) for i,k in ((1, .5), (2, -1e-8))}
    for keep in .25, .5:
        plan = make_plans(seen, keep)['model']
        assert min(plan[2])>=1 and sum(plan[1])>=sum(plan[2])

def test_losses_that_are_no_numbers_are_refused():
    with pytest.raises(BadInput, match='1 of 6 losses are NaN'): spend(np.array([[1., 2, np.nan], [1, 2, 3]]), 4)

@pytest.fixture(scope='module', params=['v2', 'v3'])
def teacher(request, tmp_path_factory): return write(tmp_path_factory.mktemp(request.param)/'t', *tiny(dict(v2=V2, v3=V3)[request.param], seed=2))

def sets(teacher, texts):
    ck = Checkpoint(teacher); tok = load_tokenizer(teacher)
    return ck, sample_tokens(read_docs(texts[0]), tok, 2048), sample_tokens(read_docs(texts[1], 'valid'), tok, 2048)

def test_a_plan_of_full_width_is_the_teacher_and_parts_of_a_plan_are_left_alone(teacher, texts):
    kl, seen = try_plans(*sets(teacher, texts), {'none': {}, 'full': {1: 32, 2: [32]*16}, 'last': {2: 8}, 'pair': {2: (.5, 0.)}, 'width': {2: 16}}, fit_tokens=1024)
    assert kl['none']==0 and kl['full']<1e-6 < kl['width'] < kl['last'] and abs(kl['pair']/kl['width']-1)<1e-3
    assert list(seen)==[1, 2] and all(s['usefulness'].shape==(16, 32) and s['stream']>0 for s in seen.values())

def test_the_plans_of_a_teacher_spend_the_same(teacher, texts):
    kl, seen = probe_layers(*sets(teacher, texts), dict(uniform={1: 8, 2: 8}), fit_tokens=1024)
    plans = make_plans(seen, .25)
    for p in plans.values(): assert sum(sum(w) if isinstance(w, list) else 16*w for w in p.values())==2*16*8
    assert predict_plans(seen, plans, kl['uniform'])['uniform']==pytest.approx(kl['uniform'])
    for l in seen:
        losses = [layer_loss(seen[l], w) for w in range(1, 33)]
        assert losses[-1]==0 and losses[0]==seen[l]['kl'][1] and losses[7]==pytest.approx(seen[l]['kl'][8])
    assert sum(dropped(seen[l]['usefulness'], w) for l,w in plans['experts'].items()) <= sum(dropped(seen[l]['usefulness'], 8) for l in seen)

def test_command(teacher, texts, tmp_path, capfd):
    "What it recommends can be made"
    argv = ['analyse', str(teacher), str(tmp_path/'o'), '--calibration', texts[0], '--eval', texts[1], '--tokens', '2048', '--keeps', '0.5', '--device', 'cpu', '--budget', '0.5']
    assert main(argv)==0
    out, b = capfd.readouterr()[0], json.loads((tmp_path/'o'/'analysis.json').read_text())['budget']
    assert f"best plan: {b['best']}" in out and b['plans'].keys()=={'uniform', 'layers', 'experts', 'model'} and b['stock']['0.0']==dict(width=16, always_on=0, tried=b['stock']['0.0']['tried'])
    run = compress(teacher, tmp_path/'s', b['plans'][b['best']]['widths'], calibration=texts[0], eval_data=texts[1], tokens=2048, eval_tokens=2048, baselines=(), quiet=True)
    assert run.report['recipe']['keep']==.5

@pytest.mark.parametrize('budget', ['0', '1.5', '-1'])
def test_a_budget_that_can_not_be_is_refused_before_anything_is_read(budget, teacher, tmp_path, capfd):
    assert main(['analyse', str(teacher), str(tmp_path/'o'), '--budget', budget])==2
    assert f'budget is {float(budget)}' in capfd.readouterr()[1] and not list(tmp_path.iterdir())

def test_other_families_are_refused(tiny_teacher, tmp_path):
    (tmp_path/'q').mkdir(); c = json.loads((tiny_teacher/'config.json').read_text()) | dict(model_type='qwen2_moe', num_experts=16)
    for f in tiny_teacher.iterdir(): (tmp_path/'q'/f.name).write_bytes(f.read_bytes())
    (tmp_path/'q'/'config.json').write_text(json.dumps(c))
    with pytest.raises(BadInput, match="'qwen2_moe' can't be budgeted yet"): budgets(tmp_path/'q')
