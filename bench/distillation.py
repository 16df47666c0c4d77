"""What does a step of layer-wise distillation cost beside a plain forward and backward pass of the block that is replaced?

    python bench/distillation.py                      # 64 experts, 512 x 352, 6 a token, float32, 1,024 tokens
    python bench/distillation.py --width 2048 --expert 1408 --tokens 8192 --device cuda

A step is `distill`'s: the loss (FVU), its gradient, Adam on everything but the router. Beside it stands `transformers`' DeepSeek-V2 block with `grouped_mm`, forward and backward to all its weights, without a loss to
speak of and without an optimiser. The first row trains a block of that very size: what it takes more is the loss, Adam and our way through the experts. The others are students. Weights are random.
"""
import torch
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from measure import *
from moe_fuse.healing import distill
from moe_fuse.multiplex_lora import FusedMoE

a = arguments(__doc__, width=512, expert=352, experts=64, active=6, cores=8, rank=8, tokens=1024, steps=2, repeats=3).parse_args()
torch.manual_seed(0); torch.set_grad_enabled(False)

def block(expert, n_shared): # a stock block; a slim one is narrower, with as large a shared expert
    c = DeepseekV2Config(n_routed_experts=a.experts, num_experts_per_tok=a.active, hidden_size=a.width, moe_intermediate_size=expert, n_shared_experts=n_shared, n_group=1, topk_group=1, topk_method='greedy', num_attention_heads=16)
    c._experts_implementation = 'grouped_mm'
    with torch.device(a.device): moe = DeepseekV2Moe(c)
    for v in moe.parameters(): v.normal_(std=v.shape[-1]**-.5)
    return moe

def flops(expert): return 3*a.tokens*6*a.width*(a.active*expert + 2*a.expert)    # forward, and twice that backward; router, loss and Adam are not in it

moe = block(a.expert, 2)
x = torch.randn(a.tokens, a.width, device=a.device); y = moe(x[None])[0]
fused = FusedMoE(moe, torch.arange(a.experts, device=a.device)%a.cores, moe.experts.gate_up_proj[:a.cores].clone(), moe.experts.down_proj[:a.cores].clone(), a.rank, 'multiplex_mixture')
plain = block(a.expert, 2).requires_grad_()

def stock():
    with torch.enable_grad(): plain(x[None]).square().sum().backward()
    plain.zero_grad()
def step(student): return lambda: distill(student, lambda s: (x, y), a.steps, lr=1e-6)

students = {'the same block': step(moe), 'slim, 25 %': step(block(a.expert//4, 8)), f'{a.cores} cores, multiplex_mixture of rank {a.rank}': step(fused)}
t = in_turns(dict(stock=stock) | students, a.repeats, a.device, warm=1)
top, _ = ceilings(a.device)
work = dict(zip(students, (flops(a.expert), flops(a.expert//4), None)))
rows = [row(f'distillation step, {k}', t[k]/a.steps, "transformers' forward and backward of the whole block", t['stock'], 'FLOPs', tokens=a.tokens, **dict(flops=work[k]) if work[k] else {}) for k in students]
rows += [row(f'distillation step, {k}', t[k]/a.steps, 'a matrix product of as many FLOPs', work[k]/top, 'FLOPs', ceiling=True, tokens=a.tokens, flops=work[k]) for k in students if work[k]]
give(a, rows)
