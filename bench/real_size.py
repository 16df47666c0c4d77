"""Layers and models of real size, with random weights: what they take in seconds and memory on this machine's GPU.

    python bench/real_size.py v3 [--format awq|fp8] [--vram 24]   # one MoE layer of DeepSeek-V3, this process held to 24 GB of VRAM
    python bench/real_size.py lite FOLDER [--tokens 65536]        # DeepSeek-V2-Lite through the whole `moe-fuse run`; 32 GB of weights are written to FOLDER/teacher first

Random weights say nothing about quality, and nothing here is about quality: the router of a random model spreads tokens over all experts, which is the costly case.
"""
import argparse, json, os, resource, shutil, sys, tempfile, time
from pathlib import Path

import torch
from safetensors.torch import save_file

from moe_fuse.awq_loading import *
from moe_fuse.calibration import *
from moe_fuse.expert_analysis import *
from moe_fuse.headers import *
from moe_fuse.streaming import *

V3 = dict(model_type='deepseek_v3', vocab_size=129280, hidden_size=7168, num_hidden_layers=61, first_k_dense_replace=3, intermediate_size=18432, n_routed_experts=256, num_experts_per_tok=8,
          moe_intermediate_size=2048, n_shared_experts=1, n_group=8, topk_group=4, norm_topk_prob=True, routed_scaling_factor=2.5, num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536,
          kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=4096, rms_norm_eps=1e-6)
LITE = dict(model_type='deepseek_v2', vocab_size=102400, hidden_size=2048, num_hidden_layers=27, first_k_dense_replace=1, intermediate_size=10944, n_routed_experts=64, num_experts_per_tok=6,
            moe_intermediate_size=1408, n_shared_experts=2, n_group=1, topk_group=1, topk_method='greedy', scoring_func='softmax', norm_topk_prob=False, routed_scaling_factor=1.0, num_attention_heads=16,
            num_key_value_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=4096, rms_norm_eps=1e-6, tie_word_embeddings=False)

def layer_state(ck_config, i): # names and shapes of one layer as on disk, from transformers' own module
    with tempfile.TemporaryDirectory() as d:
        (Path(d)/'config.json').write_text(json.dumps(ck_config)); (Path(d)/'model.safetensors').write_bytes((2).to_bytes(8, 'little')+b'{}')
        model = empty_model(Checkpoint(d))
    out, pre = {}, f'model.layers.{i}.'
    for k,v in model.model.layers[i].state_dict().items():
        if k.endswith('gate_up_proj'): out |= {f'{pre}{k.replace("gate_up_proj", f"{e}.{p}_proj.weight")}': (v.shape[1]//2, v.shape[2]) for e in range(len(v)) for p in ('gate','up')}
        elif k.endswith('experts.down_proj'): out |= {f'{pre}{k.replace("down_proj", f"{e}.down_proj.weight")}': tuple(v.shape[1:]) for e in range(len(v))}
        else: out[pre+k] = tuple(v.shape)
    return out

def draw(k, shape, how='bf16', group=64): # {name on disk: tensor} of one weight, made on the GPU
    if 'norm' in k: return {k: torch.ones(shape, dtype=torch.bfloat16)}
    if k.endswith('correction_bias'): return {k: torch.zeros(shape)}
    o, i = shape; std = 1 if 'embed' in k else i**-.5
    if how=='bf16' or '_proj' not in k: return {k: (torch.randn(shape, device='cuda')*std).bfloat16().cpu()}
    if how=='fp8':
        q, s = quantize_fp8(torch.randn(shape, device='cuda')*std)
        return {k: q.cpu(), k+'_scale_inv': s.cpu()}
    m, word = k.removesuffix('.weight'), lambda r: torch.randint(-2**31, 2**31, (r, o//8), device='cuda').int().cpu()
    return {m+'.qweight': word(i), m+'.qzeros': word(i//group), m+'.scales': torch.full((i//group, o), std/6.5, dtype=torch.float16)}

class Stages(dict):
    "Seconds and peak VRAM by name"
    def __call__(self, name):
        torch.cuda.synchronize(); now = time.perf_counter()
        if name: self[name] = (now-self.t, torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats(); self.t = now

def v3(a):
    c = V3 | (dict(quantization_config=dict(quant_method='fp8', weight_block_size=[128,128])) if a.format=='fp8' else dict(quantization_config=dict(quant_method='awq', bits=4, group_size=64, zero_point=True, version='gemm')))
    with tempfile.TemporaryDirectory(dir=a.folder) as d:
        tensors = {n:t for k,s in layer_state(c, 3).items() for n,t in draw(k, s, a.format).items()}
        save_file(tensors, Path(d)/'model.safetensors'); (Path(d)/'config.json').write_text(json.dumps(c)); del tensors
        ck, gb = Checkpoint(d), lambda n: f'{n/1e9:.2f} GB'
        torch.cuda.empty_cache(); torch.cuda.set_per_process_memory_fraction(a.vram*1e9/torch.cuda.get_device_properties(0).total_memory)
        b = layer_bytes(ck, 'model.layers.3', torch.bfloat16)
        budget = int(a.vram*1e9) - 11*10**9                                    # what is left beside the activations of 16,384 tokens
        print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}; process held to {a.vram} GB of VRAM; one DeepSeek-V3 MoE layer in {a.format}: experts {gb(b.packed)} packed, {gb(b.experts)} in bfloat16, the rest {gb(b.rest)}; budget {gb(budget)}: experts stay {place_experts(b, budget)!r}')
        stages, model, dev = Stages(), empty_model(ck), 'cuda'
        layer = model.model.layers[3]; model.config._attn_implementation = 'padded_sdpa'; model.model.rotary_emb.to(dev)
        with torch.no_grad():
            for k in range(2):                                                  # the second time is the one that counts: kernels are compiled, pages are cached
                stages.clear(); stages(None)
                load_layer(ck, layer, 'model.layers.3', torch.bfloat16, dev, budget); stages('load')
                torch.manual_seed(k)
                h = torch.randn(16384, 7168, dtype=torch.bfloat16, device=dev); stages(None)
                h = torch.cat([attend(layer, x, [2048]*2, model.model.rotary_emb) for x in h.split(4096)]); x = layer.post_attention_layernorm(h); stages('attention')
                p = route(layer.mlp, x); stages('route')
                act = expert_hidden(layer.mlp.experts, x, p); stages('unpack and gate, up')
                f = grouped_linear(act, layer.mlp.experts.down_proj, p.counts); stages('unpack and down')
                stats = LayerStats(256, 2048, dev); stats.update(layer.mlp.experts, act, f, p, 8); stages('statistics')
                out = h + combine(f, p, len(x)) + layer.mlp.shared_experts(x); stages('combine and shared')
                assert out.isfinite().all() and stats.counts.sum()==16384*8
                del act, f, p, x, h, out; free(layer)
        for k,(s,v) in stages.items(): print(f'  {k:<22} {s:8.3f} s {v/1e9:8.2f} GB peak VRAM')
        total, peak = sum(s for s,_ in stages.values()), max(v for _,v in stages.values())
        print(f'  {"in all":<22} {total:8.3f} s {peak/1e9:8.2f} GB; 58 such layers: {58*total:.0f} s for 16,384 tokens, of them {58*stages["load"][0]:.0f} s to load from the page cache')

def write_lite(folder):
    folder.mkdir(parents=True, exist_ok=True); n = LITE['num_hidden_layers']; where, torch_seed = {}, torch.manual_seed(0)
    ends = {'model.embed_tokens.weight': (102400, 2048), 'model.norm.weight': (2048,), 'lm_head.weight': (102400, 2048)}
    for i,shapes in enumerate([ends, *(layer_state(LITE, i) for i in range(n))]):
        name = f'model-{i+1:05}-of-{n+1:05}.safetensors'
        save_file({m:t for k,s in shapes.items() for m,t in draw(k, s).items()}, folder/name); where |= dict.fromkeys(shapes, name)
    for f in resolve_source('demo').iterdir():
        if f.name.startswith(('tokenizer', 'chat_template', 'generation_config')): shutil.copy(f, folder)
    (folder/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=where))); (folder/'config.json').write_text(json.dumps(LITE))

def tree_bytes(d): return sum(f.stat().st_size for f in Path(d).rglob('*') if f.is_file())

def lite(a):
    from moe_fuse.pipeline import compress
    t = time.time(); folder = Path(a.folder); teacher = folder/'teacher'
    if not (teacher/'config.json').exists(): write_lite(teacher)
    ck = Checkpoint(teacher); info = inspect(ck); torch.cuda.empty_cache()
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}; DeepSeek-V2-Lite, {info["total"]/1e9:.3f} B parameters, {info["active"]/1e9:.3f} B active, {ck.nbytes/1e9:.2f} GB; written in {time.time()-t:.0f} s', flush=True)
    t = time.time()
    with PeakMemory() as m: r = compress(teacher, folder/'out', keep=a.keep, tokens=a.tokens, eval_tokens=a.eval_tokens, baselines=a.baselines.split(',') if a.baselines else (), device='cuda', **({'states': a.states} if a.states else {})).report
    print(f'moe-fuse run, keep {a.keep}, {a.tokens:,} + {a.eval_tokens:,} tokens, baselines {a.baselines or "none"}: {time.time()-t:.0f} s, {m}, OUT {tree_bytes(folder/"out")/1e9:.2f} GB')
    print('  ' + ', '.join(f'{k} {s:.0f} s' for k,s in sorted(r['seconds'].items(), key=lambda x: -x[1])))
    print('  FVU', {k: [round(list(f.values())[-1], 3) for f in v.values()][:3] for k,v in r['fvu'].items()}, 'student', f"{r['student']['total']/1e9:.3f} B parameters, {r['student']['active']/1e9:.3f} B active")

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('what', choices=('v3', 'lite')); p.add_argument('folder', nargs='?')
p.add_argument('--format', default='awq', choices=('awq', 'fp8')); p.add_argument('--vram', type=float, default=24, help='GB')
p.add_argument('--tokens', type=int, default=65536); p.add_argument('--eval-tokens', type=int, default=8192); p.add_argument('--keep', type=float, default=.25); p.add_argument('--baselines', default='reap,mean'); p.add_argument('--states')
a = p.parse_args()
if not torch.cuda.is_available(): sys.exit('this benchmark needs a GPU')
(v3 if a.what=='v3' else lite)(a)
