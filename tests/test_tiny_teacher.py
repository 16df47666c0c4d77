"The embedded teacher is small, in DeepSeek's format, and says nothing about the machine it came from."
import json, re
from pathlib import Path
import pytest, torch
from safetensors import safe_open
from transformers import AutoTokenizer
import moe_fuse
from moe_fuse.tiny_teacher import CHAT, SPECIAL, teacher_config

folder = Path(moe_fuse.__file__).parent/'teacher'
config = json.loads((folder/'config.json').read_text())

@pytest.fixture(scope='module')
def tensors():
    with safe_open(folder/'model-00001-of-00001.safetensors', 'pt') as f: return {k: f.get_tensor(k) for k in f.keys()}

def test_size(): assert sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) <= 10_000_000

def test_files_are_complete(tensors):
    index = json.loads((folder/'model.safetensors.index.json').read_text())
    assert index['weight_map']=={k:'model-00001-of-00001.safetensors' for k in tensors}
    assert index['metadata']['total_size']==sum(t.nbytes for t in tensors.values())
    assert {p.name for p in folder.iterdir()} >= {'README.md', 'training.json', 'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja', 'generation_config.json'}

def test_dtypes(tensors):
    for k,t in tensors.items():
        if k.endswith(('_scale_inv', 'e_score_correction_bias')): want = torch.float32
        else: want = torch.float8_e4m3fn if '_proj' in k else torch.bfloat16
        assert t.dtype==want, k
        assert t.float().isfinite().all(), k

def test_scales_are_powers_of_two(tensors):
    scales = {k:t for k,t in tensors.items() if k.endswith('_scale_inv')}
    assert {k+'_scale_inv' for k,t in tensors.items() if t.dtype==torch.float8_e4m3fn}==set(scales)
    for k,s in scales.items():
        assert s.shape==tuple(-(-n//128) for n in tensors[k.removesuffix('_scale_inv')].shape), k
        assert (s.frexp().mantissa==.5).all(), k

def test_config():
    ours = teacher_config()
    for k,v in json.loads(ours.to_json_string()).items():
        if k not in ('architectures', 'dtype', 'transformers_version', 'num_nextn_predict_layers'): assert config[k]==v, k
    assert (config['scoring_func'], config['topk_method'], config['num_nextn_predict_layers'])==('sigmoid', 'noaux_tc', 0)
    assert config['topk_group']<config['n_group'] and config['n_routed_experts']%config['n_group']==0  # what llama.cpp asks

def test_tokenizer():
    tok = AutoTokenizer.from_pretrained(folder)
    assert tok.convert_tokens_to_ids(SPECIAL)==[0,1,2,3,4]
    assert (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id)==(0,1,4) and len(tok)==config['vocab_size']
    assert tok.chat_template==CHAT
    text = 'def f(x):\n\treturn "é — 𝜋", 0x1F\n'
    assert tok.decode(tok.encode(text))==text

def test_no_expert_is_dead():
    load = json.loads((folder/'training.json').read_text())['teacher']
    assert max(load['load_max_over_mean']['train'])<1.5 and min(load['load_min_over_mean']['train'])>.5

def test_leads_over_the_twins():
    "Each more than two standard errors, and what the losses beside them say: three figures rounded to 4 digits differ by at most 1.5e-4"
    info = json.loads((folder/'training.json').read_text())
    twins = {(t['kind'], t['weight_decay'], t['seed']): {**t['valid'], 'train': t['train']} for t in info['twins']}
    decay = {'equal': 1.5, 'own best': 1.}
    assert len(info['gaps'])==12
    for g in info['gaps']:
        lead = twins['dense', decay[g['recipe']], g['seed']][g['domain']] - twins['moe', 1.5, g['seed']][g['domain']]
        assert abs(g['mean']-lead)<1.6e-4, g
    for g in [*info['gaps'], *info['gap'].values()]: assert g['mean']>2*g['standard_error'], g

def test_nothing_private():
    for p in folder.iterdir():
        if p.suffix in ('.json', '.md', '.jinja') and p.name!='tokenizer.json': assert not re.search(r'(?<![\w<|])/(work|root|home|tmp|Users)/', p.read_text(encoding='utf-8')), p.name
