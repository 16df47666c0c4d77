"A checkpoint written in 8 or 4 bits is what its readers take it for, and scaling by columns changes nothing but the rounding."
import json, warnings
import pytest, torch
from hypothesis import given, settings, strategies as st
from moe_fuse.awq_loading import *
from moe_fuse.evaluation import logits_of
from moe_fuse.calibration import TokenSet
from moe_fuse.headers import *
from moe_fuse.quantized_checkpoint import *
import test_families
from tiny_models import *

def tokens(): return TokenSet([('a', torch.randint(5, 2000, (n,), generator=torch.Generator().manual_seed(n)).tolist()) for n in (40, 9, 23)])

@pytest.mark.parametrize('base', [V2, V3], ids=['v2', 'v3'])
@pytest.mark.parametrize('how', ['fp8', 'awq'])
def test_written_weights_are_the_rounded_ones(base, how, tmp_path):
    "Read back tensor by tensor, and as a model against `transformers` with the rounded floats; AWQ also by AutoAWQ's own code"
    config, state = tiny(base)
    ck = quantize_checkpoint(write(tmp_path/'in', config, state), tmp_path/'out', how, 16)
    want = {}
    for k,v in state.items():
        packed = '_proj' in k and v.dim()==2
        want[k] = (dequantize_fp8(*quantize_fp8(v)) if how=='fp8' else dequantize_awq(*quantize_awq(v, 16))) if packed else v
        assert torch.equal(ck.weight(k), want[k]), k
    if how=='awq':
        with warnings.catch_warnings(record=True):
            pytest.importorskip('awq', reason='autoawq is not installed; make set-up installs it')
            from awq.utils.packing_utils import dequantize_gemm
        for k in ck.entries:
            if k.endswith('.qweight'):
                q, z, s = (ck.stored(k.replace('qweight', p)) for p in ('qweight', 'qzeros', 'scales'))
                assert torch.equal(dequantize_gemm(q, z, s, 4, 16).T, want[k.replace('.qweight', '.weight')].half()), k
    t, model = tokens(), stock(write(tmp_path/'floats', config, want))
    with torch.no_grad(): ref = torch.cat([model(s[None]).logits[0] for s in t.ids.split(t.lengths)])
    assert (logits_of(ck, t)(0, len(t))-ref).abs().max() <= 1e-4*ref.abs().max()       # two ways to sum in float32

@settings(max_examples=20, deadline=None)
@given(st.sampled_from([8, 16, 64]), st.integers(1, 3), st.floats(0, 3), st.integers(0, 2**31-1))
def test_scales_never_lose_on_what_they_minimise(g, n, spread, seed):
    torch.manual_seed(seed)
    w, m = torch.randn(24, g*n)*.1, torch.exp(spread*torch.randn(g*n))
    loss = lambda s: ((dequantize_awq(*quantize_awq(w*s, g))/s - w).square()@m).sum()
    s = awq_scales([w], m, g)
    assert s.isfinite().all() and (s>0).all() and loss(s) <= loss(torch.ones(g*n))*(1+1e-6)

def test_scaled_pairs_are_the_same_function():
    "Without rounding, up rows divided and down columns multiplied give the expert's own output; the router and all else are untouched"
    config, state = tiny(V3)
    down = 'model.layers.1.mlp.experts.3.down_proj.weight'; up = down.replace('down', 'up')
    m = torch.rand(32)*10
    a = quantize_tensors(state, 'awq', 16, {(up, down): m})
    s = awq_scales([state[down]], m, 16)
    for k,want in ((down, state[down]*s), (up, state[up]/s[:,None])):
        for p,t in zip(('qweight', 'qzeros', 'scales'), quantize_awq(want, 16)): assert torch.equal(a[k.replace('weight', p)], t)
    plain = quantize_tensors(state, 'awq', 16)
    assert [k for k in plain if not torch.equal(plain[k], a[k]) and down[:-len('down_proj.weight')] not in k]==[]
    h = torch.randn(5, 32, dtype=torch.float64)
    assert torch.allclose((h/s)@(state[down]*s).double().T, h@state[down].double().T, rtol=1e-5, atol=1e-6)

def test_mixtral_whose_matrices_have_other_names(tmp_path):
    "w1, w2 and w3 of each expert are packed, the router is not, and `hidden_moments` finds them"
    config, disk = test_families.tiny('mixtral')
    src = write(tmp_path/'in', config, disk)
    moments = hidden_moments(Checkpoint(src), tokens())
    ck = quantize_checkpoint(src, tmp_path/'out', 'awq', 8, moments)
    experts = [k for k in disk if '.experts.' in k]
    assert experts and all(ck.parts(k)[0].endswith('.qweight') for k in experts)
    assert all(ck.parts(k)==[k] for k in disk if k.endswith('gate.weight') or 'norm' in k)
    rounded = lambda w: dequantize_awq(*quantize_awq(w, 8))
    for (up, down), m in moments.items():
        assert up.endswith('w3.weight') and down.endswith('w2.weight')
        scale, gate = awq_scales([disk[down]], m, 8), up.replace('w3', 'w1')
        assert torch.equal(ck.weight(down), rounded(disk[down]*scale)) and torch.equal(ck.weight(up), rounded(disk[up]/scale[:,None]))
        assert torch.equal(ck.weight(gate), rounded(disk[gate]))

def test_interrupted_leaves_nothing(tmp_path, monkeypatch):
    import moe_fuse.quantized_checkpoint as m
    src = write(tmp_path/'in', *tiny(V3))
    calls = []
    def fail(*a, **kw):
        calls.append(1)
        if len(calls)==3: raise KeyboardInterrupt
        return quantize_tensors(*a, **kw)
    monkeypatch.setattr(m, 'quantize_tensors', fail)
    with pytest.raises(KeyboardInterrupt): quantize_checkpoint(src, tmp_path/'new'/'out', 'fp8')
    assert sorted(p.name for p in tmp_path.iterdir())==['in']

def test_a_packed_source_is_packed_again(tmp_path):
    config, disk, back = pack(*tiny(V3), 'awq')
    ck = quantize_checkpoint(write(tmp_path/'in', config, disk), tmp_path/'out', 'fp8')
    assert json.loads((tmp_path/'out/config.json').read_text())['quantization_config']['quant_method']=='fp8'
    k = 'model.layers.2.mlp.experts.0.gate_proj.weight'
    assert torch.equal(ck.weight(k), dequantize_fp8(*quantize_fp8(back[k].bfloat16())))

# scales through norms

FAMILY = [f for f in test_families.CONFIGS if FAMILIES[f].matrices]

def of_family(family): return test_families.tiny(family, **(dict(n_routed_experts=24, num_hidden_layers=2) if family=='kimi_k2' else {}))

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('family', FAMILY)
def test_what_reads_a_norm_is_scaled_and_the_router_sees_nothing_of_it(family, dtype):
    "Every weight that meets the norm's output is multiplied by what the norm is divided by; logits of router and gate are the same bit for bit"
    config, state = of_family(family)
    state = {k: v if k.endswith('e_score_correction_bias') else v.to(dtype) for k,v in state.items()}
    block, layers = FAMILIES[family].block, range(config['num_hidden_layers'])
    g = torch.Generator().manual_seed(1)
    readers = {k: v for i in layers for k,v in norm_readers(list(state), i, block).items()}
    for k,fed in readers.items():                                              # by shape: all that take H inputs, but for o, the second latents and down, which other weights feed
        p = k.replace('input_layernorm.weight', 'self_attn.').replace('post_attention_layernorm.weight', f'{block}.')
        assert fed==[n for n in state if n.startswith(p) and state[n].dim()==2 and not any(x in n for x in ('o_proj', 'q_b_proj', 'kv_b_proj', 'down_proj', 'w2'))] and fed
    out = quantize_tensors(state, 'awq', 8, {(k, *fed): torch.exp(4*torch.randn(48, generator=g)) for k,fed in readers.items()})
    x, moved = torch.randn(200, 48, generator=g).to(dtype), 0
    for k,fed in readers.items():
        s = state[k].float()/out[k].float()
        assert out[k].dtype==dtype and torch.equal(s, s.log2().round().exp2())
        moved += int((s!=1).sum())
        for n in fed:
            if n in out:                                                       # not packed: router, gate
                assert out[n].dtype==dtype and ('gate.weight' in n or 'router' in n)
                assert torch.equal(torch.nn.functional.linear((x*out[k]).float(), out[n].float()), torch.nn.functional.linear((x*state[k]).float(), state[n].float()))
            else:
                for part,t in zip(('qweight', 'qzeros', 'scales'), quantize_awq(state[n].float()*s, 8)): assert torch.equal(out[n.replace('weight', part)], t)
    assert moved>48

@pytest.mark.parametrize('family', ['qwen2_moe', 'mixtral', 'deepseek_v2'])
def test_norm_moments_are_those_of_the_stock_model(family, tmp_path):
    "The inputs that the first attention projection and the router of `transformers` see, sequence by sequence"
    config, state = of_family(family)
    t, folder = tokens(), write(tmp_path/'t', config, state)
    model, seen = stock(folder), {}
    def add(name):
        def hook(m, args, out): seen[name] = seen.get(name, 0) + out.double().square().flatten(0, -2).sum(0)
        return hook
    for k,m in model.named_modules():
        if k.endswith(('input_layernorm', 'post_attention_layernorm')): m.register_forward_hook(add(k+'.weight'))
    with torch.no_grad():
        for s in t.ids.split(t.lengths): model(s[None])
    got = norm_moments(Checkpoint(folder), t)
    assert {k[0] for k in got}==set(seen)
    for (k,*fed),m in got.items(): assert torch.allclose(m.double(), seen[k]/len(t), rtol=1e-4), k

def test_gpt_oss_keeps_its_second_norm(tmp_path):
    got = norm_moments(Checkpoint(write(tmp_path/'t', *test_families.tiny('gpt_oss'))), tokens())
    assert {k[0].split('.')[3] for k in got}=={'input_layernorm'}

def test_planted_outliers_are_scaled_away(tmp_path):
    "A model whose norms put out a few channels 64 times as large, and whose weights make up for it, is the same function; rounding hurts it, scaled rounding less"
    config, state = tiny(V3)
    for i in range(3):
        for norm,fed in norm_readers(list(state), i).items():
            s = torch.ones(48); s[torch.arange(3)*16+i] = 64
            state[norm] = state[norm]*s
            for k in fed: state[k] = state[k]/s
    src, t = write(tmp_path/'in', config, state), tokens()
    want = logits_of(Checkpoint(src), t)(0, len(t))
    def error(name, m): return (logits_of(quantize_checkpoint(src, tmp_path/name, 'awq', 16, m), t)(0, len(t))-want).square().mean().item()
    nearest, scaled = error('a', None), error('b', norm_moments(Checkpoint(src), t))
    assert scaled < nearest/2
