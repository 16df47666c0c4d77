"Packed layers are their unpacked selves to the bit, in every type and shape, and DoRA over them is peft's."
import copy, warnings
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F
from moe_fuse.awq_loading import *
from moe_fuse.headers import *
from moe_fuse.quantized_linear import *
from moe_fuse import quantized_linear
from tiny_models import *

seeds, types = st.integers(0, 2**31-1), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
leading = st.sampled_from([(), (1,), (4,), (2,3), (0,), (2,1,3)])
def randn(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def rel(a, b): return ((a.double()-b.double()).norm() / b.double().norm()).item()

fp8s = st.builds(lambda o, i, block, bias, seed: FP8Linear.from_weight(randn(seed, o, i), block, randn(seed, o) if bias else None),
                 st.integers(1,150), st.integers(1,150), st.sampled_from([(128,128), (32,16), (1,64), (7,5), (200,1)]), st.booleans(), seeds)
awqs = st.builds(lambda words, g, n, bias, seed: AWQLinear.from_weight(randn(seed, 8*words, abs(g)*n), g if n>1 else -1, randn(seed, 8*words) if bias else None),
                 st.integers(1,9), st.sampled_from([32, 64, 128]), st.integers(1,3), st.booleans(), seeds)
layers = st.one_of(fp8s, awqs)
BASES = {'fp8': lambda w, b=None: FP8Linear.from_weight(w, (32,16), b), 'awq': lambda w, b=None: AWQLinear.from_weight(w, 32, b)}

def plain(w, bias=None):
    lin = nn.utils.skip_init(nn.Linear, *reversed(w.shape), bias=bias is not None, dtype=w.dtype)
    lin.load_state_dict(dict(weight=w) | ({} if bias is None else dict(bias=bias)))
    return lin
BASES['plain'] = plain

# packed layers

@settings(max_examples=60, deadline=None)
@given(layers, leading, types, seeds)
def test_a_packed_layer_is_the_unpacked_one(layer, lead, dtype, seed):
    "Forward and the gradient to the input, to the bit"
    x = randn(seed, *lead, layer.in_features).to(dtype).requires_grad_()
    w, b = layer.dequantize(dtype), None if layer.bias is None else layer.bias.to(dtype)
    y, want = layer(x), F.linear(x, w, b)
    g = randn(seed+1, *want.shape).to(dtype)
    assert y.dtype==dtype and torch.equal(y, want)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], g@w)
    with torch.no_grad(): assert torch.equal(layer(x), want) and not layer(x).requires_grad

@pytest.mark.parametrize('kind', ['fp8', 'awq'])
def test_rows_by_blocks_are_the_whole(kind, monkeypatch):
    "Blocks smaller than the weight, with a ragged last one"
    w = randn(0, 200, 96)
    layer = BASES[kind](w)
    whole = dequantize_fp8(layer.weight, layer.weight_scale_inv, (32,16)) if kind=='fp8' else dequantize_awq(layer.qweight, layer.qzeros, layer.scales)
    monkeypatch.setattr(quantized_linear, 'CHUNK', 96*40)
    assert len([*row_blocks(layer)])>4
    assert torch.equal(layer.dequantize(), whole)

@pytest.mark.parametrize('kind', ['fp8', 'awq'])
def test_gradients_of_first_and_second_order(kind):
    layer, x = BASES[kind](randn(0, 24, 64), randn(1, 24)), randn(2, 3, 64).double().requires_grad_()
    f = lambda x: layer(x).sin()
    assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(f, x)

@pytest.mark.parametrize('kind', ['fp8', 'awq'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_casts_as_linear_does(kind, dtype):
    w, x = randn(0, 24, 64), randn(1, 5, 64).to(dtype)
    layer = BASES[kind](w, randn(2, 24))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        y, want = layer(a), F.linear(b, layer.dequantize(torch.float32 if dtype!=torch.float64 else dtype), layer.bias.to(dtype))
    y.float().sin().sum().backward(); want.float().sin().sum().backward()
    assert y.dtype==want.dtype and torch.equal(y, want) and torch.equal(a.grad, b.grad)

@pytest.mark.parametrize('kind', ['fp8', 'awq'])
def test_conversions_move_and_never_convert(kind):
    layer = BASES[kind](randn(0, 24, 64), randn(1, 24))
    whole = nn.ModuleDict(dict(a=layer, b=nn.Linear(2, 2)))
    before = {k: v.clone() for k,v in layer.state_dict().items()}
    for f in (whole.half, whole.bfloat16, whole.double, lambda: whole.to(torch.float16), lambda: whole.to('cpu', torch.bfloat16)): f()
    assert whole['b'].weight.dtype==torch.bfloat16
    for k,v in layer.state_dict().items(): assert v.dtype==before[k].dtype and torch.equal(v.view(torch.uint8), before[k].view(torch.uint8))
    meta = copy.deepcopy(layer).half().to('meta')
    assert {k: (v.dtype, v.device.type) for k,v in meta.state_dict().items()}=={k: (v.dtype, 'meta') for k,v in before.items()}

@pytest.mark.parametrize('kind', ['fp8', 'awq'])
def test_a_saved_layer_comes_back_and_a_float_one_is_refused(kind):
    one, two, x = BASES[kind](randn(0, 24, 64)), BASES[kind](randn(1, 24, 64)), randn(2, 3, 64)
    two.cache = True; assert not torch.equal(one(x), two(x))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x), two(x)), 'what was cached before is not used'
    assert torch.equal(copy.deepcopy(two)(x), one(x))
    for assign in (False, True):
        floats = {k: v.float() for k,v in one.state_dict().items()}
        with pytest.raises(ValueError, match='is torch.float32, the layer holds'): two.load_state_dict(floats, assign=assign)

@pytest.mark.parametrize('kind', ['fp8', 'awq'])
def test_cache_keeps_one_unpacked_weight_and_changes_nothing(kind):
    layer, x = BASES[kind](randn(0, 24, 64)), randn(1, 3, 64)
    kept = copy.deepcopy(layer); kept.cache = True
    for d in (torch.float32, torch.bfloat16, torch.float32):
        assert torch.equal(kept(x.to(d)), layer(x.to(d)))
        w = kept.kept
        kept(x.to(d)); assert kept.kept is w and w.dtype==d
    assert 'kept' not in kept.state_dict() and layer.kept is None

def test_backward_refuses_a_weight_changed_since_forward():
    layer, x = BASES['fp8'](randn(0, 24, 64)), randn(1, 3, 64).requires_grad_()
    y = layer(x).sum()
    layer.weight_scale_inv.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): y.backward()

def test_between_forward_and_backward_no_unpacked_weight_is_kept():
    saved, layer, x = [], BASES['awq'](randn(0, 64, 256)), randn(1, 3, 256).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t): layer(x).sum()
    assert sum(t.nbytes for t in saved)==sum(t.nbytes for t in layer.buffers())

def test_no_parameter_no_gradient():
    for layer in (BASES['fp8'](randn(0, 24, 64)), BASES['awq'](randn(0, 24, 64))): assert not [*layer.parameters()] and not layer(randn(1, 64)).requires_grad

@settings(max_examples=30, deadline=None)
@given(fp8s, leading, types, seeds)
def test_fp8_input_is_the_layer_of_the_rounded_input(layer, lead, dtype, seed):
    x = randn(seed, *lead, layer.in_features).to(dtype).requires_grad_()
    both = FP8Linear(layer.weight, layer.weight_scale_inv, layer.bias, layer.block, fp8_input=True)
    y = both(x)
    assert y.shape==(*lead, layer.out_features) and y.dtype==dtype
    if x.numel():
        flat = x.detach().view(-1, layer.in_features)
        assert torch.equal(y, layer(dequantize_fp8(*quantize_fp8(flat, (1,128)), (1,128)).view(x.shape).to(dtype)))
    g = torch.ones_like(y)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(layer(x), x, g)[0])

def test_fp8_input_of_zero_tokens_and_of_a_nan():
    layer = FP8Linear.from_weight(randn(0, 8, 300), fp8_input=True)
    x = randn(1, 3, 300); x[0] = 0; x[1,5] = float('nan')
    y = layer(x)
    assert (y[0]==0).all() and y[1].isnan().all() and y[2].isfinite().all()

def test_the_cores_are_not_asked_for_on_a_cpu(): assert not on_fp8_cores(randn(0, 4, 512), FP8Linear.from_weight(randn(0, 128, 512)))

bad = {'weight is torch.float16': lambda: FP8Linear(torch.ones(4,4).half(), torch.ones(1,1)), r'weight is torch.float8_e4m3fn \[4\]': lambda: FP8Linear(torch.ones(4).to(torch.float8_e4m3fn), torch.ones(1,1)),
       r'scales \[2, 1\] do not fit': lambda: FP8Linear(torch.ones(4,4).to(torch.float8_e4m3fn), torch.ones(2,1)), r'block \[0, 128\]': lambda: FP8Linear(torch.ones(4,4).to(torch.float8_e4m3fn), torch.ones(1,1), block=(0,128)),
       r'bias \[5\] does not fit 4 outputs': lambda: FP8Linear.from_weight(torch.ones(4,4), bias=torch.ones(5)), 'group_size 48': lambda: AWQLinear.from_weight(torch.ones(8,64), 48),
       '12 columns do not divide by 8': lambda: AWQLinear.from_weight(torch.ones(12,64), 32), 'AWQ shapes do not fit': lambda: AWQLinear(*quantize_awq(torch.ones(8,64), 32)[:2], torch.ones(1,8).half()),
       'qzeros is torch.int64': lambda: AWQLinear((q := quantize_awq(torch.ones(8,64), 32))[0], q[1].long(), q[2]),
       'input is torch.int32': lambda: BASES['awq'](torch.ones(8,64))(torch.ones(1,64).int()), 'input is torch.float8_e4m3fn': lambda: BASES['fp8'](torch.ones(8,64))(torch.ones(1,64).to(torch.float8_e4m3fn)),
       'r is 0': lambda: DoRALinear(BASES['fp8'](torch.ones(8,64)), 0, 1), 'r is -1': lambda: DoRALinear(BASES['fp8'](torch.ones(8,64)), -1, 1), 'r is 1.5': lambda: DoRALinear(BASES['fp8'](torch.ones(8,64)), 1.5, 1),
       'base is Conv1d': lambda: DoRALinear(nn.Conv1d(2,2,1), 1, 1), 'base is Linear': lambda: DoRALinear(plain(torch.ones(8,8).to(torch.float8_e4m3fn)), 1, 1)}
@pytest.mark.parametrize('message', bad)
def test_refused_by_name(message):
    with pytest.raises(ValueError, match=message): bad[message]()

def test_a_layer_of_autoawq_is_taken_as_it_is():
    "autoawq multiplies in float16: the weight is its weight rounded to float16"
    with warnings.catch_warnings(record=True):
        pytest.importorskip('awq', reason='autoawq is not installed; make set-up installs it')
        from awq.modules.linear.gemm import WQLinear_GEMM
        from awq.utils.packing_utils import dequantize_gemm
    theirs = WQLinear_GEMM(4, 32, 64, 24, True, 'cpu')
    theirs.qweight, theirs.qzeros, theirs.scales = quantize_awq(randn(0, 24, 64), 32)
    ours = AWQLinear(theirs.qweight, theirs.qzeros, theirs.scales, theirs.bias)
    assert torch.equal(ours.dequantize(torch.float16).T, dequantize_gemm(theirs.qweight, theirs.qzeros, theirs.scales, 4, 32))
    ours.load_state_dict(theirs.state_dict())

# from a checkpoint

@pytest.mark.parametrize('how', ['awq', 'fp8', 'mixed', 'bfloat16'])
def test_a_layer_of_packed_linears_is_the_layer_unpacked(how, tmp_path):
    config, state = tiny(V3)
    config, disk, _ = pack(config, state, how)
    ck = Checkpoint(write(tmp_path, config, disk))
    model = empty_model(ck)
    layer = load_module(ck, model.model.layers[1], 'model.layers.1')
    names = [k for k,m in layer.named_modules() if isinstance(m, nn.Linear)]
    h, pos = randn(0, 2, 9, config['hidden_size']), torch.arange(9)[None]
    run = lambda: layer(h, attention_mask=None, position_embeddings=model.model.rotary_emb(h, pos), position_ids=pos)
    want = run()
    replace_linears(ck, layer, 'model.layers.1')
    replaced = [k for k in names if isinstance(layer.get_submodule(k), PackedLinear)]
    assert replaced==[k for k in names if f'model.layers.1.{k}.qweight' in ck or f'model.layers.1.{k}.weight_scale_inv' in ck] and bool(replaced)==(how in ('awq', 'fp8'))  # mixed: routed experts only
    assert torch.equal(run(), want)

def test_a_damaged_packed_tensor_is_named(tmp_path):
    config, state = tiny(V3)
    config, disk, _ = pack(config, state, 'fp8')
    name = next(k for k in disk if k.endswith('o_proj.weight_scale_inv'))
    for bad,message in ((torch.full_like(disk[name], float('nan')), 'NaN or Inf'), (torch.ones(99, 99), 'do not fit')):
        ck = Checkpoint(write(tmp_path/message[:2], config, disk | {name: bad}))
        with pytest.raises(BadInput, match=f'self_attn.o_proj.*{message}'): packed_linear(ck, name.removesuffix('.weight_scale_inv'))

# DoRA

@settings(max_examples=40, deadline=None)
@given(st.sampled_from([*BASES]), st.sampled_from([1, 2, 7, 40, 80]), st.sampled_from([.5, 8, 16]), st.booleans(), leading, types, seeds)
def test_dora_is_the_formula_with_everything_formed(kind, r, alpha, bias, lead, dtype, seed):
    "y = m / ||W + sBA|| (W + sBA) x + b, the norm a constant in the gradient; ours multiplies in `dtype`, the formula in float64"
    torch.manual_seed(seed)
    base = BASES[kind](randn(seed, 24, 64), randn(seed, 24) if bias else None)
    dora = DoRALinear(base, r, alpha)
    for p in dora.parameters():
        if p.requires_grad: p.data += torch.randn_like(p)/9
    w = (base.weight if kind=='plain' else base.dequantize()).detach().double()
    x, g = randn(seed+1, *lead, 64).to(dtype).requires_grad_(), randn(seed+2, *lead, 24).to(dtype)
    norm = (w + alpha/r * dora.lora_B.detach().double()@dora.lora_A.detach().double()).norm(dim=1)
    def formula(f): # the output and the four gradients of the formula in float64, `f` of every number in it
        x_, a, b, m = (f(p.detach().double()).requires_grad_() for p in (x, dora.lora_A, dora.lora_B, dora.magnitude))
        y = F.linear(x_, f(w) + alpha/r * b@a) * (m/norm) + (0 if base.bias is None else f(base.bias.double()))
        y.backward(f(g.double()))
        return y, x_.grad, a.grad, b.grad, m.grad
    y = dora(x)
    assert y.shape==g.shape and y.dtype==dtype
    if not x.numel(): return
    y.backward(g)
    eps = 2*torch.finfo(dtype).eps + 2**-20                                            # inputs, weights, adapter and sums are rounded to half an eps; norms are float32
    ours = y, x.grad, dora.lora_A.grad, dora.lora_B.grad, dora.magnitude.grad
    for got,ref,size in zip(ours, formula(lambda t: t.clone()), formula(torch.abs)): assert (got.double()-ref).norm() < eps*size.norm()   # `size` sums magnitudes: what cancels still rounds

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.sampled_from([1, 8, 33]), st.booleans(), seeds)
def test_dora_over_a_plain_layer_is_pefts(r, alpha, bias, seed):
    peft = pytest.importorskip('peft')
    torch.manual_seed(seed)
    lin = nn.Linear(40, 24, bias=bias)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(lin)), peft.LoraConfig(r=r, lora_alpha=alpha, use_dora=True, target_modules=['0'])).base_model.model[0]
    ours = DoRALinear(lin, r, alpha)
    assert torch.allclose(ours.magnitude, theirs.lora_magnitude_vector.default.weight, rtol=1e-6)
    pairs = [(ours.lora_A, theirs.lora_A.default.weight), (ours.lora_B, theirs.lora_B.default.weight), (ours.magnitude, theirs.lora_magnitude_vector.default.weight)]
    for p,q in pairs: p.data = q.data = q.data + torch.randn_like(q)/9
    x1, x2 = (randn(seed, 2, 3, 40).requires_grad_() for _ in range(2))
    y1, y2 = ours(x1), theirs(x2)
    y1.sin().sum().backward(); y2.sin().sum().backward()
    for got,ref in ((y1, y2), (x1.grad, x2.grad), *((p.grad, q.grad) for p,q in pairs)): assert rel(got, ref) < 1e-5  # some 100 float32 steps either way

@pytest.mark.parametrize('kind', BASES)
def test_dora_starts_as_its_base(kind):
    base, x = BASES[kind](randn(0, 24, 64)), randn(1, 2, 3, 64)
    want = base(x).detach()
    assert torch.equal(DoRALinear(base, 4, 8)(x), want) and not any(p.requires_grad for p in base.parameters())
    base = BASES[kind](randn(0, 24, 64), randn(2, 24))
    assert torch.allclose(DoRALinear(base, 4, 8)(x), base(x), rtol=0, atol=base(x).abs().max().item()*2**-23)  # the bias is added after, one rounding

def test_rows_of_zeros_stay_zero_and_spoil_nothing():
    w = randn(0, 64, 64); w[:32] = 0
    dora, x = DoRALinear(FP8Linear.from_weight(w, (32,32)), 4, 8), randn(1, 5, 64).requires_grad_()
    y = dora(x)
    y.sin().sum().backward()
    assert (y[:,:32]==0).all() and all(t.grad.isfinite().all() for t in (x, *dora.parameters()))

@pytest.mark.parametrize('kind', BASES)
def test_under_autocast_norms_stay_float32(kind):
    torch.manual_seed(0)
    dora, x = DoRALinear(BASES[kind](randn(0, 24, 64)), 4, 8), randn(1, 5, 64)
    for p in dora.parameters():
        if p.requires_grad: p.data += torch.randn_like(p)/9
    norm, want, merged = dora.norm(), dora(x), merge_dora(dora, torch.float32).weight
    with torch.autocast('cpu', torch.bfloat16):
        y = dora(x)
        assert torch.equal(dora.norm(), norm) and torch.equal(merge_dora(dora, torch.float32).weight, merged)
    assert y.dtype==torch.bfloat16 and rel(y, want) < 2**-6                             # inputs, weights, adapter and sums are rounded to bfloat16: at most 2^-8 each

@pytest.mark.parametrize('kind', BASES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_merged_is_unmerged(kind, dtype):
    "In float32 up to a few roundings; in bfloat16 (8 bits) every weight moves by at most half a step, 2^-8 of itself"
    torch.manual_seed(0)
    dora, x = DoRALinear(BASES[kind](randn(0, 24, 64), randn(2, 24)), 4, 8), randn(1, 5, 64)
    for p in dora.parameters():
        if p.requires_grad: p.data += torch.randn_like(p)/9
    merged = merge_dora(dora, dtype)
    v = (dora.base.weight.detach() if kind=='plain' else dora.base.dequantize()).double() + 2*dora.lora_B.double()@dora.lora_A.double()
    exact = dora.magnitude.double()[:,None]*v/v.norm(dim=1, keepdim=True)
    assert merged.weight.dtype==dtype and not merged.weight.requires_grad
    assert ((merged.weight.double()-exact).abs() <= exact.abs()*(2**-8 if dtype==torch.bfloat16 else 0) + 2**-20*exact.abs().max()).all()
    assert rel(merged.float()(x), dora(x)) < (2**-8 if dtype==torch.bfloat16 else 2**-20)

def test_a_saved_adapter_comes_back_over_another_base_too():
    "Norms follow the base that was loaded"
    torch.manual_seed(0)
    one, two, x = DoRALinear(BASES['fp8'](randn(0, 24, 64)), 4, 8), DoRALinear(BASES['fp8'](randn(1, 24, 64)), 4, 8), randn(2, 5, 64)
    for p in one.parameters(): p.data += torch.randn_like(p)/9
    two.load_state_dict(load(save(one.state_dict())))
    assert torch.equal(two(x), one(x)) and set(one.state_dict())=={'lora_A', 'lora_B', 'magnitude', 'base.weight', 'base.weight_scale_inv'}

def test_an_adapter_stays_float32():
    dora = nn.Sequential(DoRALinear(BASES['fp8'](randn(0, 24, 64)), 4, 8)).bfloat16()[0]
    assert {t.dtype for t in (*dora.parameters(), dora.norm2)}=={torch.float32}
