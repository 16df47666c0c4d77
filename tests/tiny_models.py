"Tiny random DeepSeek checkpoints for the tests, packed by hand: nothing here is taken from the library under test."
import json, os, random, shutil, subprocess, sys
from pathlib import Path
import numpy as np, torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

root = Path(__file__).resolve().parents[1]
TOKENIZER = root/'moe_fuse'/'teacher'
AWQ_ORDER, BLOCK, GROUP = (0,2,4,6,1,3,5,7), (32,16), 16  # blocks that are not square show a mix-up of rows and columns

SIZES = dict(vocab_size=2048, hidden_size=48, intermediate_size=80, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
             n_routed_experts=16, num_experts_per_tok=4, kv_lora_rank=16, q_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
             first_k_dense_replace=1, max_position_embeddings=1024, initializer_range=.15, bos_token_id=0, eos_token_id=1, pad_token_id=4)
V3 = SIZES | dict(model_type='deepseek_v3', n_shared_experts=1, n_group=4, topk_group=2, num_nextn_predict_layers=0, routed_scaling_factor=2.5, norm_topk_prob=True)
V2 = SIZES | dict(model_type='deepseek_v2', n_shared_experts=2, q_lora_rank=None, topk_method='greedy', n_group=1, topk_group=1)

def tiny(base=V3, seed=0, **changes):
    "(config.json, state) of a random model: float32 tensors, one key an expert."
    config = base | changes
    cfg = CONFIG_MAPPING[config['model_type']].from_dict(config)
    torch.manual_seed(seed)
    model, state = AutoModelForCausalLM.from_config(cfg, dtype=torch.float32), {}
    for k,v in model.state_dict().items():
        if k.endswith('e_score_correction_bias'): v = torch.rand(v.shape)*.2                 # enough to change who is chosen
        if k.endswith('gate_up_proj'):
            for e,w in enumerate(v):
                for part,rows in zip(('gate','up'), w.chunk(2)): state[k.replace('gate_up_proj', f'{e}.{part}_proj.weight')] = rows
        elif k.endswith('experts.down_proj'): state |= {k.replace('down_proj', f'{e}.down_proj.weight'): w for e,w in enumerate(v)}
        elif not (k=='lm_head.weight' and cfg.tie_word_embeddings): state[k] = v
    for k in state:
        if k.endswith('norm.weight'): state[k] = 1 + .2*torch.randn(state[k].shape)
    return config | dict(architectures=[type(model).__name__]), {k: v.clone().contiguous() for k,v in state.items()}

def is_expert(k): return '.mlp.experts.' in k
def is_matrix(k): return k.endswith('_proj.weight') or 'a_proj_with_mqa' in k

def pack_words(q):
    "[rows, cols] of 0..15 -> [rows, cols/8] int32, nibble by nibble."
    out = torch.zeros(q.shape[0], q.shape[1]//8, dtype=torch.int64)
    for j,c in enumerate(AWQ_ORDER): out |= q[:,c::8].long() << (4*j)
    return torch.where(out>=2**31, out-2**32, out).to(torch.int32)

def as_awq(w, g=GROUP):
    "A weight [out, in] rounded to 4 bits: (its packed tensors by name, the floats they stand for)."
    o, i = w.shape
    q, z, s = torch.zeros(i, o), torch.zeros(i//g, o), torch.zeros(i//g, o)
    for r in range(i//g):
        x = w[:,r*g:(r+1)*g].T
        lo, hi = x.min(0).values.clamp(max=0), x.max(0).values.clamp(min=0)
        s[r] = ((hi-lo)/15).half().float().clamp(min=1e-4).half().float()
        z[r] = (-lo/s[r]).round().clamp(0, 15)
        q[r*g:(r+1)*g] = (x/s[r] + z[r]).round().clamp(0, 15)
    back = torch.stack([(q[c]-z[c//g])*s[c//g] for c in range(i)], 1)
    return dict(qweight=pack_words(q), qzeros=pack_words(z), scales=s.half()), back.contiguous()

def as_fp8(w, block=BLOCK):
    "A weight rounded to FP8 block by block: (weight, scale, the floats they stand for)."
    (o, i), (bo, bi) = w.shape, block
    q, s, back = torch.zeros(o, i, dtype=torch.float8_e4m3fn), torch.zeros(-(-o//bo), -(-i//bi)), torch.zeros(o, i)
    for r in range(s.shape[0]):
        for c in range(s.shape[1]):
            at = slice(r*bo, (r+1)*bo), slice(c*bi, (c+1)*bi)
            s[r,c] = w[at].abs().max()/448
            q[at] = (w[at]/s[r,c]).clamp(-448, 448).to(torch.float8_e4m3fn)
            back[at] = q[at].float()*s[r,c]
    return q, s, back

def pack(config, state, how):
    "(config, tensors on disk, the floats they stand for); how: float32, bfloat16, fp8, awq, or mixed (AWQ experts, bfloat16 rest)."
    disk, back, config = {}, {}, dict(config)
    if how=='fp8': config['quantization_config'] = dict(quant_method='fp8', fmt='e4m3', activation_scheme='dynamic', weight_block_size=list(BLOCK))
    if how in ('awq','mixed'):
        config['quantization_config'] = dict(quant_method='awq', bits=4, group_size=GROUP, version='gemm', zero_point=True)
        if how=='mixed': config['quantization_config']['modules_to_not_convert'] = ['self_attn', 'shared_experts', 'mlp.gate']
    for k,v in state.items():
        small = torch.float16 if how=='awq' else torch.bfloat16
        if how=='float32' or k.endswith('e_score_correction_bias'): disk[k] = back[k] = v
        elif how=='fp8' and is_matrix(k): disk[k], disk[k+'_scale_inv'], back[k] = as_fp8(v)
        elif (how=='awq' and is_matrix(k)) or (how=='mixed' and is_expert(k)):
            packed, back[k] = as_awq(v)
            disk |= {f'{k.removesuffix(".weight")}.{n}': t for n,t in packed.items()}
        else: disk[k] = v.to(small); back[k] = disk[k].float()
    return config, disk, back

def write(folder, config, tensors, shards=1, tokenizer=True):
    "Write a checkpoint; neighbours in name order land in different shards."
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
    (folder/'config.json').write_text(json.dumps(config))
    if tokenizer:
        for f in TOKENIZER.iterdir():
            if f.name.startswith(('tokenizer', 'chat_template', 'generation_config')): shutil.copy(f, folder)
    names = sorted(tensors)
    if shards==1: save_file({k: tensors[k].clone() for k in names}, folder/'model.safetensors', metadata={'format':'pt'}); return folder
    file = lambda i: f'model-{i+1:05}-of-{shards:05}.safetensors'
    for i in range(shards): save_file({k: tensors[k].clone() for k in names[i::shards]}, folder/file(i), metadata={'format':'pt'})
    index = dict(metadata=dict(total_size=sum(t.nbytes for t in tensors.values())), weight_map={k: file(i%shards) for i,k in enumerate(names)})
    (folder/'model.safetensors.index.json').write_text(json.dumps(index))
    return folder

def stock(folder, dtype=torch.float32):
    "Load a folder with `transformers` alone, and see that nothing was missing or left over."
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert {k: v for k,v in info.items() if v}=={}, info
    return model.eval()

def tensors_of(folder):
    "Every tensor of a checkpoint, by name."
    from safetensors.torch import load_file
    return {k: v for f in sorted(Path(folder).glob('*.safetensors')) for k,v in load_file(f).items()}

def shard_bytes(folder): return {f.name: f.read_bytes() for f in sorted(Path(folder).glob('*.safetensors'))}

DEMO = dict(keep=.25, tokens=4096, eval_tokens=2048)

def write_texts(folder):
    "Two domains, `code` and `chat`, of the license's words as jsonl: (calibration, held-out) as `compress` takes them. Text that an edit of the sources changed would now and then put a token on a router's tie."
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
    words, rng = (root/'LICENSE').read_text(encoding='utf-8').split(), random.Random(0)
    parts = [' '.join(rng.choices(words, k=120)) for _ in range(240)]
    for split,docs in (('train', parts[::2]), ('valid', parts[1::2])):
        (folder/f'code.{split}.jsonl').write_text(''.join(json.dumps(dict(text=t))+'\n' for t in docs[::2]))
        chats = [[dict(role='user', content=t[:200]), dict(role='assistant', content=t[200:])] for t in docs[1::2]]
        (folder/f'chat.{split}.jsonl').write_text(''.join(json.dumps(dict(messages=m))+'\n' for m in chats))
    return tuple(f'{folder}/code.{s}.jsonl,{folder}/chat.{s}.jsonl' for s in ('train','valid'))

def run_elsewhere(script, ids, folders, tmp_path): # -> what it saved beside each folder, as FOLDER.npy
    "A script in a process that does not find moe_fuse on its path; it is given a file of ids and the folders"
    np.save(tmp_path/'ids.npy', ids.numpy())
    env = {k: v for k,v in os.environ.items() if k!='PYTHONPATH'} | dict(HF_HOME=str(tmp_path/'hf'), HF_HUB_OFFLINE='1')
    r = subprocess.run([sys.executable, '-c', script, str(tmp_path/'ids.npy'), *map(str, folders)], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert r.returncode==0, r.stderr[-3000:]
    return [torch.from_numpy(np.load(f'{f}.npy')) for f in folders]
