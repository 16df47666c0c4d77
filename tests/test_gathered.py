"The kernels of 04_gathered in Triton's interpreter: correct without a GPU."
import os, subprocess, sys
from pathlib import Path

import pytest

TRITON = Path(os.environ.get('TRITON_PATH', Path(sys.prefix)/'triton'))
SCRIPT = '''
import torch
from types import SimpleNamespace
from transformers.activations import ACT2FN
from moe_fuse.gathered import *
def formula(x, gate_up, down, ids, w, core=None, a_gate_up=None, b_gate=None, b_up=None, a_down=None, b_down=None, bias=None):
    out = torch.zeros_like(x)
    for t,(experts,shares) in enumerate(zip(ids.tolist(), w)):
        for e,p in zip(experts, shares):
            c = e if core is None else int(core[e])
            if c>=len(down): continue
            g, u = (gate_up[c]@x[t]).chunk(2)
            if a_gate_up is not None:
                zg, zu = (a_gate_up[e]@x[t]).chunk(2)
                g, u = g+b_gate[e]@zg, u+b_up[e]@zu
            if bias is not None: g, u = g+bias[e].chunk(2)[0], u+bias[e].chunk(2)[1]
            h = torch.nn.functional.silu(g)*u
            out[t] += p*(down[c]@h + (b_down[e]@(a_down[e]@h) if a_down is not None else 0))
    return out
with torch.no_grad(): # what `transformers` gives its experts between gate and up is known to the kernels
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert gathers(on_gpu, on_gpu, ACT2FN['silu']) and not gathers(on_gpu, on_gpu, ACT2FN['gelu'])
assert not gathers(on_gpu, on_gpu, ACT2FN['silu'])                              # a gradient is asked for
torch.manual_seed(0)
r = torch.randn
for t, n, k, h, i, e, rank, bias, bm in [(40,5,2,64,24,None,0,False,16), (1,7,3,96,48,3,4,True,32), (70,64,6,128,40,2,8,False,32), (3,1,1,64,16,1,0,True,16), (9,6,2,64,24,2,20,True,16), (33,3,3,96,16,None,0,False,32)]:
    w = r(e or n, 2*i, h)/h**.5, r(e or n, h, i)/i**.5
    more = dict(core=torch.randint(e, (n,))) if e else {}
    if rank: more |= dict(a_gate_up=r(n, 2*rank, h)/h**.5, b_gate=r(n, i, rank), b_up=r(n, i, rank), a_down=r(n, rank, i)/i**.5, b_down=r(n, h, rank))
    if bias: more['bias'] = r(n, 2*i)
    x, ids, shares = r(t, h), torch.rand(t, n).topk(k).indices, torch.rand(t, k)
    partial = e is None and k>1
    if partial: ids[::2,1] = n                                                  # nobody's
    got, want = gathered_experts(x, *w, ids, shares, partial=partial, tiles=2*(dict(bm=bm, bn=16, bk=64),), **more), formula(x, *w, ids, shares, **more)
    far = ((got-want).norm()/want.norm()).item()
    assert far<1e-6, (t, n, k, h, i, e, rank, bias, bm, far)

# fused blocks: their kernels against their own plain forward pass
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from moe_fuse.multiplex_lora import *
torch.set_grad_enabled(False)
c = DeepseekV2Config(n_routed_experts=12, num_experts_per_tok=4, hidden_size=64, moe_intermediate_size=24, n_shared_experts=1, n_group=1, topk_group=1, topk_method='greedy', num_attention_heads=4)
c._experts_implementation = 'grouped_mm'
moe, x = DeepseekV2Moe(c).eval(), r(40, 64)
for p in moe.parameters(): p.normal_(std=p.shape[-1]**-.5)
_, w, ids = moe.gate(x)
for mode,rank,groups in ('cores', 0, torch.arange(12)%3), ('exact', 4, torch.arange(12)%3), ('exact', 0, torch.zeros(12, dtype=torch.long)), ('cores', 0, torch.zeros(12, dtype=torch.long)):
    f = FusedMoE(moe, groups, moe.experts.gate_up_proj[:3].clone(), moe.experts.down_proj[:3].clone(), rank, mode)
    for k,v in f.named_parameters(recurse=False):
        if k[0] in 'b': v.normal_(std=.2)                                       # as if trained
    far = ((f.in_kernels(x, w, ids)-f.routed(x, w, ids)).norm()/f.routed(x, w, ids).norm()).item()
    assert far<1e-6, (mode, rank, far)

# the code that fused checkpoints carry has the kernels too
import importlib.util, tempfile
from pathlib import Path
from moe_fuse.fused_files import *
with tempfile.TemporaryDirectory() as d:
    (file := Path(d)/'modelling.py').write_text(modelling_source())
    spec = importlib.util.spec_from_file_location('modelling', file)
    carried = importlib.util.module_from_spec(spec); spec.loader.exec_module(carried)
    groups = torch.arange(12)%3
    f = carried.FusedMoE(moe, groups, moe.experts.gate_up_proj[:3].clone(), moe.experts.down_proj[:3].clone(), 4, 'exact')
    assert ((f.in_kernels(x, w, ids)-f.routed(x, w, ids)).norm()/f.routed(x, w, ids).norm()).item()<1e-6
'''

def test_kernels_are_the_formula_and_the_fused_blocks():
    if not TRITON.exists():
        assert not os.environ.get('CI'), f'no Triton in {TRITON}'
        pytest.skip('Triton is not installed: make test does that')
    env = os.environ | dict(TRITON_INTERPRET='1', PYTHONPATH=os.pathsep.join([str(TRITON), str(Path(__file__).parents[1])]))
    r = subprocess.run([sys.executable, '-c', SCRIPT], env=env, capture_output=True, text=True)
    assert r.returncode==0, r.stderr[-2000:]
