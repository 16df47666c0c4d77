"A checkpoint written in 8 or 4 bits is what its readers take it for, and scaling by columns changes nothing but the rounding."
import json, warnings
import pytest, torch
from hypothesis import given, settings, strategies as st
from moe_fuse.awq_loading import *
from moe_fuse.evaluation import logits_of
from moe_fuse.calibration import TokenSet
from moe_fuse.headers import *
from moe_fuse.quantized_checkpoint import *
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
    import test_families
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
