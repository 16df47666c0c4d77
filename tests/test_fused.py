"Fused layers are their formulas, token by token; they wait for nobody; and a fused model decodes, trains, saves and loads like any other."
import copy, json
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import DynamicOutputShapeException, DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from moe_fuse import multiplex_lora
from moe_fuse.awq_loading import *
from moe_fuse.checkpoint import CheckpointWriter, layer_tensors
from moe_fuse.expert_analysis import route
from moe_fuse.fused_model import *
from moe_fuse.grouped import *
from moe_fuse.headers import *
from moe_fuse.multiplex_lora import *
from moe_fuse.neuron_choice import *
from tiny_models import *

def stock_block(n=12, k=3, h=16, i=8, v3=False, seed=0, dtype=torch.float64):
    "A routed block of random weights"
    sizes = dict(n_routed_experts=n, num_experts_per_tok=k, hidden_size=h, moe_intermediate_size=i, n_shared_experts=1, n_group=1, topk_group=1, num_attention_heads=2)
    torch.manual_seed(seed)
    moe = DeepseekV3MoE(DeepseekV3Config(**sizes)) if v3 else DeepseekV2Moe(DeepseekV2Config(**sizes, topk_method='greedy'))
    for p in moe.parameters(): torch.nn.init.normal_(p, std=p.shape[-1]**-.5)
    return moe.to(dtype).requires_grad_(False)

def fused_block(mode, groups, e, width=8, rank=2, trained=True, **kw):
    "A fused block in which everything is as if trained"
    moe = stock_block(n=len(groups), **kw); h, w = moe.gate.weight.shape[1], moe.gate.weight
    f = FusedMoE(moe, groups, torch.randn(e, 2*width, h, dtype=w.dtype)/h**.5, torch.randn(e, h, width, dtype=w.dtype)/width**.5, rank, mode)
    for k,v in f.named_parameters(recurse=False):
        if trained and k not in ('gate_up_proj', 'down_proj'): torch.nn.init.normal_(v, std=.5)
    return f.requires_grad_(False)

def parts_of(f):
    "What `FusedMoE` takes of a stock block"
    block, experts = torch.nn.Module(), torch.nn.Module()
    experts.act_fn = f.act_fn
    block.gate, block.experts, block.shared_experts = f.gate, experts, f.shared_experts
    return block

class Shifted(torch.nn.Module):
    "A module that sees its input less a vector"
    def __init__(self, m, by): super().__init__(); self.m, self.by = m, by
    def forward(self, x): return self.m(x-self.by)

def formula(f, x):
    "The six modes as written down, one token, one core, one expert at a time"
    _, weights, indices = f.gate(x)
    out, r, g = f.shared_experts(x), f.rank, lambda k, i: getattr(f, k)[i]
    def lora(z, i, m=None): # gate, up
        ag, au = g('a_gate_up', i).chunk(2); mg, mu = (1, 1) if m is None else m.chunk(2)
        return torch.cat([g('b_gate', i)@(mg*(ag@z)), g('b_up', i)@(mu*(au@z))])
    def neurons(z): a, b = z.chunk(2); return F.silu(a)*b
    for t in range(len(x)):
        for e in f.groups[indices[t]].unique():
            mine = [(i, w) for i,w in zip(indices[t], weights[t]) if f.groups[i]==e]
            s, up, down, z = sum(w for _,w in mine), f.gate_up_proj[e], f.down_proj[e], x[t]
            if f.mode=='exact':
                for i,w in mine:
                    h = neurons(up@z + g('bias', i) + (lora(z, i) if r else 0))
                    out[t] += w*(down@h + (g('b_down', i)@(g('a_down', i)@h) if r else 0))
                continue
            if f.mode.startswith('multiplex'): z = z + sum(w/s*g('multiplex', i) for i,w in mine)
            d = 0
            if r and f.mode=='fused_lora': d = lora(z, e, sum(w/s*g('m_gate_up', i) for i,w in mine))
            elif r: d = sum(w/s*lora(z, i) for i,w in mine)
            h, dd = neurons(up@z + d), 0
            if r and f.mode=='fused_lora': dd = g('b_down', e)@(sum(w/s*g('m_down', i) for i,w in mine)*(g('a_down', e)@h))
            elif r: dd = sum(w/s*(g('b_down', i)@(g('a_down', i)@h)) for i,w in mine)
            out[t] += s*(down@h + dd)
    return out

def close(a, b, tol=1e-5): # the router computes in float32, whatever the rest does: 1e-6 is its rounding
    assert (a-b).abs().max() <= tol*b.abs().max(), f"{(a-b).abs().max()/b.abs().max():.2g}"

# the layer

@settings(max_examples=60, deadline=None)
@given(st.sampled_from(MODES), st.integers(1,12), st.integers(1,9), st.integers(1,4), st.integers(0,3), st.sampled_from([3,8]), st.booleans(), st.integers(0,2**31-1))
def test_layer_is_its_formula(mode, n, e, k, rank, width, v3, seed):
    "E that does not divide N, E = 1, cores without members, groups that fire as a whole, r = 0, narrow cores, widths that are no multiple of 8"
    k, n = min(k, n), max(n, 2) if v3 else n
    groups = torch.randint(e, (n,), generator=torch.Generator().manual_seed(seed))
    f = fused_block(mode, groups, e, width, min(rank, width), k=k, v3=v3, seed=seed)
    x = torch.randn(5, 16, dtype=torch.float64)
    close(f(x), formula(f, x), 1e-6)

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('groups,e', [([0]*12, 1), (list(range(12)), 12), ([j%5 for j in range(12)], 5), ([0]*11+[3], 4)])
def test_edges(mode, groups, e):
    "One core, a core for each, five that don't divide twelve, empty cores; all twelve experts fire"
    f = fused_block(mode, torch.tensor(groups), e, k=12)
    x = torch.randn(4, 16, dtype=torch.float64)
    close(f(x), formula(f, x), 1e-6)
    assert f(x[:0]).shape==(0, 16)
    for t in range(4): close(f(x[t:t+1]), f(x)[t:t+1], 1e-6)

@pytest.mark.parametrize('cores', [1, 5, 12])
@pytest.mark.parametrize('v3', [False, True])
def test_full_rank_is_the_teacher_and_so_is_a_core_for_each(cores, v3):
    moe, groups = stock_block(v3=v3, dtype=torch.float32), torch.arange(12)%cores
    x = torch.randn(50, 16)
    close(fuse_moe(moe, groups, torch.rand(12), rank=8)(x), moe(x[None])[0])
    if cores==12:
        for mode in MODES: close(fuse_moe(moe, torch.randperm(12), torch.ones(12), 2, mode)(x), moe(x[None])[0])
    moments = lambda i: (lambda a: a.T@a)(torch.randn(40, 16, generator=torch.Generator().manual_seed(i)))
    close(fuse_moe(moe, groups, torch.rand(12), 8, 'exact', moments, torch.eye(8))(x), moe(x[None])[0], 1e-4)   # the metric decides what is lost, and nothing is

@settings(max_examples=20, deadline=None)
@given(st.integers(0,2**31-1), st.integers(1,4))
def test_identities(seed, e):
    "What all members of a core have in common is part of the core"
    torch.manual_seed(seed)
    groups, x = torch.randint(e, (12,)), torch.randn(6, 16, dtype=torch.float64)
    for mode in 'mixture', 'exact', 'fused_lora':
        f = fused_block(mode, groups, e, seed=seed)
        if mode=='fused_lora':
            f.m_gate_up.fill_(1); f.m_down.fill_(1); first = torch.arange(e)
        else:
            first = torch.tensor([int((groups==c).nonzero()[0]) if (groups==c).any() else 0 for c in range(e)])
            for k in 'a_gate_up', 'b_gate', 'b_up', 'a_down', 'b_down': v = getattr(f, k); v.copy_(v[first[groups]])
        if mode=='exact': f.bias.zero_()
        ag, au = f.a_gate_up[first].chunk(2, 1)
        merged = FusedMoE(parts_of(f), groups, f.gate_up_proj + torch.cat([f.b_gate[first]@ag, f.b_up[first]@au], 1), f.down_proj + f.b_down[first]@f.a_down[first], mode='cores')
        close(f(x), merged(x), 1e-6)
    f = fused_block('multiplex', groups, e, seed=seed)
    f.multiplex.copy_(f.multiplex[:1].expand(12, -1))
    shift, plain = f.multiplex[0].clone(), copy.deepcopy(f)
    plain.mode, plain.gate, plain.shared_experts = 'cores', Shifted(f.gate, shift), Shifted(f.shared_experts, shift)
    close(f(x), plain(x+shift), 1e-6)

def test_tokens_and_ids_are_interchangeable():
    "Another order of the tokens gives the same rows, and so do experts renamed together with their cores; twice is the same to the last bit"
    for mode in MODES:
        f = fused_block(mode, torch.arange(12)%5, 5)
        x, order, ids = torch.randn(30, 16, dtype=torch.float64), torch.randperm(30), torch.randperm(12)
        assert torch.equal(f(x), f(x)); close(f(x[order]), f(x)[order], 1e-6)
        g = copy.deepcopy(f)
        for k,v in (g.state_dict() if mode!='fused_lora' else {k: v for k,v in g.state_dict().items() if k[:2] not in ('a_','b_')}).items():
            if len(v)==12: v.copy_(v[ids].clone())
        close(g(x), f(x), 1e-6)

@pytest.mark.parametrize('mode', MODES)
def test_an_expert_that_never_fires(mode):
    f = fused_block(mode, torch.arange(12)%5, 5, v3=True).requires_grad_()
    f.gate.e_score_correction_bias[7] = -1e9
    x = torch.randn(40, 16, dtype=torch.float64)
    assert 7 not in f.gate(x)[2]
    y = f(x); y.square().sum().backward()
    assert y.isfinite().all()
    for k,v in f.named_parameters(recurse=False):
        assert v.grad.isfinite().all()
        if len(v)==12: assert not v.grad[7].any() and v.grad[:7].any()

@pytest.mark.parametrize('mode', MODES)
def test_gradients(mode):
    "Of inputs, router weights and all parameters, against finite differences"
    f = fused_block(mode, torch.arange(12)%5, 5, width=3)
    x, names = torch.randn(3, 16, dtype=torch.float64), [k for k,_ in f.named_parameters(recurse=False)]
    _, w, ids = f.gate(x)
    def run(x, w, *v):
        f.gate.forward = lambda _: (None, w, ids)
        return torch.func.functional_call(f, dict(zip(names, v)), (x,))
    assert torch.autograd.gradcheck(run, [v.detach().clone().requires_grad_() for v in (x, w.double(), *(getattr(f, k) for k in names))], fast_mode=True)

class Poison(torch.autograd.Function):
    "NaN behind the last end, as uninitialised memory may be, in what comes out and in what comes back"
    @staticmethod
    def forward(ctx, v, ends): ctx.save_for_backward(ends); v = v.clone(); v[ends[-1]:] = float('nan'); return v
    @staticmethod
    def backward(ctx, g): (ends,) = ctx.saved_tensors; g = g.clone(); g[ends[-1]:] = float('nan'); return g, None

@pytest.mark.parametrize('mode', MODES)
def test_rows_that_nobody_computes_are_never_read(mode, monkeypatch):
    f, x = fused_block(mode, torch.arange(12)%2, 2).requires_grad_(), torch.randn(20, 16, dtype=torch.float64, requires_grad=True)
    def run(): y = f(x); return [y, *torch.autograd.grad(y.square().sum(), [x, *f.parameters()])]
    want = run()
    monkeypatch.setattr(multiplex_lora, 'grouped', lambda x, w, ends: Poison.apply(grouped(Poison.apply(x, ends), w, ends), ends))
    for a,b in zip(run(), want): assert torch.equal(a, b)

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0,5), min_size=1, max_size=6), st.integers(0,3), st.integers(1,20), st.integers(1,20), st.sampled_from([torch.float64, torch.bfloat16]))
def test_grouped_is_one_product_a_group(counts, behind, i, o, dtype):
    ends, p = torch.tensor(counts).cumsum(0).int(), sum(counts)
    x, w = torch.randn(p+behind, i, dtype=dtype), torch.randn(len(counts), o, i, dtype=dtype)
    got, want = grouped(x, w, ends)[:p], torch.cat([a.double()@b.double().T for a,b in zip(x[:p].split(counts), w)])
    assert got.dtype==dtype and ((got-want).abs() <= (2**-8 if dtype==torch.bfloat16 else 1e-12)*want.abs() + 1e-5).all()

@settings(max_examples=60, deadline=None)
@given(st.integers(1,9), st.integers(1,4), st.integers(1,6), st.integers(0,2**31-1))
def test_sorted_slots(t, k, n, seed):
    key = torch.randint(n+1, (t,k), generator=torch.Generator().manual_seed(seed))
    r = sort_slots(key, n)
    assert torch.equal(r.slot[r.row], torch.arange(t*k)) and r.ends.dtype==torch.int32
    assert r.ends.tolist()==[int((key<=g).sum()) for g in range(n)]
    assert r.slot.tolist()==sorted(range(t*k), key=lambda s: (key.flatten()[s], s))

# nobody waits

@pytest.mark.parametrize('mode', MODES)
def test_forward_reads_no_value(mode):
    "On tensors without values, whatever would ask a GPU for one raises"
    f, x = fused_block(mode, torch.arange(12)%5, 5, v3=True, dtype=torch.bfloat16), torch.randn(9, 16, dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert f(fake.from_tensor(x)).shape==x.shape

def test_what_reads_values_is_seen():
    "The check above can fail: sorting pairs for statistics does read them"
    moe, x = stock_block(v3=True), torch.randn(9, 16, dtype=torch.float64)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, pytest.raises((DynamicOutputShapeException, DataDependentOutputException)): route(moe, fake.from_tensor(x))

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_compiles_in_one_graph(mode, dtype):
    torch._dynamo.reset()
    f, x = fused_block(mode, torch.arange(12)%5, 5, dtype=dtype).requires_grad_(), torch.randn(9, 16, dtype=dtype)
    def run(m): y = m(x); return [y, *torch.autograd.grad(y.float().square().sum(), list(f.parameters()))]
    for a,b in zip(run(torch.compile(f, fullgraph=True, backend='aot_eager')), run(f)): close(a.float(), b.float(), 1e-4 if dtype==torch.float32 else .05)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('mode', MODES)
def test_no_host_synchronisation(mode):
    f, x = fused_block(mode, torch.arange(12)%5, 5, v3=True, dtype=torch.bfloat16).cuda(), torch.randn(9, 16, dtype=torch.bfloat16, device='cuda')
    with torch.no_grad(): f(x)
    torch.cuda.set_sync_debug_mode('error')
    try:
        with torch.no_grad(): f(x)
    finally: torch.cuda.set_sync_debug_mode('default')

# bad input

def test_bad_input():
    moe, g = stock_block(), torch.arange(12)%4
    up, down = torch.randn(4, 16, 16, dtype=torch.float64), torch.randn(4, 16, 8, dtype=torch.float64)
    for message,args in {"mode 'best' is none of cores, multiplex, fused_lora, mixture, multiplex_mixture, exact": (g, up, down, 2, 'best'), 'rank 9 is not in 0..8': (g, up, down, 9), 'rank -1': (g, up, down, -1),
                         r'gate_up \[4, 16, 16\] does not fit down \[4, 16, 7\]': (g, up, down[:,:,:7]), r'gate_up \[3, 16, 16\] does not fit down \[4, 16, 8\]': (g, up[:3], down),
                         r'11 experts of hidden size 16 behind a router \[12, 16\]': (g[:11], up, down), 'groups name cores 0..3, there are 3': (g, up[:3], down[:3]), 'groups name cores -1..2': (g-1, up, down)}.items():
        with pytest.raises(ValueError, match=message): FusedMoE(moe, *args)
    narrow = core_neurons(moe.experts, g, torch.rand(12, 8), 4)
    with pytest.raises(ValueError, match='cores of width 4 have no difference to experts of width 8'): fuse_moe(moe, g, torch.ones(12), 2, cores=narrow)
    assert fuse_moe(moe, g, torch.ones(12), 0, cores=narrow).down_proj.shape==(4, 16, 4)
    with pytest.raises(ValueError, match='core 3 of width 17: its 2 experts have 16 neurons'): core_neurons(moe.experts, torch.arange(11)%4, torch.rand(11, 8), 17)

def test_sizes_that_do_not_fit_are_refused():
    moe = stock_block()
    with pytest.raises(BadInput, match=r'usefulness \[12, 7\] of 12 experts with 8 neurons'): slim_moe(moe, torch.rand(12, 7), .5)
    for n,s in (13, 12), (6, 11):
        with pytest.raises(BadInput, match=f'{n} experts to keep by a saliency of {s}; there are 12'): pruned_moe(moe, torch.rand(s), n)
    for f in svd_lora, shared_lora:
        for r in 0, 6:
            with pytest.raises(BadInput, match=f'rank {r} is not in 1..5'): f(torch.randn(2, 5, 7), r)
    for dtype in torch.float32, torch.bfloat16:
        with pytest.raises(ValueError, match=r'rows of 7 do not fit matrices \[2, 3, 8\]'): grouped(torch.ones(4, 7, dtype=dtype), torch.ones(2, 3, 8, dtype=dtype), torch.tensor([2, 4], dtype=torch.int32))

@pytest.mark.parametrize('mode', ['fused_lora', 'mixture', 'exact'])
def test_a_moment_of_nothing_counts_all_inputs_alike(mode):
    "An expert that never fired has a second moment of zero"
    moe, g, x = stock_block(dtype=torch.float32), torch.arange(12)%4, torch.randn(20, 16)
    want = fuse_moe(moe, g, torch.ones(12), 2, mode)(x)
    assert torch.equal(fuse_moe(moe, g, torch.ones(12), 2, mode, torch.zeros(16, 16), torch.zeros(8, 8))(x), want)
    with pytest.raises(BadInput, match='second moment holds NaN'): fuse_moe(moe, g, torch.ones(12), 2, mode, torch.full((16, 16), torch.nan))

@pytest.mark.parametrize('sizes,message', [(dict(n_cores=0), '0 cores, they must be 1..16'), (dict(n_cores=17), '17 cores'), (dict(n_cores=4, core_width=0), 'core_width is 0')])
def test_configs_of_no_model_are_refused(sizes, message):
    with pytest.raises(BadInput, match=message): fused_config(tiny(V3, n_routed_experts=16)[0], **sizes)

# models

def fused_tiny(base, n=16, mode='exact', **kw):
    "A random fused model with groups that a config alone would not give"
    config, _ = tiny(base, n_routed_experts=n, **kw)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(fused_config(config, 5, 3, mode)).eval()
    for l in model.model.layers:
        if not isinstance(l.mlp, FusedMoE): continue
        l.mlp.groups.copy_(torch.randint(5, (n,)))
        for k,v in l.mlp.named_parameters(recurse=False):
            if k not in ('gate_up_proj', 'down_proj'): torch.nn.init.normal_(v, std=.2)
    return model

@pytest.mark.parametrize('base', [V2, V3], ids=['v2', 'v3'])
def test_decoding_step_by_step_is_prefill(base):
    model, ids = fused_tiny(base), torch.randint(5, 2048, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for batch in ids[:1], ids:
            want, cache = model(batch).logits, None
            for t in range(16):
                out = model(batch[:,t:t+1], past_key_values=cache, use_cache=True); cache = out.past_key_values
                close(out.logits[:,0], want[:,t], 1e-4)
        make = lambda c: model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=c, eos_token_id=None)
        assert torch.equal(make(True), make(False))

@pytest.mark.parametrize('base', [V2, V3], ids=['v2', 'v3'])
def test_training_and_evaluation_route_alike(base):
    model, ids = fused_tiny(base), torch.randint(5, 2048, (2, 16))
    with torch.no_grad(): assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)

@pytest.mark.parametrize('base,n,mode', [pytest.param(b, n, m, id=f'{b["model_type"]}-{n}-{m}') for b,n,ms in ((V2, 16, MODES), (V3, 384, ['exact']), (V3, 512, ['exact', 'fused_lora'])) for m in ms])
def test_saved_and_loaded_is_the_one_in_memory(base, n, mode, tmp_path):
    model, ids = fused_tiny(base, n, mode, num_hidden_layers=2), torch.randint(5, 2048, (1, 20))
    model.save_pretrained(tmp_path)
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {k: v for k,v in info.items() if v}=={} and type(back)==type(model)
    for k,v in model.state_dict().items(): assert torch.equal(v, back.state_dict()[k]), k
    with torch.no_grad(): assert torch.equal(copy.deepcopy(back)(ids).logits, model(ids).logits)      # copied: a mapped file is not aligned as fresh memory is
    assert fused_total(back.config)==sum(v.numel() for v in tensors_of(tmp_path).values() if v.is_floating_point())
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for m in half, copy.deepcopy(model).to(torch.bfloat16):
        assert torch.equal(m.model.layers[1].mlp.groups, model.model.layers[1].mlp.groups) and m.model.layers[1].mlp.groups.dtype==torch.int64
    with torch.no_grad(): assert half(ids).logits.isfinite().all()

@pytest.mark.parametrize('mode', ['exact', 'multiplex_mixture'])
def test_training_resumes_where_it_stopped(mode, tmp_path):
    "Four steps are two steps, save, load, two steps: weights and optimiser"
    ids = torch.randint(5, 2048, (4, 2, 12), generator=torch.Generator().manual_seed(0))
    def steps(model, opt, batches):
        for b in batches: opt.zero_grad(); model(b, labels=b).loss.backward(); opt.step()
    adam = lambda m: torch.optim.AdamW(m.parameters(), 1e-3)
    straight = fused_tiny(V3, mode=mode, num_hidden_layers=2).train(); stopped = copy.deepcopy(straight)
    steps(straight, adam(straight), ids)
    opt = adam(stopped); steps(stopped, opt, ids[:2])
    stopped.save_pretrained(tmp_path); torch.save(opt.state_dict(), tmp_path/'opt.pt')
    back = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path)).train()
    opt = adam(back); opt.load_state_dict(torch.load(tmp_path/'opt.pt')); steps(back, opt, ids[2:])
    for k,v in straight.state_dict().items(): assert torch.equal(v, back.state_dict()[k]), k

def test_gradient_checkpointing_changes_no_gradient():
    model, ids = fused_tiny(V3).train(), torch.randint(5, 2048, (2, 12))
    def grads(): model.zero_grad(); model(ids, labels=ids, use_cache=False).loss.backward(); return {k: p.grad.clone() for k,p in model.named_parameters()}
    plain = grads(); model.gradient_checkpointing_enable()
    for k,g in grads().items(): assert torch.equal(g, plain[k]), k

@pytest.mark.parametrize('base', [V2, V3], ids=['v2', 'v3'])
def test_streamed_from_a_teacher(base, tmp_path):
    "Written layer by layer, in bfloat16, as the package writes checkpoints: full rank is the teacher, and 512 ids are exact"
    ck = Checkpoint(write(tmp_path/'t', *tiny(base, n_routed_experts=512, num_hidden_layers=2)))
    teacher = stock(ck.folder); layers = teacher.model.layers
    blocks = {1: fuse_moe(layers[1].mlp, torch.randint(300, (512,)), torch.ones(512), 32)}
    ids, fused = torch.randint(5, 2048, (1, 20)), fused_model(teacher, blocks)
    with torch.no_grad(): close(fused(ids).logits, teacher(ids).logits, 1e-3)
    w = CheckpointWriter(tmp_path/'s', 2)
    w.write(0, {k: v.to(torch.bfloat16).clone() for k,v in teacher.state_dict().items() if '.layers.' not in k} | layer_tensors(layers[0], 'model.layers.0.'))
    layers[1].mlp = blocks[1]; w.write(1, layer_tensors(layers[1], 'model.layers.1.'))
    w.close(json.loads(fused.config.to_json_string()), ck.folder); w.publish()
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path/'s', dtype=torch.float32, output_loading_info=True)
    assert {k: v for k,v in info.items() if v}=={}
    assert torch.equal(back.model.layers[1].mlp.groups, blocks[1].groups)
    assert torch.equal(back.model.layers[1].mlp.b_down, blocks[1].b_down.bfloat16().float())

def test_blocks_that_do_not_fit_are_named():
    from transformers import AutoConfig
    config, _ = tiny(V3); config.pop('architectures')
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    make = lambda i, r: fuse_moe(teacher.model.layers[i].mlp, torch.arange(16)%5, torch.ones(16), r)
    with pytest.raises(ValueError, match=r'fused blocks for layers \[1\], the routed layers are \[1, 2\]'): fused_model(teacher, {1: make(1, 2)})
    with pytest.raises(ValueError, match=r"several sizes .*\(5, 2, 'exact', 32\), \(5, 3, 'exact', 32\)"): fused_model(teacher, {1: make(1, 2), 2: make(2, 3)})

@pytest.mark.parametrize('mode', MODES)
def test_two_threads_give_the_same_gradients_each_time(mode):
    "Training is the same to the last bit on any number of runs: no gradient is summed in the order in which threads come"
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        f, x = fused_block(mode, torch.arange(12)%4, 4, h=32, dtype=torch.float32), torch.randn(2048, 32)
        g = torch.randn(2048, 32)
        p = [v.requires_grad_() for k,v in f.named_parameters()]
        grads = lambda x: torch.autograd.grad(f(x), [x, *p], g)
        first = grads(x.requires_grad_())
        for _ in range(8): assert all(map(torch.equal, first, grads(x)))
    finally: torch.set_num_threads(before)
