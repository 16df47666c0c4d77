"Mixtures of dense models: the routers are mergekit's to the last bit, `transformers` and llama.cpp load what is written, and nothing is left of what fails."
import json, logging, os, shutil
import pytest, torch, yaml
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, CONFIG_MAPPING
from tiny_models import TOKENIZER, stock, tensors_of, write
from moe_fuse.cli import main
from moe_fuse.headers import *
from moe_fuse.llama_cpp import llama_cpp_problems, write_gguf
from moe_fuse.upcycling import *
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
        tok = AutoTokenizer.from_pretrained(folder); tok.padding_side, tok.pad_token_id = 'left', tok.bos_token_id
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

def test_rows_do_what_prompts_ask(models):
    "Negative prompts equal to the positive ones leave nothing, and say so"
    r = recipe_of(models['llama']); r['experts'][0]['negative_prompts'] = r['experts'][0]['positive_prompts']
    ck = Checkpoint(models['llama'][0])
    gates, _ = gate_vectors(ck, dense_config(ck, ''), read_recipe(r).experts)
    assert (gates[:,0]==0).all() and torch.allclose(gates[:,1:].norm(dim=-1), torch.ones(3, 2))
    assert 'near-singular gates in all layers: condition numbers up to inf' in gate_warnings(gates)[0]

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
