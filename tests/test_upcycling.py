"Mixtures of dense models: the routers are mergekit's to the last bit, `transformers` and llama.cpp load what is written, and nothing is left of what fails."
import json, re, logging, os, shutil
from pathlib import Path
import pytest, torch, yaml
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, CONFIG_MAPPING
from tiny_models import TOKENIZER, stock, tensors_of, write
from moe_fuse.cli import main
from moe_fuse.headers import *
from moe_fuse.llama_cpp import llama_cpp_problems, write_gguf
from moe_fuse.upcycling import *
import test_hub
from test_hub import Hub, hub
from test_llama_cpp import engine, run_both

SIZES = dict(vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
             initializer_range=.15, bos_token_id=0, eos_token_id=1, pad_token_id=4)
MLA = dict(first_k_dense_replace=3, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
KINDS = dict(llama={}, mistral=dict(sliding_window=None), qwen2={}, qwen3=dict(head_dim=16), deepseek_v2=MLA, deepseek_v3=MLA)
POSITIVE = [['def __init__(self):', 'import os'], ['What does this return?'], ['x = 1', 'return None', 'for i in range(10): pass']]
NEGATIVE = [[], ['import sys', 'class A: pass'], []]

def dense(folder, kind, seed=0, dtype=torch.float32, **changes):
    "A random dense model, with random norms"
    config = SIZES | KINDS[kind] | changes
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**config), dtype=torch.float32)
    for k,p in model.named_parameters():
        if 'norm' in k: p.data = 1+.2*torch.randn(p.shape)
        if k.endswith('bias'): p.data = .1*torch.randn(p.shape)
    model.to(dtype).save_pretrained(folder)
    for f in TOKENIZER.iterdir():
        if f.name.startswith('tokenizer'): shutil.copy(f, folder)
    return folder

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    d = tmp_path_factory.mktemp('dense')
    return {k: [str(dense(d/f'{k}{i}', k, i)) for i in range(3)] for k in KINDS}

def recipe_of(models, mode='hidden', shared=0, prompts=False, **more):
    x = [dict(source_model=m, positive_prompts=p) | (dict(negative_prompts=n) if n else {}) for m,p,n in zip(models, POSITIVE, NEGATIVE)]
    s = [dict(source_model=m) | (dict(positive_prompts=['hello']) if prompts else {}) for m in models[:shared]]
    return dict(base_model=models[0], gate_mode=mode, experts=x, **(dict(shared_experts=s) if s else {}), **more)

# mergekit

@pytest.fixture(scope='module')
def mergekit():
    "Its router, run in the dtype that is asked for (by itself it loads the base in bfloat16)"
    router = pytest.importorskip('mergekit.moe.router', reason='mergekit is not installed; make set-up installs it')
    from mergekit.common import ModelReference
    from mergekit.moe.config import Expert
    def gates(folder, experts, mode, dtype=torch.float32):
        tok = AutoTokenizer.from_pretrained(folder); tok.padding_side, tok.pad_token = 'left', tok.bos_token or tok.eos_token
        class Loader:
            def from_pretrained(path, revision, torch_dtype, device_map, low_cpu_mem_usage, trust_remote_code): return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        kept, router.AutoModelForCausalLM = router.AutoModelForCausalLM, Loader
        try: return router.get_gate_params(ModelReference.model_validate(str(folder)), tok, [Expert(source_model=str(folder), **e) for e in experts], mode, device='cpu')
        finally: router.AutoModelForCausalLM = kept
    return gates

@pytest.mark.parametrize('mode', GATE_MODES)
@pytest.mark.parametrize('kind', ['llama', 'mistral', 'qwen2', 'qwen3'])
def test_gates_are_mergekits(mergekit, models, kind, mode):
    folder = models[kind][0]
    ck = Checkpoint(folder)
    experts = [dict(positive_prompts=p) | (dict(negative_prompts=n) if n else {}) for p,n in zip(POSITIVE, NEGATIVE)]
    torch.manual_seed(3)
    want = mergekit(folder, experts, mode)
    got, notes = gate_vectors(ck, dense_config(ck, ''), [Source(folder, **e) for e in experts], mode, torch.Generator().manual_seed(3))
    assert want.dtype==got.dtype==torch.float32 and want.shape==got.shape==(3, 3, 64)
    assert torch.equal(want, got) and notes==[]

@pytest.mark.parametrize('mode', ['hidden', 'hidden_avg'])
def test_gates_are_mergekits_in_bfloat16_too(mergekit, models, mode):
    folder = models['llama'][0]
    ck = Checkpoint(folder)
    experts = [dict(positive_prompts=p) | (dict(negative_prompts=n) if n else {}) for p,n in zip(POSITIVE, NEGATIVE)]
    got, _ = gate_vectors(ck, dense_config(ck, ''), [Source(folder, **e) for e in experts], mode, dtype=torch.bfloat16)
    assert torch.equal(mergekit(folder, experts, mode, torch.bfloat16), got)

@pytest.mark.parametrize('case', ['deepseek_v2', 'deepseek_v3', 'window', 'no start token'])
def test_gates_with_other_attention_and_tokenizers(mergekit, models, tmp_path, case):
    folder = models[case][0] if case in models else str(dense(tmp_path/'m', 'mistral' if case=='window' else 'qwen2', **(dict(sliding_window=4) if case=='window' else {})))
    if case=='no start token':
        t = read_json(f'{folder}/tokenizer_config.json'); del t['bos_token']; (tmp_path/'m'/'tokenizer_config.json').write_text(json.dumps(t))
        assert AutoTokenizer.from_pretrained(folder).bos_token is None
    ck, experts = Checkpoint(folder), [dict(positive_prompts=p) | (dict(negative_prompts=n) if n else {}) for p,n in zip(POSITIVE, NEGATIVE)]
    for mode in 'hidden', 'hidden_avg': assert torch.equal(mergekit(folder, experts, mode), gate_vectors(ck, dense_config(ck, ''), [Source(folder, **e) for e in experts], mode)[0])

def test_rows_do_what_prompts_ask(models):
    "Negative prompts equal to the positive ones leave nothing, and say so"
    r = recipe_of(models['llama']); r['experts'][0]['negative_prompts'] = r['experts'][0]['positive_prompts']
    ck = Checkpoint(models['llama'][0])
    gates, _ = gate_vectors(ck, dense_config(ck, ''), read_recipe(r).experts)
    assert (gates[:,0]==0).all() and torch.allclose(gates[:,1:].norm(dim=-1), torch.ones(3, 2))
    said = re.search(r'near-singular gates in all layers: condition numbers up to (\S+),', gate_warnings(gates)[0])
    assert float(said[1])>1e6                                                   # infinite but for rounding

MERGEKIT = dict(mixtral=('mixtral', 'MixtralMoE', 'llama', 0), qwen2_moe=('qwen', 'QwenMoE', 'qwen2', 1), qwen3_moe=('qwen3', 'Qwen3MoE', 'qwen3', 0), deepseek=('deepseek', 'DeepseekMoE', 'llama', 1))

@pytest.mark.parametrize('target', MERGEKIT)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_files_are_mergekits(models, tmp_path, target, dtype):
    "The same numbers, given the same gates. mergekit writes the experts of some architectures as one tensor; and it knows no shared expert from a fourth model"
    pytest.importorskip('mergekit.moe', reason='mergekit is not installed; make set-up installs it')
    from importlib import import_module
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.options import MergeOptions
    module, cls, kind, shared = MERGEKIT[target]
    r = recipe_of(models[kind], shared=shared, prompts=target=='qwen2_moe', architecture=target, dtype=dtype)
    r['experts'][1]['residual_scale'] = .7
    ours = upcycle(r, tmp_path/'ours').out
    p = plan_upcycling(read_recipe(r)); ck = Checkpoint(models[kind][0])
    gates, _ = gate_vectors(ck, p.base, p.recipe.experts + (p.recipe.shared_experts if target=='qwen2_moe' else []))
    getattr(import_module(f'mergekit.moe.{module}'), cls)().write_model(str(tmp_path/'theirs'), MoEMergeConfig.model_validate(r), MergeOptions(), [g[:3] for g in gates], [g[3:] for g in gates])
    if target=='deepseek': assert_same(tensors_of(ours), tensors_of(tmp_path/'theirs'))
    else: assert_same(*(stock(f, getattr(torch, dtype)).state_dict() for f in (ours, tmp_path/'theirs')))
    a, b = (json.loads((f/'config.json').read_text()) for f in (ours, tmp_path/'theirs'))
    assert {k: (a[k], b[k]) for k in a.keys()&b.keys() if a[k]!=b[k]}.keys() <= {'norm_topk_prob', 'use_cache', 'rope_scaling', 'rope_theta', 'sliding_window', 'num_experts', 'num_local_experts', 'torch_dtype', 'dtype', 'layer_types'}

def assert_same(a, b):
    assert a.keys()==b.keys()
    assert [k for k in a if a[k].dtype!=b[k].dtype or not torch.equal(a[k], b[k])]==[]

# what is written

WAYS = [('llama', 'mixtral', 0), ('mistral', 'mixtral', 0), ('qwen2', 'qwen2_moe', 1), ('llama', 'qwen2_moe', 1), ('qwen3', 'qwen3_moe', 0), ('deepseek_v2', 'deepseek_v2', 1), ('deepseek_v3', 'deepseek_v3', 2)]

@pytest.mark.parametrize('kind,target,shared', WAYS)
def test_transformers_loads_it_and_equal_experts_are_the_dense_model(models, tmp_path, kind, target, shared):
    "DeepSeek-V2 does not normalise its weights, so all experts must be chosen there for their weights to sum to 1"
    base, fourth = models[kind][0], str(dense(tmp_path/'fourth', kind, 7))
    r = recipe_of(models[kind], 'hidden', shared, prompts=target=='qwen2_moe', architecture=target)
    if shared: r['shared_experts'][0]['source_model'] = fourth                  # neither base nor routed expert
    done = upcycle(r, tmp_path/'mixed')
    loaded = stock(done.out).state_dict()
    if shared:
        name = 'shared_expert' if target=='qwen2_moe' else 'shared_experts'
        assert torch.equal(loaded[f'model.layers.1.mlp.{name}.up_proj.weight'][:96], tensors_of(fourth)['model.layers.1.mlp.up_proj.weight'])
        assert loaded[f'model.layers.1.mlp.{name}.down_proj.weight'].shape==(64, 96*shared)
    assert done.experts==3 and done.warnings==[] and AutoTokenizer.from_pretrained(done.out)('import os')['input_ids']
    assert any('.experts.2.' in k for k in Checkpoint(done.out).entries) and not any(k.endswith('gate_up_proj') for k in Checkpoint(done.out).entries)
    k = 4 if target=='deepseek_v2' else 2
    same = dict(base_model=base, architecture=target, gate_mode='random', experts_per_token=k, experts=[dict(source_model=base)]*4)
    if shared: same['shared_experts'] = [dict(source_model=base, residual_scale=0)]  # adds nothing
    assert_dense(base, upcycle(same, tmp_path/'same').out)

def assert_dense(base, moe):
    "A mixture of equal experts whose weights sum to 1 computes its base"
    x = torch.randint(5, 2048, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): want, got = stock(base)(x).logits, stock(moe)(x).logits
    assert (got-want).abs().max() < 1e-5*want.abs().max()

LLAMA3 = dict(rope_parameters=dict(rope_type='llama3', rope_theta=5e5, factor=4., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=16))

@pytest.mark.parametrize('kind,changes', [('qwen3', dict(head_dim=32, num_key_value_heads=1, attention_bias=True)), ('llama', dict(head_dim=32, num_key_value_heads=1, hidden_act='gelu') | LLAMA3),
                                          ('qwen2', dict(tie_word_embeddings=True, rms_norm_eps=1e-3) | LLAMA3), ('deepseek_v3', dict(tie_word_embeddings=True, q_lora_rank=None, attention_bias=True))])
def test_what_is_odd_about_a_base_stays(tmp_path, kind, changes):
    base = str(dense(tmp_path/'b', kind, **changes))
    r = dict(base_model=base, gate_mode='random', experts=[dict(source_model=base)]*2)
    if kind in ('qwen2', 'deepseek_v3'): r['shared_experts'] = [dict(source_model=base, residual_scale=0)]
    assert_dense(base, upcycle(r, tmp_path/'m').out)

def reference(base, moe, ids):
    "DeepSeek-MoE as its report says it, on Llama's attention: softmax over all, the k best, not normalised, and the shared experts"
    model, t, c = stock(base), tensors_of(moe), read_json(moe/'config.json')
    class Block(nn.Module):
        def __init__(self, i): super().__init__(); self.pre = f'model.layers.{i}.mlp.'
        def expert(self, x, name): return F.linear(F.silu(F.linear(x, t[f'{self.pre}{name}.gate_proj.weight']))*F.linear(x, t[f'{self.pre}{name}.up_proj.weight']), t[f'{self.pre}{name}.down_proj.weight'])
        def forward(self, x):
            p = F.linear(x, t[self.pre+'gate.weight']).softmax(-1)
            p = torch.where(p>=p.topk(c['num_experts_per_tok']).values[...,-1:], p, 0)
            return self.expert(x, 'shared_experts') + sum(p[...,e,None]*self.expert(x, f'experts.{e}') for e in range(c['n_routed_experts']))
    for i,l in enumerate(model.model.layers): l.mlp = Block(i)
    return model

@engine
@pytest.mark.parametrize('kind,target,shared', [('llama', 'mixtral', 0), ('deepseek_v2', 'deepseek_v2', 1), ('deepseek_v3', 'deepseek_v3', 2)])
def test_llama_cpp_computes_the_same(models, tmp_path, kind, target, shared):
    out = upcycle(recipe_of(models[kind], 'hidden', shared, architecture=target), tmp_path/'m').out
    write_gguf(out, tmp_path/'m.gguf', 'f32')
    far, most, words, mine = run_both(out, tmp_path/'m.gguf', list(range(5, 60)), 8)
    assert far<1e-4*most and words==mine

@engine
def test_llama_cpp_computes_deepseek_moe(models, tmp_path):
    import llama_cpp
    out = upcycle(recipe_of(models['llama'], 'hidden', 2), tmp_path/'m').out
    write_gguf(out, tmp_path/'m.gguf', 'f32')
    ids = list(range(5, 60))
    with torch.no_grad(): want = reference(models['llama'][0], out, ids)(torch.tensor([ids])).logits[0]
    m = llama_cpp.Llama(str(tmp_path/'m.gguf'), logits_all=True, n_ctx=64, type_k=0, type_v=0, flash_attn=False, verbose=False)
    m.eval(ids); got = torch.tensor(m.scores[:len(ids)].tolist()); m.close()
    assert (got-want).abs().max() < 1e-4*want.abs().max()

def test_what_llama_cpp_would_misread_is_named(models, tmp_path):
    for kind,more,said in ('qwen2', dict(shared=1, prompts=True), 'norm_topk_prob'), ('mistral', {}, 'sliding_window'):
        m = [str(dense(tmp_path/f'{kind}{i}', kind, i, sliding_window=8)) for i in range(3)]
        out = upcycle(recipe_of(m, **more), tmp_path/f'{kind}-moe').out
        assert said in '; '.join(llama_cpp_problems(read_json(out/'config.json')))
    for kind,change in ('llama', dict(hidden_act='gelu')), ('qwen3', dict(attention_bias=True)):
        m = [str(dense(tmp_path/f'{kind}{i}', kind, i, **change)) for i in range(3)]
        assert next(iter(change)) in '; '.join(llama_cpp_problems(read_json(upcycle(recipe_of(m), tmp_path/f'{kind}-odd').out/'config.json')))

def test_a_sliding_window_stays(tmp_path):
    base = str(dense(tmp_path/'w', 'mistral', sliding_window=8))
    out = upcycle(dict(base_model=base, gate_mode='random', experts=[dict(source_model=base)]*2), tmp_path/'m').out
    assert_dense(base, out)

def test_noise_and_scale(models, tmp_path):
    "Noise on all three matrices, the scale on what enters the stream, and the same seed gives the same file"
    base = models['llama'][0]
    r = dict(base_model=base, gate_mode='random', experts=[dict(source_model=base, noise_scale=.5, residual_scale=-2), dict(source_model=base, noise_scale=0)])
    a, b, c = (tensors_of(upcycle(r, tmp_path/n, seed=s).out) for n,s in (('a', 1), ('b', 1), ('c', 2)))
    assert all(torch.equal(a[k], b[k]) for k in a)
    w, e = tensors_of(base), 'model.layers.2.block_sparse_moe.experts.'
    for ours,theirs,scale in ('w1', 'gate_proj', 1), ('w3', 'up_proj', 1), ('w2', 'down_proj', -2):
        x = w[f'model.layers.2.mlp.{theirs}.weight']
        noise = a[f'{e}0.{ours}.weight']/scale - x
        assert abs(noise.std()-.5)<.02 and abs(noise.mean())<.03 and torch.equal(a[f'{e}1.{ours}.weight'], x)
        assert not torch.equal(a[f'{e}0.{ours}.weight'], c[f'{e}0.{ours}.weight'])

def test_tied_heads_and_dtypes(tmp_path):
    "The base's dtype unless the recipe says otherwise; a tied head is not written"
    base = str(dense(tmp_path/'b', 'llama', dtype=torch.bfloat16, tie_word_embeddings=True))
    r = dict(base_model=base, gate_mode='random', experts=[dict(source_model=base)]*2)
    for dtype,want in (None, torch.bfloat16), ('float16', torch.float16), ('float32', torch.float32):
        t = tensors_of(upcycle(r | dict(dtype=dtype), tmp_path/str(dtype)).out)
        assert {v.dtype for v in t.values()}=={want} and 'lm_head.weight' not in t
        stock(tmp_path/str(dtype), want)

# warnings

def test_warnings_name_what_is_meant(models, tmp_path):
    a, b = models['llama'][:2]
    wide = str(dense(tmp_path/'wide', 'llama', vocab_size=2050))
    other = str(dense(tmp_path/'other', 'llama', 5))
    t = read_json(f'{other}/tokenizer.json'); words = sorted(t['model']['vocab'], key=t['model']['vocab'].get)
    t['model']['vocab'] = {w: i for i,w in enumerate(words[:-1]+['unheard'])}
    t['model']['merges'] = [m for m in t['model']['merges'] if words[-1] not in (''.join(m), *m)]
    (tmp_path/'other'/'tokenizer.json').write_text(json.dumps(t))
    x = [dict(source_model=s, positive_prompts=p) for s,p in ((a, ['import os', '']), (b, ['import os']), (f'{a}/', ['a']), (wide, ['b']), (other, ['import os']))]
    done = upcycle(dict(base_model=a, gate_mode='cheap_embed', experts=x), tmp_path/'m'); said = done.warnings
    assert repr(done).splitlines()[1:]==[f'warning: {w}' for w in said]
    assert len(said)==5
    for s,want in zip(said, (f'experts[3].source_model {wide}: vocab_size is 2050', f'experts 0, 2 are the same model, {a}', f'experts[4].source_model {other}: its tokenizer has other words', "experts[0].positive_prompts[1] is '', which gives no token", 'near-singular gates in all layers')): assert s.startswith(want)
    assert upcycle(dict(base_model=a, gate_mode='random', experts=[dict(source_model=a)]*2), tmp_path/'r').warnings==[]

# bad input

def test_yaml_files(tmp_path):
    "Numbers as people write them; and what YAML would pass over in silence"
    text = 'base_model: a\ngate_mode: random\nexperts:\n  - {source_model: a, noise_scale: 1e-3, residual_scale: -2E+1}\n  - &b {source_model: b}\n  - {<<: *b, noise_scale: 1}\n'
    def read(s): (tmp_path/'c.yml').write_text(s); return read_recipe(tmp_path/'c.yml')
    assert [(x.source_model, x.noise_scale, x.residual_scale) for x in read(text).experts]==[('a', .001, -20), ('b', 0, 1), ('b', 1, 1)]
    for s,said in (text+'gate_mode: hidden\n', 'key gate_mode stands twice'), (text+'  - {source_model: a, source_model: b}\n', 'key source_model stands twice'), ('['*1000, 'not YAML'), ('', 'recipe is None'):
        with pytest.raises(BadInput, match=said) as e: read(s)
        assert '\n' not in str(e.value)

def says(config, message, tmp_path):
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(BadInput) as e: upcycle(config, tmp_path/'deep'/'out')
    assert message in str(e.value) and '\n' not in str(e.value)
    assert sorted(tmp_path.rglob('*'))==before

def test_bad_recipes(models, tmp_path, monkeypatch):
    "Each is refused before a weight is read"
    monkeypatch.setattr(Checkpoint, 'stored', lambda self, name: pytest.fail(f'{name} was read'))
    monkeypatch.setattr('moe_fuse.upcycling.resolve_source', lambda src: pytest.fail(f'{src} was fetched'))
    a, b = models['llama'][:2]
    v3, mute = models['deepseek_v3'][0], shutil.copytree(a, tmp_path/'mute', ignore=shutil.ignore_patterns('tokenizer*'))
    ok = dict(base_model=a, experts=[dict(source_model=s, positive_prompts=[s]) for s in (a, b)])
    def one(**kw): return ok | dict(experts=[ok['experts'][0], ok['experts'][1] | kw])
    for config,message in [
        (ok | dict(gate='hidden'), "gate (value 'hidden') is not a known key; allowed: base_model, experts, shared_experts"), (one(prompts=[]), 'experts[1].prompts (value []) is not a known key'),
        (ok | dict(gate_mode='last'), "gate_mode is 'last'; it must be one of hidden, hidden_avg"), (ok | dict(dtype='int4'), "dtype is 'int4'; it must be one of float32"), (ok | dict(dtype=['float32']), "dtype is ['float32']"), (ok | dict(gate_mode=['hidden']), "gate_mode is ['hidden']"),
        (ok | dict(experts_per_token=0), 'experts_per_token is 0'), (ok | dict(experts_per_token=3), 'experts_per_token is 3; it must be at most the number of experts, 2'), (ok | dict(experts_per_token=True), 'experts_per_token is True'),
        (ok | dict(experts=[]), 'experts is []'), (dict(base_model=a), 'experts is missing'), (dict(experts=ok['experts']), 'base_model is missing'), (ok | dict(base_model=dict(path=a)), 'base_model is {'),
        (one(noise_scale=-1), 'experts[1].noise_scale is -1'), (one(noise_scale='a lot'), "experts[1].noise_scale is 'a lot'; it must be a number"), (one(residual_scale=10**400), 'experts[1].residual_scale is 1000'), (one(residual_scale=float('nan')), 'experts[1].residual_scale is nan'),
        (one(positive_prompts='x'), "experts[1].positive_prompts is 'x'; it must be a list of texts"), (one(positive_prompts=None), 'experts[1].positive_prompts is []; with gate_mode hidden it must'),
        (one(source_model=''), "experts[1].source_model is ''"), (ok | dict(experts=['x']), "experts[0] is 'x'"), (ok | dict(architecture='gpt'), "architecture is 'gpt'; it must be one of mixtral"),
        (ok | dict(architecture='DeepSeek_V3'), 'MLA'), (ok | dict(architecture='qwen3'), 'can not become; allowed: mixtral'), (ok | dict(architecture='deepseek'), 'shared_experts has 0 entries; architecture deepseek takes one or more'),
        (ok | dict(shared_experts=[dict(source_model=a, positive_prompts=['x'])]), 'shared_experts[0].positive_prompts is'), (ok | dict(base_model=str(tmp_path/'nowhere')), 'nowhere: no such folder'),
        (ok | dict(base_model='demo'), "quant_method is 'fp8'; the weights must be"), (ok | dict(base_model=models['qwen2'][0]), 'a qwen2 model can become qwen2_moe (exactly one)'),
        (dict(base_model=models['qwen2'][0], shared_experts=[dict(source_model=a)], experts=ok['experts']), 'shared_experts[0].positive_prompts is []; qwen2_moe has a gate'),
        (one(positive_prompts=['', '']), "experts[1].positive_prompts is ['', '']: none of it gives a token"), (one(negative_prompts=['']), "experts[1].negative_prompts is ['']: none"),
        (ok | dict(base_model=str(mute)), 'mute: no tokenizer that can be read'),
        (dict(base_model=v3, gate_mode='random', experts_per_token=1, experts=[dict(source_model=v3)], shared_experts=[dict(source_model=v3)]), 'experts has 1 entries, deepseek_v3 can not be made of it: 1 experts in 1 groups'),
        (one(source_model=models['mistral'][0]), "model_type is 'mistral'; it must be 'llama'")]: says(config, message, tmp_path)

def test_bad_files(models, tmp_path):
    a, b = models['llama'][:2]
    def use(m): return dict(base_model=a, gate_mode='random', experts=[dict(source_model=s) for s in (b, m)])
    for n,(change,message) in enumerate([(dict(hidden_size=32), 'experts[1].source_model'), (dict(intermediate_size=80), 'intermediate_size is 80; it must be 96'), (dict(num_hidden_layers=2), 'num_hidden_layers is 2; it must be 3')]):
        says(use(str(dense(tmp_path/f'{n}', 'llama', **change))), message, tmp_path)
    for change,message in [(dict(attention_bias=True), 'attention_bias is True, which mixtral can not hold'), (dict(mlp_bias=True), 'mlp_bias is True')]:
        m = str(dense(tmp_path/message[:8], 'llama', **change)); says(use(m) | dict(base_model=m), message, tmp_path)
    t = tensors_of(b); t['model.layers.1.mlp.up_proj.weight'] = t['model.layers.1.mlp.up_proj.weight'][:90]
    says(use(str(write(tmp_path/'cut', read_json(f'{b}/config.json'), t))), 'model.layers.1.mlp.up_proj.weight is [90, 64]; it must be [96, 64]', tmp_path)
    del t['model.layers.1.mlp.up_proj.weight']; says(use(str(write(tmp_path/'gone', read_json(f'{b}/config.json'), t))), 'lacks tensor model.layers.1.mlp.up_proj.weight', tmp_path)
    t = tensors_of(b); t['model.layers.2.mlp.up_proj.weight'][3,4] = float('nan')  # seen only when it is read, with two layers written
    says(use(str(write(tmp_path/'nan', read_json(f'{b}/config.json'), t))), 'model.layers.2.mlp.up_proj.weight holds NaN', tmp_path)
    says(use(b) | dict(dtype='float16', experts=[dict(source_model=a), dict(source_model=b, residual_scale=1e6)]), 'model.layers.0.mlp.down_proj.weight is out of range in float16 with noise_scale 0 and residual_scale 1e+06', tmp_path)
    v3 = str(dense(tmp_path/'v3', 'deepseek_v3', first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1))
    says(dict(base_model=v3, gate_mode='random', experts=[dict(source_model=v3)]*2, shared_experts=[dict(source_model=v3)]), 'first_k_dense_replace is 1, so it has experts already', tmp_path)
    (tmp_path/'deep').mkdir(); (tmp_path/'deep'/'out').write_text('mine'); says(use(b), 'not an empty folder', tmp_path)
    assert (tmp_path/'deep'/'out').read_text()=='mine'
    gpt = tmp_path/'gpt'; shutil.copytree(b, gpt); (gpt/'config.json').write_text('{"model_type": "gpt2"}')
    says(use(str(gpt)), "model_type is 'gpt2'; it must be one of llama, mistral", tmp_path)

def test_what_a_killed_one_left(models, tmp_path):
    "Its shards go; a run that can be resumed stays"
    r = dict(base_model=models['llama'][0], gate_mode='random', experts=[dict(source_model=models['llama'][0])]*2)
    left = tmp_path/'out.partial'; left.mkdir(); (left/'model-00001-of-00009.safetensors').write_text('x')
    assert len(list(upcycle(r, tmp_path/'out').out.glob('*.safetensors')))==4 and not left.exists()
    left = tmp_path/'run.partial'; left.mkdir(); (left/'run.json').write_text('{}')
    with pytest.raises(BadInput, match='holds an interrupted run'): upcycle(r, tmp_path/'run')
    assert (left/'run.json').exists() and not (tmp_path/'run').exists()

def test_command_line(models, tmp_path, capsys):
    (tmp_path/'c.yml').write_text(yaml.safe_dump(recipe_of(models['qwen3'], 'cheap_embed')))
    assert main(['upcycle', str(tmp_path/'c.yml'), str(tmp_path/'out')])==0 and 'Qwen3MoeForCausalLM, 3 experts, 0 shared, float32' in capsys.readouterr().out
    stock(tmp_path/'out')
    (tmp_path/'d.yml').write_text('base_model: ['); capsys.readouterr()
    for c,said in ('d', 'not YAML'), ('none', 'No such file'):
        assert main(['upcycle', str(tmp_path/f'{c}.yml'), str(tmp_path/'out2')])==2
        err = capsys.readouterr().err
        assert said in err and err.count('\n')==1 and not (tmp_path/'out2').exists()
    assert main(['upcycle', str(tmp_path/'c.yml'), str(tmp_path/'out3'), '--json'])==0
    assert json.loads(capsys.readouterr().out)['architecture']=='Qwen3MoeForCausalLM'

def test_prompts_are_read_before_weights_are_fetched(models, hub, tmp_path, monkeypatch):
    base = Path(models['llama'][0]); monkeypatch.setattr(test_hub, 'folder', base)
    (tmp_path/'c.yml').write_text(yaml.safe_dump(dict(base_model='org/tiny', experts=[dict(source_model='org/tiny', positive_prompts=[p]) for p in ('import os', '')])))
    Hub.sent = 0
    r = test_hub.call(hub | dict(HF_HOME=str(tmp_path/'hf')), 'upcycle', str(tmp_path/'c.yml'), str(tmp_path/'out'))
    assert r.returncode==2 and r.stderr.count('\n')==1 and "experts[1].positive_prompts is ['']: none of it gives a token" in r.stderr
    assert 0<Hub.sent<(base/'model.safetensors').stat().st_size/2 and not (tmp_path/'out').exists()
