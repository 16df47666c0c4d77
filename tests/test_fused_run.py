"A fused student is written as it was in memory, carries the code that loads it, and is there whole or not at all."
import json, shutil
import numpy as np, pytest, torch
from transformers import AutoModelForCausalLM
from moe_fuse import checkpoint, pipeline
from moe_fuse.fused_files import *
from moe_fuse.fused_model import *
from moe_fuse.headers import *
from moe_fuse.multiplex_lora import FusedMoE
from moe_fuse.pipeline import compress
from moe_fuse.streaming import layer_bytes
from tiny_models import *

METHODS = 'fused', 'cores'
CASES = [(m, b) for m in METHODS for b in ('deepseek_v2', 'deepseek_v3')]

@pytest.fixture(scope='module')
def teachers(tmp_path_factory): # one sharded, one a single file
    d = tmp_path_factory.mktemp('teachers')
    return {c['model_type']: write(d/c['model_type'], *tiny(c, moe_intermediate_size=64), shards=n) for c,n in ((V2, 1), (V3, 2))}

@pytest.fixture(scope='module')
def runs(teachers, small, tmp_path_factory):
    d, kw = tmp_path_factory.mktemp('students'), dict(keep=.375, baselines=('reap', 'slim'))
    return {(m, b): small(teachers[b], d/f'{m}-{b}', method=m, **kw) for m,b in CASES}

def longest(run, n=2):
    lengths, end = run.held.lengths[-n:], len(run.held)
    return run.held.ids[end-sum(lengths):].split(lengths), end-sum(lengths), end

def logits(model, ids):
    with torch.no_grad(): return torch.cat([model(s[None]).logits[0] for s in ids])

def load(folder, **kw):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **kw)
    assert not any(info.values()), info
    return model

@pytest.mark.parametrize('case', CASES, ids='-'.join)
def test_loaded_is_what_was_in_memory(case, runs, teachers):
    "Weights, report, sizes, and the router bit for bit"
    run = runs[case]; method, base = case
    ids, a, b = longest(run)
    model, c = load(run.out), json.loads((run.out/'config.json').read_text())
    assert type(model) is FUSED[base] and sum(isinstance(m, FusedMoE) for m in model.modules())==2
    with torch.no_grad(): assert (logits(model, ids)-run.logits[method](a, b)).abs().max() <= 1e-4
    info = inspect(Checkpoint(run.out)); z = run.report['sizes'][method]
    assert run.report['student']==info and (z['bytes'], z['total'], z['active'])==(info['bytes'], info['total'], info['active'])
    assert info['bytes']==sum(t.nbytes for t in tensors_of(run.out).values()) and info['dense_layers']==1
    assert info['total']==fused_total(model.config)-(16*2 if base=='deepseek_v3' else 0)                      # which counts the router's bias
    assert z['routed'] <= .375*run.report['sizes']['teacher']['routed'] and run.report['sizes']['slim']['routed'] <= .375*run.report['sizes']['teacher']['routed']
    new, old = tensors_of(run.out), tensors_of(teachers[base])
    assert all(torch.equal(new[k], v) for k,v in old.items() if '.mlp.gate.' in k)
    assert run.report['fvu'][method]['1']['fitted']<run.report['fvu'][method]['1']['built']                  # of held-out text; 2,048 tokens are too few for layer 2 of a random model
    assert (c['fused_rank']>0)==(method=='fused') and c['num_nextn_predict_layers']==0
    assert not [f for f in run.out.parent.iterdir() if f.name.endswith('.partial')]

ELSEWHERE = '''
import sys; sys.modules['moe_fuse'] = sys.modules['fastcore'] = sys.modules['numba'] = None
import numpy as np, torch
from transformers import AutoModelForCausalLM
ids = torch.from_numpy(np.load(sys.argv[1]))[None]
for i,folder in enumerate(sys.argv[2:]):
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__module__.startswith('transformers_modules.')
    with torch.no_grad():
        want, cache = model(ids).logits, None
        np.save(folder+'.npy', want.numpy())
        for t in range(12):
            o = model(ids[:,t:t+1], past_key_values=cache, use_cache=True); cache = o.past_key_values
            assert (o.logits[0,0]-want[0,t]).abs().max() < 1e-4
    a, b = (model.generate(ids[:,:20], max_new_tokens=8, do_sample=False, use_cache=c, eos_token_id=None) for c in (True, False))
    assert a.shape==(1, 28) and torch.equal(a, b)
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    loss = half.train()(ids, labels=ids).loss; loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in half.parameters())
assert sys.modules['moe_fuse'] is None
'''

def elsewhere(ids, folders, tmp_path): return run_elsewhere(ELSEWHERE, ids, folders, tmp_path)

def test_a_process_without_moe_fuse(runs, tmp_path):
    "All four, sharded, and one as a single file, in one process: logits, decoding, training in bfloat16"
    folders = [runs[c].out for c in CASES]
    single = tmp_path/'single'; single.mkdir()
    for f in folders[0].iterdir():
        if not f.name.startswith('model'): shutil.copy(f, single)
    shutil.copy(folders[0]/MODELLING, single)
    save_file({k: v.clone() for k,v in tensors_of(folders[0]).items()}, single/'model.safetensors', metadata={'format':'pt'})
    ids = longest(runs[CASES[0]])[0][-1][:40]
    for f,got in zip([*folders, single], elsewhere(ids, [*folders, single], tmp_path)):
        assert (got[0]-logits(load(f), [ids])).abs().max() <= 1e-5, f

def test_its_code_beside_the_package(runs):
    "Where moe_fuse is imported too, both classes work in one process, also one after the other and copied"
    run = runs['fused', 'deepseek_v3']; ids = [s[:30] for s in longest(run)[0]]
    ours = load(run.out); want = logits(ours, ids)
    theirs = load(run.out, trust_remote_code=True)
    assert type(theirs) is not type(ours) or type(theirs).__module__.startswith('moe_fuse')
    assert torch.allclose(logits(theirs, ids), want, atol=1e-5) and torch.equal(logits(ours, ids), want)

def test_modelling_file_is_the_library(runs):
    "Character by character what the generator says now"
    for c in CASES: assert (runs[c].out/MODELLING).read_text()==modelling_source()
    assert 'import moe_fuse' not in modelling_source() and 'from moe_fuse' not in modelling_source()

@pytest.mark.parametrize('case', CASES, ids='-'.join)
def test_unfolded_is_the_same_function(case, runs, tmp_path):
    "A stock checkpoint; in bfloat16 it is the rounded one"
    run = runs[case]; ids = longest(run)[0]
    flat = unfold(run.out, tmp_path/'flat')
    assert flat.config['model_type']==case[1] and not {'auto_map', 'n_cores', 'fused_mode'} & set(flat.config)
    assert (logits(stock(flat.folder), ids)-logits(load(run.out), ids)).abs().max() <= 1e-4
    if case[0]=='cores':
        a, b = tensors_of(unfold(run.out, tmp_path/'half', 'bfloat16').folder), tensors_of(flat.folder)
        assert all(torch.equal(v.float(), b[k].float()) for k,v in a.items())                                # nothing is added, so nothing is rounded

def test_narrow_cores_unfold_with_a_padded_shared_expert(teachers, small, tmp_path):
    run = small(teachers['deepseek_v2'], tmp_path/'s', keep=.04, method='cores', baselines=())
    c = json.loads((run.out/'config.json').read_text())
    assert (c['n_cores'], c['core_width'])==(1, 40)
    flat = unfold(run.out, tmp_path/'flat'); ids = longest(run)[0]
    assert (flat.config['moe_intermediate_size'], flat.config['n_shared_experts'])==(40, 4)
    assert (logits(stock(flat.folder), ids)-logits(load(run.out), ids)).abs().max() <= 1e-4

def test_distilled_biases_are_saved_and_not_unfolded(teachers, small, tmp_path):
    run = small(teachers['deepseek_v3'], tmp_path/'s', keep=.375, method='fused', baselines=(), distill_steps=3)
    ids, a, b = longest(run); t = tensors_of(run.out)
    assert t['model.layers.1.mlp.bias'].any() and 'distilled' in run.report['fvu']['fused']['1']
    with torch.no_grad(): assert (logits(load(run.out), ids)-run.logits['fused'](a, b)).abs().max() <= 1e-4
    with pytest.raises(BadInput, match='biases of mode exact are not zero'): unfold(run.out, tmp_path/'flat')
    assert not list(tmp_path.glob('flat*'))

@pytest.mark.parametrize('method', METHODS)
def test_a_device_budget_changes_no_bit(method, teachers, small, tmp_path):
    kw = dict(keep=.375, method=method, baselines=())
    b = layer_bytes(Checkpoint(teachers['deepseek_v3']), 'model.layers.1')
    plain, packed = small(teachers['deepseek_v3'], tmp_path/'a', **kw), small(teachers['deepseek_v3'], tmp_path/'b', **kw, device_budget=b.rest+2*b.expert)
    assert shard_bytes(plain.out)==shard_bytes(packed.out)

class Killed(BaseException): pass

def stops(monkeypatch, where, at):
    "The `at`-th call of a function ends the run"
    (module, name), count = where, [0]
    old = getattr(module, name)
    def f(*args, **kw):
        count[0] += 1
        if count[0]==at: raise Killed
        return old(*args, **kw)
    monkeypatch.setattr(module, name, f)

PLACES = [((pipeline, 'layer_tensors'), 3), ((pipeline, 'modelling_source'), 1), ((pipeline, 'plot_report'), 1)]

@pytest.mark.parametrize('where,at', PLACES, ids=lambda p: p[1] if isinstance(p, tuple) else str(p))
def test_killed_and_resumed(where, at, runs, teachers, small, monkeypatch, tmp_path):
    "Until the end nothing has the final name; resumed, it is the same to the last bit, and its code lies beside it"
    kw = dict(keep=.375, method='fused', baselines=('reap', 'slim'))
    with monkeypatch.context() as m, pytest.raises(Killed):
        stops(m, where, at); small(teachers['deepseek_v3'], tmp_path/'s', **kw)
    assert not (tmp_path/'s').exists() and (tmp_path/'s.partial').exists()
    run, want = small(teachers['deepseek_v3'], tmp_path/'s', **kw, resume=True), runs['fused', 'deepseek_v3']
    assert shard_bytes(run.out)==shard_bytes(want.out) and sorted(f.name for f in run.out.iterdir())==sorted(f.name for f in want.out.iterdir())
    for f in 'config.json', MODELLING: assert (run.out/f).read_bytes()==(want.out/f).read_bytes()

@pytest.mark.parametrize('at', [1, 3])
def test_disk_full_leaves_nothing(at, teachers, small, monkeypatch, tmp_path):
    count, old = [0], checkpoint.save_file
    def full(tensors, path, **kw):
        count[0] += 1
        if count[0]<at: return old(tensors, path, **kw)
        path.write_bytes(b'half'); raise OSError(28, 'No space left on device', str(path))
    monkeypatch.setattr(checkpoint, 'save_file', full)
    with pytest.raises(OSError, match='No space left'): small(teachers['deepseek_v2'], tmp_path/'s', keep=.375, method='cores', baselines=())
    assert not list(tmp_path.iterdir())

def test_disk_full_while_unfolding_leaves_nothing(runs, monkeypatch, tmp_path):
    def full(*_, **__): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(checkpoint, 'save_file', full)
    with pytest.raises(OSError, match='No space left'): unfold(runs['cores', 'deepseek_v2'].out, tmp_path/'flat')
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('kw,say', [(dict(method='fused', keep=.01), 'no room for a rank'), (dict(method='cores', keep=.001), 'less than 8 neurons'), (dict(method='cores', keep=1.5), 'keep is 1.5'),
                                    (dict(method='fused', shared_share=.25), 'shared_share 0.25 needs method slim'), (dict(method='cores', keep={1: 8, 2: 8}), 'widths that differ need method slim'),
                                    (dict(method='cores', baselines=('nothing',)), "baseline 'nothing'"), (dict(method='slim', baselines=('slim',)), "baseline 'slim'")])
def test_refused(kw, say, teachers, small, tmp_path):
    with pytest.raises(BadInput, match=say): small(teachers['deepseek_v3'], tmp_path/'s', **kw)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('method', METHODS)
def test_other_families_are_refused_by_name(method, small, tmp_path):
    config = dict(model_type='qwen3_moe', vocab_size=2048, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
                  num_experts=8, num_experts_per_tok=2, max_position_embeddings=512)
    src = write(tmp_path/'t', *tiny(config))
    with pytest.raises(BadInput, match="model_type 'qwen3_moe' has no fused model"): small(src, tmp_path/'s', method=method, keep=.5)
    assert [f.name for f in tmp_path.iterdir()]==['t']
