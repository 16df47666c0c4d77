"Layer-wise distillation: what is trained and what is not, when it stops, and merging by halves that goes on where it was killed."
import pytest, torch
from moe_fuse import healing
from moe_fuse.awq_loading import *
from moe_fuse.baselines import seed_recipe
from moe_fuse.expert_analysis import *
from moe_fuse.headers import *
from moe_fuse.healing import *
from moe_fuse.multiplex_lora import *
from safetensors.torch import load_file
from tiny_models import *

@pytest.fixture(scope='module')
def layer(tmp_path_factory):
    "A random block of 16 experts, its inputs and outputs, and its statistics"
    ck = Checkpoint(write(tmp_path_factory.mktemp('t'), *tiny(V3)))
    moe = load_module(ck, empty_model(ck).model.layers[1], 'model.layers.1').mlp
    x = torch.randn(512, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y, p, stats = moe_forward(moe, x), route(moe, x), ExpertStats(16, 32, 48, moments='layer'); h = expert_hidden(moe.experts, x, p)
        stats.update(moe.experts, h, grouped_linear(h, moe.experts.down_proj, p.counts), p, 4, x=x)
    return moe, x, y, stats

def changed(a, b): return {k for k in a if not torch.equal(a[k], b[k])}
def state(m): return {k: v.clone() for k,v in m.state_dict().items()}
CORES, CORRECTIONS = {'gate_up_proj', 'down_proj'}, {'multiplex', 'a_gate_up', 'b_gate', 'b_up', 'a_down', 'b_down'}

@pytest.mark.parametrize('preset,steps,trained', [('False_1', 4, CORRECTIONS), ('True_1', 4, CORRECTIONS|CORES), ('True_5', 20, CORRECTIONS|CORES)])
def test_presets(preset, steps, trained, layer):
    "So many epochs, and the router and the shared expert are nobody's; adapters are merged and the loss falls"
    moe, x, y, stats = layer
    b = seed_recipe(moe, stats, .5); before, first = state(b), block_loss(b, x, y)
    losses = distill_epochs(b, x, y, preset, batch=128)
    assert len(losses)==steps and changed(before, state(b))==trained and block_loss(b, x, y)<first
    assert not any('parametrizations' in k for k in b.state_dict()) and type(b) is FusedMoE and not any(p.requires_grad for p in b.parameters())
    c = seed_recipe(moe, stats, .5); random = torch.random.get_rng_state(); torch.manual_seed(5)
    assert distill_epochs(c, x, y, preset, batch=128)==losses and not changed(state(b), state(c))          # whatever else was drawn before
    torch.random.set_rng_state(random)

def test_an_epoch_sees_every_row_once(layer, monkeypatch):
    moe, x, y, stats = layer; seen = []
    monkeypatch.setattr(healing, 'distill', lambda moe, sample, steps, lr, rank: [seen.append(sample(s)[0]) for s in range(steps)])
    distill_epochs(seed_recipe(moe, stats, .5), x, y, 'True_5', batch=128)
    rows = [torch.cat(seen[4*e:4*e+4]) for e in range(5)]
    key = lambda r: sorted(r[:,0].tolist())
    assert all(key(r)==key(x) for r in rows) and not torch.equal(rows[0], rows[1])

def test_dora_of_stock_experts(layer):
    "A slim block has no corrections: the adapters alone are trained, and merged they compute what they computed"
    moe, x, y, stats = layer
    b = slim_moe(moe, stats.usefulness, .5); before = state(b)
    params = trained_parameters(b, 4); torch.manual_seed(0)
    for p in params: p.data += .05*torch.randn_like(p)
    want = block_forward(b, x)
    assert len(params)==6 and torch.allclose(block_forward(merge_parametrizations(b), x), want, atol=1e-6)
    assert changed(before, state(b))=={'experts.gate_up_proj', 'experts.down_proj'}

def test_last_learning_rate_is_the_recipes(layer, monkeypatch):
    moe, x, y, stats = layer; used, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, 'step', lambda self, *a, **kw: (used.append(self.param_groups[0]['lr']), step(self, *a, **kw))[1])
    distill(slim_moe(moe, stats.usefulness, .5), lambda s: (x[:64], y[:64]), 7, lr=2e-3)
    assert used==[lr_at(s, 7, 2e-3) for s in range(7)] and 0<used[-1]<1e-4

def test_it_stops_early_and_goes_back_to_the_best(layer, monkeypatch):
    "Eight rows are learned by heart; held-out ones say when that stops helping"
    moe, x, y, stats = layer; held, looks = (x[256:], y[256:]), []
    few, measure = lambda s: (x[:8], y[:8]), healing.block_loss
    def look(moe, x, y): l = measure(moe, x, y); looks.extend([l.item()] if len(x)==256 else []); return l
    monkeypatch.setattr(healing, 'block_loss', look)
    b = slim_moe(moe, stats.usefulness, .5)
    losses = distill(b, few, 400, lr=2e-2, held=held, patience=2, every=5)
    assert len(losses)==5*len(looks)<400 and looks[-2:]>[min(looks)]*2 and block_loss(b, *held).item()==min(looks)

def test_a_learning_rate_is_found(layer):
    "One that blows up is out, none at all is said; the block stays as it was"
    moe, x, y, stats = layer; b = slim_moe(moe, stats.usefulness, .5); before = state(b)
    few, held = lambda s: (x[:256], y[:256]), (x[256:], y[256:])
    best, found = find_lr(b, few, held, 10, (1e-5, 3e-4, 1e20))
    c = slim_moe(moe, stats.usefulness, .5); distill(c, few, 10, 3e-4)
    assert set(found)=={1e-5, 3e-4} and found[3e-4]==block_loss(c, *held).item() and best==min(found, key=found.get) and not changed(before, state(b))
    with pytest.raises(BadInput, match='diverges at every learning rate of 1e'): find_lr(b, few, held, 10, (1e20, 1e25))

# by halves

def test_all_cores_are_the_teacher(layer):
    moe, x, y, _ = layer
    assert torch.allclose(block_forward(merge_and_recover(moe, 16, x, y, 10), x), y, atol=1e-5)

@pytest.mark.parametrize('n,sizes', [(8, [8]), (4, [8, 4]), (6, [8, 6]), (1, [8, 4, 2, 1])])
def test_levels(n, sizes, layer, tmp_path):
    "Halved until there are E; recovery helps; files that stay say so"
    moe, x, y, _ = layer
    b, plain = merge_and_recover(moe, n, x, y, 12, tmp_path/'m', batch=128), merge_and_recover(moe, n, x, y, 0)
    assert [int(f.stem.split('-')[1]) for f in sorted((tmp_path/'m').glob('*.safetensors'), reverse=True)]==sizes
    assert b.mode=='cores' and len(b.down_proj)==n and b.groups.unique().tolist()==list(range(n)) and torch.equal(b.gate.weight, moe.gate.weight)
    assert block_loss(b, x, y)<block_loss(plain, x, y)

def test_killed_and_resumed(layer, tmp_path, monkeypatch):
    "In the second level, and while its file is written: the same bits; other settings are refused"
    moe, x, y, _ = layer; run = lambda folder=None, **kw: merge_and_recover(moe, 2, x, y, **(dict(steps=9, folder=folder, batch=128) | kw))
    want, count = state(run()), [0]
    class Killed(BaseException): pass
    for name,at in ('distill', 2), ('save_file', 2), ('save_file', 3):
        count[0], old, d = 0, getattr(healing, name), tmp_path/f'{name}-{at}'
        def f(*a, **kw):
            count[0] += 1
            if count[0]==at: raise Killed
            return old(*a, **kw)
        with monkeypatch.context() as m, pytest.raises(Killed): m.setattr(healing, name, f); run(d)
        assert len(list(d.glob('*.safetensors')))==at-1
        calls = [0]
        with monkeypatch.context() as m:
            m.setattr(healing, 'distill', lambda *a, **kw: (calls.__setitem__(0, calls[0]+1), healing_distill(*a, **kw))[1]); got = run(d)
        assert not changed(want, state(got)) and calls[0]==3-(at-1)
    with pytest.raises(BadInput, match='other settings: steps'): run(d, steps=10)
    with pytest.raises(BadInput, match='other settings: data'): merge_and_recover(moe, 2, x+1, y, 9, d, batch=128)
    assert set(load_file(d/'cores-000002.safetensors'))>={'groups', 'gate_up_proj', 'down_proj', 'shared_experts.down_proj.weight'}

healing_distill = distill

def test_steps_are_shared_out(layer, monkeypatch):
    moe, x, y, _ = layer; seen = []
    monkeypatch.setattr(healing, 'distill', lambda moe, sample, steps, lr: seen.append(steps))
    for n,steps,kw in (2, 100, {}), (2, 99, dict(last=1/3)), (8, 10, {}), (2, 1, {}): merge_and_recover(moe, n, x, y, steps, **kw); seen.append('|')
    assert seen==[10,10,80,'|', 33,33,33,'|', 10,'|', 0,0,1,'|'], seen

@pytest.mark.parametrize('n', [0, 17])
def test_sizes_that_cannot_be(n, layer):
    moe, x, y, _ = layer
    with pytest.raises(BadInput, match=f'{n} cores of 16'): merge_and_recover(moe, n, x, y, 1)
