"Packed weights are read exactly as their own makers read them, and a model read one layer at a time is the model read whole."
import json, warnings
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from moe_fuse.awq_loading import *
from moe_fuse.calibration import TokenSet
from moe_fuse.evaluation import logits_of
from moe_fuse.headers import *
from tiny_models import *

V2, V3 = (base | dict(n_routed_experts=8, num_experts_per_tok=3) for base in (V2, V3))

def drawn(seed, *shape, low=0, high=16): return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))
groups = st.tuples(st.sampled_from([8,16,32,64,128]), st.integers(1,3), st.integers(1,6), st.integers(0,2**31-1))  # group size, groups, words a row, seed

@pytest.fixture(scope='module')
def awq():
    with warnings.catch_warnings(record=True):                                     # it announces its own end
        pytest.importorskip('awq', reason='autoawq is not installed; make set-up installs it')
        from awq.modules.linear.gemm import WQLinear_GEMM
        from awq.utils.packing_utils import dequantize_gemm
    return WQLinear_GEMM, dequantize_gemm

# AWQ

@settings(max_examples=30, deadline=None)
@given(groups)
def test_awq_dequantisation_is_autoawqs(awq, shape):
    "autoawq multiplies in float16; ours is the exact product, so rounding it to float16 gives theirs bit for bit"
    g, n, words, seed = shape
    torch.manual_seed(seed)
    qweight, qzeros = (torch.randint(-2**31, 2**31, (r, words), dtype=torch.int64).int() for r in (g*n, n))
    scales = (torch.rand(n, words*8)*.05 + 1e-3).half()
    assert torch.equal(dequantize_awq(qweight, qzeros, scales).half().T, awq[1](qweight, qzeros, scales, 4, g))

@settings(max_examples=10, deadline=None)
@given(groups)
def test_awq_packing_is_autoawqs(awq, shape):
    g, n, words, seed = shape
    words = 4*(1+words%2)                                                      # autoawq wants multiples of 32 columns
    torch.manual_seed(seed)
    qweight, qzeros, scales = quantize_awq(torch.randn(words*8, g*n)*.1, g)
    w, lin = dequantize_awq(qweight, qzeros, scales), nn.Linear(g*n, words*8, bias=False)
    lin.weight.data = w
    theirs = awq[0].from_linear(lin, 4, g, scales=scales.float(), zeros=unpack_awq(qzeros).float())
    assert torch.equal(theirs.qweight, qweight) and torch.equal(theirs.qzeros, qzeros) and torch.equal(theirs.scales, scales)

@settings(max_examples=10, deadline=None)
@given(st.sampled_from([2,4,8]), st.integers(1,3), st.integers(1,2), st.integers(0,2**31-1))
def test_awq_dequantisation_is_the_loop(g, n, words, seed):
    q, z = drawn(seed, g*n, words*8), drawn(seed+1, n, words*8)
    s = (drawn(seed+2, n, words*8, low=1, high=2000)/16384).half()
    w = dequantize_awq(pack_words(q), pack_words(z), s)
    for i in range(g*n):
        for o in range(words*8): assert w[o,i].item()==(q[i,o].item()-z[i//g,o].item())*s[i//g,o].item()

@settings(max_examples=30, deadline=None)
@given(st.integers(1,9), st.integers(1,5), st.integers(0,2**31-1))
def test_awq_words_are_read_as_they_were_packed(rows, words, seed):
    q = drawn(seed, rows, words*8)
    assert torch.equal(pack_awq(q), pack_words(q)) and torch.equal(unpack_awq(pack_words(q)), q.int())

@settings(max_examples=30, deadline=None)
@given(groups, st.floats(1e-3, 1e2))
def test_awq_rounding_is_within_half_a_step(shape, scale):
    "Half a step for the value, half a step for the zero point, and the float16 rounding of the step times 15"
    g, n, words, seed = shape
    w = torch.randn(words*8, g*n, generator=torch.Generator().manual_seed(seed))*scale
    packed = quantize_awq(w, g)
    step = packed[2].float().T.repeat_interleave(g, 1)
    assert ((dequantize_awq(*packed)-w).abs() <= step*(1+15*2**-11)).all()

def test_awq_shapes_that_do_not_fit_are_refused():
    qweight, qzeros, scales = quantize_awq(torch.randn(16, 32), 16)
    for bad in ((qweight[:31], qzeros, scales), (qweight, qzeros[:1], scales), (qweight, qzeros, scales[:,:8]), (qweight[:,:1], qzeros, scales)):
        with pytest.raises(ValueError, match='do not fit'): dequantize_awq(*bad)
    with pytest.raises(ValueError, match='divide'): quantize_awq(torch.randn(16, 33), 16)
    with pytest.raises(ValueError, match='4 bits'): pack_awq(torch.full((1,8), 16))

# FP8

@settings(max_examples=40, deadline=None)
@given(st.integers(1,300), st.integers(1,300), st.sampled_from([(128,128),(32,16),(1,64),(7,5)]), st.integers(0,2**31-1))
def test_fp8_dequantisation_is_the_loop_over_blocks(o, i, block, seed):
    "Ragged edges included"
    w = torch.randn(o, i, generator=torch.Generator().manual_seed(seed))
    if block==(7,5): w = w[:40,:40]
    q, s, back = as_fp8(w, block)
    assert torch.equal(dequantize_fp8(q, s, block), back)

@settings(max_examples=40, deadline=None)
@given(st.integers(1,300), st.integers(1,300), st.sampled_from([(128,128),(32,16)]), st.booleans(), st.integers(0,2**31-1))
def test_fp8_rounding_is_within_a_sixteenth(o, i, block, power_of_two, seed):
    "3 bits of mantissa: half a step is 1/16 of the value, or half the smallest subnormal times the scale"
    w = torch.randn(o, i, generator=torch.Generator().manual_seed(seed))
    q, s = quantize_fp8(w, block, power_of_two)
    bound = s.repeat_interleave(block[0], 0)[:o].repeat_interleave(block[1], 1)[:,:i] * 2**-10
    assert ((dequantize_fp8(q, s, block)-w).abs() <= torch.maximum(w.abs()/16, bound)*(1+1e-5)).all()

def test_fp8_zero_block_stays_zero():
    w = torch.randn(64, 32); w[:32,:16] = 0
    q, s = quantize_fp8(w, BLOCK)
    assert (dequantize_fp8(q, s, BLOCK)[:32,:16]==0).all() and s.isfinite().all()

def test_fp8_scales_that_do_not_fit_are_refused():
    q, s = quantize_fp8(torch.randn(40, 40), BLOCK)
    with pytest.raises(ValueError, match='do not fit'): dequantize_fp8(q, s.T, BLOCK)

# checkpoints

def mtp(state, config):
    "The same tensors and a multi-token-prediction layer behind the last, as DeepSeek-V3 has it."
    n, h = config['num_hidden_layers'], config['hidden_size']
    more = {k.replace(f'.{n-1}.', f'.{n}.', 1): v+1 for k,v in state.items() if k.startswith(f'model.layers.{n-1}.')}
    more |= {f'model.layers.{n}.eh_proj.weight': torch.randn(h, 2*h), f'model.layers.{n}.shared_head.head.weight': torch.randn(config['vocab_size'], h)}
    return state | more | {f'model.layers.{n}.{k}.weight': torch.ones(h) for k in ('enorm', 'hnorm', 'shared_head.norm')}

def tokens():
    g = torch.Generator().manual_seed(1)
    return TokenSet([('a', torch.randint(5, 2048, (n,), generator=g).tolist()) for n in (3, 17, 1, 40, 64, 64, 25)])

def whole(folder, toks):
    "Logits of the model that `transformers` loads whole, one sequence at a time."
    model = stock(folder)
    with torch.no_grad(): return torch.cat([model(ids[None]).logits[0] for ids in toks.ids.split(toks.lengths)])

yarn = dict(rope_parameters=dict(rope_type='yarn', factor=4., original_max_position_embeddings=32, beta_fast=32, beta_slow=1, mscale=1., mscale_all_dim=1., rope_theta=10000.))
cases = {f'{m}-{how}-{n}': (base, {}, how, n) for m,base in (('v2',V2), ('v3',V3)) for how,n in (('awq',1), ('mixed',3), ('fp8',5), ('bfloat16',2))}
cases |= {'v2-with-q-lora': (V2, dict(q_lora_rank=32), 'awq', 4), 'v3-without-q-lora': (V3, dict(q_lora_rank=None), 'fp8', 1),
          'v2-groups': (V2, dict(topk_method='group_limited_greedy', n_group=4, topk_group=2), 'mixed', 1),
          'v2-tied': (V2, dict(tie_word_embeddings=True), 'mixed', 2), 'v3-tied': (V3, dict(tie_word_embeddings=True), 'bfloat16', 1),
          'v2-yarn': (V2, yarn, 'bfloat16', 1), 'v3-yarn': (V3, yarn, 'mixed', 1), 'v3-mtp': (V3, dict(num_nextn_predict_layers=1), 'fp8', 3),
          'v3-awq-mtp': (V3, dict(num_nextn_predict_layers=1), 'awq', 1)}

@pytest.mark.parametrize('case', cases)
def test_streamed_layer_by_layer_is_the_model_loaded_whole(case, tmp_path):
    base, changes, how, shards = cases[case]
    config, state = tiny(base, **changes)
    packed, disk, back = pack(config, mtp(state, config) if 'mtp' in case else state, how)
    n = config['num_hidden_layers']
    write(tmp_path/'plain', config | dict(num_nextn_predict_layers=0), {k: v for k,v in back.items() if not k.startswith(f'model.layers.{n}.')})
    ck, toks = Checkpoint(write(tmp_path/'packed', packed, disk, shards)), tokens()
    want = whole(tmp_path/'plain', toks)
    got = logits_of(ck, toks)(0, len(toks))
    assert want.std()>.1, 'logits that are all alike would prove nothing'
    assert (got-want).abs().max() <= 1e-5*want.abs().max()

@pytest.mark.parametrize('how', ['awq','mixed','fp8','bfloat16'])
def test_inspect_counts_what_is_there(how, tmp_path):
    "Parameters as the model has them, bytes as the files have them, the multi-token-prediction layer apart"
    config, state = tiny(V3, num_nextn_predict_layers=1)
    packed, disk, back = pack(config, mtp(state, config), how)
    info = inspect(Checkpoint(write(tmp_path, packed, disk, 3)))
    n = lambda d, cond=lambda k: True: sum(v.numel() for k,v in d.items() if cond(k) and not k.endswith('e_score_correction_bias'))
    extra = n(back) - n(state)
    assert info['parameters']['mtp']==extra and info['total']==n(back)
    assert info['parameters']['routed experts']==n(state, is_expert)
    assert info['active']==n(state, lambda k: not is_expert(k)) + n(state, is_expert)*config['num_experts_per_tok']//config['n_routed_experts']
    assert info['bytes']==sum(v.nbytes for v in disk.values())==sum(info['bytes_by_part'].values())
    assert sum(info['formats'].values())==len([k for k in back if not k.endswith('e_score_correction_bias')])

def test_a_scale_may_lie_in_another_shard(tmp_path):
    config, disk, back = pack(*tiny(V3), 'fp8')
    ck = Checkpoint(write(tmp_path, config, disk, 2))
    k = next(k for k in back if k+'_scale_inv' in disk and ck[k].shard!=ck[k+'_scale_inv'].shard)
    assert torch.equal(ck.weight(k), back[k])

def test_every_weight_is_what_its_bytes_stand_for(tmp_path):
    for how in 'awq', 'mixed', 'fp8', 'bfloat16':
        config, disk, back = pack(*tiny(V3), how)
        ck = Checkpoint(write(tmp_path/how, config, disk, 3))
        for k,v in back.items(): assert torch.equal(ck.weight(k), v), (how, k)

def test_experts_stored_as_one_tensor_are_read_too(tmp_path):
    "The layout that `transformers` keeps in memory"
    config, state = tiny(V3)
    fused = {k: v for k,v in state.items() if not is_expert(k)}
    for i in range(1, config['num_hidden_layers']):
        w = lambda part: torch.stack([state[f'model.layers.{i}.mlp.experts.{e}.{part}_proj.weight'] for e in range(config['n_routed_experts'])])
        fused |= {f'model.layers.{i}.mlp.experts.gate_up_proj': torch.cat([w('gate'), w('up')], 1), f'model.layers.{i}.mlp.experts.down_proj': w('down')}
    a, b, toks = Checkpoint(write(tmp_path/'a', config, state)), Checkpoint(write(tmp_path/'b', config, fused)), tokens()
    assert torch.equal(logits_of(a, toks)(0, len(toks)), logits_of(b, toks)(0, len(toks)))

def test_experts_come_in_their_order_whatever_that_of_the_file(tmp_path):
    "Names sort as text: 10 comes before 2"
    config, state = tiny(V3, n_routed_experts=12)
    ck, prefix = Checkpoint(write(tmp_path, config, state, 3)), 'model.layers.1.mlp.experts.'
    up, down = load_experts(ck, prefix, (12, 2*config['moe_intermediate_size'], config['hidden_size']))
    for e in range(12): assert torch.equal(up[e], torch.cat([state[f'{prefix}{e}.{k}_proj.weight'].float() for k in ('gate', 'up')])) and torch.equal(down[e], state[f'{prefix}{e}.down_proj.weight'].float())

@pytest.mark.parametrize('value,dtype', [(float('nan'), torch.float32), (float('inf'), torch.bfloat16), (1e38, torch.float16)])
def test_an_expert_that_is_not_finite_is_refused_by_name(tmp_path, value, dtype):
    "Nor may it become so by rounding"
    config, state = tiny(V3, n_routed_experts=12)
    k = 'model.layers.1.mlp.experts.10.up_proj.weight'
    state[k] = state[k].float(); state[k][3,1] = value
    with pytest.raises(BadInput, match='holds NaN or Inf') as e: load_experts(Checkpoint(write(tmp_path, config, state)), 'model.layers.1.mlp.experts.', (12, 2*config['moe_intermediate_size'], config['hidden_size']), dtype)
    assert k in str(e.value)

def test_fp8_without_its_scale_is_refused_by_name(tmp_path):
    config, disk, back = pack(*tiny(V3), 'fp8')
    k = next(k for k in disk if k.endswith('.experts.3.up_proj.weight'))
    del disk[k+'_scale_inv']
    with pytest.raises(BadInput, match='FP8 without its scales') as e: Checkpoint(write(tmp_path, config, disk)).weight(k)
    assert k in str(e.value)

def test_awq_without_its_scale_is_refused_by_name(tmp_path):
    config, disk, back = pack(*tiny(V3), 'mixed')
    k = next(k for k in disk if k.endswith('.experts.3.up_proj.scales'))
    del disk[k]
    with pytest.raises(BadInput, match='lacks tensor') as e: Checkpoint(write(tmp_path, config, disk)).weight(k.replace('scales', 'weight'))
    assert k in str(e.value)

def test_overlapping_tensors_are_refused(tmp_path):
    head = json.dumps(dict(a=dict(dtype='F32', shape=[4], data_offsets=[0,16]), b=dict(dtype='F32', shape=[4], data_offsets=[8,24]))).encode()
    (tmp_path/'x.safetensors').write_bytes(len(head).to_bytes(8, 'little') + head + bytes(24))
    with pytest.raises(BadInput, match="'a' and 'b' overlap at byte"): read_header(tmp_path/'x.safetensors')

def test_a_loop_of_links_is_refused(tmp_path):
    folder = write(tmp_path/'m', *tiny(V3), shards=2)
    shard = sorted(folder.glob('*.safetensors'))[0]
    shard.unlink(); shard.symlink_to(shard.name)
    with pytest.raises(BadInput, match=shard.name): Checkpoint(folder)
    (tmp_path/'loop').symlink_to('loop')
    with pytest.raises(BadInput, match='loop'): Checkpoint(tmp_path/'loop')

def test_a_shard_outside_the_folder_is_refused(tmp_path):
    folder = write(tmp_path/'m', *tiny(V3), shards=2)
    index = json.loads((folder/'model.safetensors.index.json').read_text())
    for bad in '../m/model-00001-of-00002.safetensors', '/etc/passwd', 'sub/x.safetensors':
        index['weight_map']['lm_head.weight'] = bad
        (folder/'model.safetensors.index.json').write_text(json.dumps(index))
        with pytest.raises(BadInput, match='lies outside the folder'): Checkpoint(folder)

@pytest.fixture(scope='module')
def damaged(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp('damage')/'m', *pack(*tiny(V3, num_hidden_layers=2), 'fp8')[:2], tokenizer=False)
    return folder, (folder/'model.safetensors').read_bytes()

@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_to_a_file_is_a_named_error_or_another_number(damaged, data):
    "Bytes changed anywhere in a small checkpoint, or its end cut off: one clear line, or a tensor of the declared shape; never a crash"
    folder, good = damaged
    raw, head = bytearray(good), int.from_bytes(good[:8], 'little')
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, head+8) if data.draw(st.booleans()) else st.integers(0, len(raw)-1))
        raw[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()): raw = raw[:data.draw(st.integers(0, len(raw)))]
    (folder/'model.safetensors').write_bytes(raw)
    try:
        ck = Checkpoint(folder)
        for k in list(ck.entries)[:40]:
            if not k.endswith('_scale_inv'): assert ck.weight(k).shape==ck[k].shape
    except BadInput as e: assert '\n' not in str(e)
