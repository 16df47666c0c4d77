"""How long does a DeepSeekMoE layer take beside a loop over its experts and beside `transformers`' block?

    python bench/moe_layer.py                                                   # float32 on the CPU
    python bench/moe_layer.py --device cuda --dtype bfloat16 --d_model 2048 --d_expert 1408 --tokens 8192 --step

Prints the best of 5 of each, and its ratio to ours. The layer is DeepSeek-V2's: softmax, greedy, two shared experts. `--step` adds the backward pass.
"""
import argparse, timeit

import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config

from measure import add_json, give, row
from moe_fuse.deepseek_moe import experts_loop, from_transformers

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for k,v in dict(d_model=512, d_expert=256, n_routed=64, top_k=6, tokens=2048, repeat=5).items(): p.add_argument(f'--{k}', type=int, default=v)
p.add_argument('--device', default='cpu'); add_json(p)
p.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
p.add_argument('--step', action='store_true', help='forward and backward')
a = p.parse_args()

torch.manual_seed(0)
cfg = DeepseekV2Config(hidden_size=a.d_model, moe_intermediate_size=a.d_expert, n_routed_experts=a.n_routed, num_experts_per_tok=a.top_k, n_shared_experts=2,
                       num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4, vocab_size=64)
block = AutoModelForCausalLM.from_config(cfg).model.layers[1].mlp.to(a.device, getattr(torch, a.dtype)).train()
for v in block.parameters(): torch.nn.init.normal_(v, std=a.d_model**-.5)
ours = from_transformers(block)
x = torch.randn(1, a.tokens, a.d_model, device=a.device, dtype=getattr(torch, a.dtype))

def loop(x):
    flat = x.flatten(0, 1)
    _, g, idx = ours.gate(flat)
    return (experts_loop(ours.experts, flat, idx, g) + ours.shared_experts(flat)).view(x.shape)

def theirs(kind):
    def f(x):
        block.experts.config._experts_implementation = kind
        return block(x)
    return f

def once(f):
    def run():
        with torch.set_grad_enabled(a.step): y = f(x)
        if a.step: y.sum().backward()
        if a.device!='cpu': torch.cuda.synchronize()
    return timeit.timeit(run, number=1)

ways = {'ours': lambda x: ours(x)[0], 'loop over experts': loop} | {f'transformers, {k}': theirs(k) for k in ('eager', 'grouped_mm')}
with torch.no_grad(): outs = {k: f(x).float() for k,f in ways.items()}
for f in ways.values(): once(f)                                                 # kernels chosen, buffers warm
rounds = [{k: once(f) for k,f in ways.items()} for _ in range(a.repeat)]        # in turns, so that a busy moment of the machine hits all of them
times = {k: min(r[k] for r in rounds) for k in ways}
print(f"{a.tokens} tokens, {a.n_routed} experts of {a.d_expert}, {a.top_k} a token, width {a.d_model}, {a.dtype}, {a.device}, {torch.get_num_threads()} threads, {'forward and backward' if a.step else 'forward'}")
for k,t in times.items():
    off = ((outs[k]-outs['ours']).abs().max()/outs['ours'].abs().max()).item()
    print(f"{k:<26} {t*1e3:10.2f} ms {t/times['ours']:6.2f} x ours, largest difference {off:.1e}")
if a.json: give(a, [row(f"layer of 10_deepseek_moe, {'forward and backward' if a.step else 'forward'}", times['ours'], k, t, 'FLOPs', tokens=a.tokens) for k,t in times.items() if k!='ours'])
