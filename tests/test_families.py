"Every family, written by hand as its real checkpoints spell it: stock `transformers` loads it, and streaming gives its logits."
import json
import pytest, torch
from moe_fuse.awq_loading import *
from moe_fuse.calibration import TokenSet, block_inputs, layer_forward, stream_layers
from moe_fuse.evaluation import logits_of
from moe_fuse.expert_analysis import moe_forward
from moe_fuse.headers import *
from moe_fuse.streaming import layer_bytes
from tiny_models import pack, stock, write

H, I, N, K, V, L = 48, 32, 6, 2, 2048, 4                                        # hidden, expert width, experts, active, vocabulary, layers
BASE = dict(vocab_size=V, hidden_size=H, num_hidden_layers=L, num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=K, max_position_embeddings=1024,
            rms_norm_eps=1e-5, hidden_act='silu', tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=4)

def mlp(prefix, width, names=('gate_proj','up_proj','down_proj')):
    "Three matrices of one expert or dense layer: gate, up, down"
    return {f'{prefix}.{n}.weight': s for n,s in zip(names, ((width, H), (width, H), (H, width)))}

def experts(prefix, n, width, **kw): return {k: s for e in range(n) for k,s in mlp(f'{prefix}.experts.{e}', width, **kw).items()}

def attention(p, head=12, q=4, kv=2, bias='', norms=None):
    "Ordinary attention; `bias` names the projections that have one"
    rows = dict(q=(q*head, H), k=(kv*head, H), v=(kv*head, H), o=(H, q*head))
    out = {f'{p}.self_attn.{n}_proj.weight': s for n,s in rows.items()} | {f'{p}.self_attn.{n}_proj.bias': rows[n][:1] for n in bias}
    return out | ({f'{p}.self_attn.{n}_norm.weight': (s,) for n,s in zip('qk', norms)} if norms else {})

def latent(p, q_lora):
    "Multi-head latent attention: 4 heads of 16+8 for queries and keys, 16 for values, rank 16"
    q = {'q_a_proj': (32, H), 'q_a_layernorm': (32,), 'q_b_proj': (96, 32)} if q_lora else {'q_proj': (96, H)}
    rest = {'kv_a_proj_with_mqa': (24, H), 'kv_a_layernorm': (16,), 'kv_b_proj': (128, 16), 'o_proj': (H, 64)}
    return {f'{p}.self_attn.{n}.weight': s for n,s in (q | rest).items()}

def deepseek(i, c):
    p, dense = f'model.layers.{i}', i<c['first_k_dense_replace']
    out = latent(p, c['q_lora_rank'])
    if dense: return out | mlp(f'{p}.mlp', c['intermediate_size'])
    out |= {f'{p}.mlp.gate.weight': (c['n_routed_experts'], H)} | experts(f'{p}.mlp', c['n_routed_experts'], c['moe_intermediate_size'])
    if c['topk_method']=='noaux_tc': out[f'{p}.mlp.gate.e_score_correction_bias'] = (c['n_routed_experts'],)
    return out | mlp(f'{p}.mlp.shared_experts', c['n_shared_experts']*c['moe_intermediate_size'])

def qwen2(i, c):
    p = f'model.layers.{i}'; out = attention(p, bias='qkv')
    if (i+1)%c['decoder_sparse_step'] or i in c['mlp_only_layers']: return out | mlp(f'{p}.mlp', c['intermediate_size'])
    out |= {f'{p}.mlp.gate.weight': (N, H), f'{p}.mlp.shared_expert_gate.weight': (1, H)} | experts(f'{p}.mlp', N, I)
    return out | mlp(f'{p}.mlp.shared_expert', c['shared_expert_intermediate_size'])

def qwen3(i, c):
    p = f'model.layers.{i}'; out = attention(p, 16, norms=(16, 16))
    if (i+1)%c['decoder_sparse_step'] or i in c['mlp_only_layers']: return out | mlp(f'{p}.mlp', c['intermediate_size'])
    return out | {f'{p}.mlp.gate.weight': (N, H)} | experts(f'{p}.mlp', N, I)

def mixtral(i, c):
    p = f'model.layers.{i}'
    return attention(p) | {f'{p}.block_sparse_moe.gate.weight': (N, H)} | experts(f'{p}.block_sparse_moe', N, I, names=('w1','w3','w2'))

def olmoe(i, c):
    p = f'model.layers.{i}'
    return attention(p, norms=(48, 24)) | {f'{p}.mlp.gate.weight': (N, H)} | experts(f'{p}.mlp', N, I)

def glm4(i, c):
    p = f'model.layers.{i}'; out = attention(p, 16, bias='qkv', norms=(16, 16) if c['use_qk_norm'] else None)
    if i<c['first_k_dense_replace']: return out | mlp(f'{p}.mlp', c['intermediate_size'])
    out |= {f'{p}.mlp.gate.weight': (N, H), f'{p}.mlp.gate.e_score_correction_bias': (N,)} | experts(f'{p}.mlp', N, I)
    return out | mlp(f'{p}.mlp.shared_experts', c['n_shared_experts']*I)

def gpt_oss(i, c):
    p = f'model.layers.{i}'
    moe = {'router.weight': (N, H), 'router.bias': (N,), 'experts.gate_up_proj': (N, H, 2*I), 'experts.gate_up_proj_bias': (N, 2*I),
           'experts.down_proj': (N, I, H), 'experts.down_proj_bias': (N, H)}
    return attention(p, 16, bias='qkvo') | {f'{p}.self_attn.sinks': (4,)} | {f'{p}.mlp.{k}': s for k,s in moe.items()}

DEEPSEEK = BASE | dict(num_key_value_heads=4, intermediate_size=80, moe_intermediate_size=I, n_routed_experts=N, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=32,
                       qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, norm_topk_prob=True, routed_scaling_factor=2.5, rope_theta=10000, num_nextn_predict_layers=0)
QWEN = BASE | dict(num_experts=N, moe_intermediate_size=I, intermediate_size=80, mlp_only_layers=[], decoder_sparse_step=1, norm_topk_prob=False, rope_theta=1e6, use_sliding_window=False, sliding_window=8)
CONFIGS = {
    'deepseek_v2': (deepseek, DEEPSEEK | dict(n_shared_experts=2, q_lora_rank=None, topk_method='greedy', scoring_func='softmax', n_group=1, topk_group=1)),
    'deepseek_v3': (deepseek, DEEPSEEK | dict(n_shared_experts=1, topk_method='noaux_tc', scoring_func='sigmoid', n_group=2, topk_group=1)),
    'kimi_k2': (deepseek, DEEPSEEK | dict(n_routed_experts=384, num_experts_per_tok=8, moe_intermediate_size=16, num_hidden_layers=3, n_shared_experts=1, topk_method='noaux_tc', scoring_func='sigmoid', n_group=1,
        topk_group=1, rope_scaling=dict(type='yarn', factor=4., beta_fast=32., beta_slow=1., mscale=1., mscale_all_dim=1., original_max_position_embeddings=256))),
    'qwen2_moe': (qwen2, QWEN | dict(decoder_sparse_step=2, shared_expert_intermediate_size=40)),
    'qwen3_moe': (qwen3, QWEN | dict(mlp_only_layers=[2], norm_topk_prob=True, head_dim=16, attention_bias=False)),
    'mixtral': (mixtral, BASE | dict(num_local_experts=N, intermediate_size=I, sliding_window=None, rope_theta=1e6)),
    'olmoe': (olmoe, BASE | dict(num_experts=N, intermediate_size=I, clip_qkv=.5, norm_topk_prob=False, rope_theta=10000, rope_scaling=None, attention_bias=False)),
    'glm4_moe': (glm4, BASE | dict(n_routed_experts=N, moe_intermediate_size=I, intermediate_size=80, first_k_dense_replace=1, n_shared_experts=1, n_group=1, topk_group=1, head_dim=16, routed_scaling_factor=1.5,
        norm_topk_prob=True, use_qk_norm=True, attention_bias=True, partial_rotary_factor=.5, rope_theta=1e6, rope_scaling=None, num_nextn_predict_layers=0)),
    'gpt_oss': (gpt_oss, BASE | dict(num_local_experts=N, intermediate_size=I, head_dim=16, sliding_window=8, attention_bias=True, swiglu_limit=7., experts_per_token=K, rope_theta=150000,
        layer_types=['sliding_attention','full_attention']*2,
        rope_scaling=dict(rope_type='yarn', factor=4., beta_fast=32., beta_slow=1., truncate=False, original_max_position_embeddings=256)))}

def tiny(family, seed=0, **changes):
    "(config.json, state) in float32; norms, biases and sinks are not what a fresh model has"
    layer, config = CONFIGS[family]
    c = config | dict(model_type=family, architectures=[FAMILIES[family].architecture]) | changes
    shapes = {'model.embed_tokens.weight': (V, H), 'model.norm.weight': (H,)} | ({} if c['tie_word_embeddings'] else {'lm_head.weight': (V, H)})
    for i in range(c['num_hidden_layers']):
        shapes |= layer(i, c) | {f'model.layers.{i}.{n}_layernorm.weight': (H,) for n in ('input','post_attention')}
    g = torch.Generator().manual_seed(seed)
    def fill(k, s):
        x = torch.randn(s, generator=g)
        if 'norm' in k: return 1 + .2*x
        if len(s)==1: return .3*x                                                # biases, sinks
        return x*s[-2 if family=='gpt_oss' and 'experts.' in k else -1]**-.5*(3 if 'gate.' in k or 'router.' in k else 1)   # a router that has opinions
    return c, {k: fill(k, s) for k,s in shapes.items()}

def tokens(lengths=(3, 17, 40, 1, 40, 23)):
    g = torch.Generator().manual_seed(7)
    return TokenSet([('x', torch.randint(V, (n,), generator=g).tolist()) for n in lengths])

def whole(folder, toks):
    "The stock model's logits, one sequence at a time; Kimi-K2 is loaded as the DeepSeek-V3 it is"
    c = json.loads((folder/'config.json').read_text())
    if c['model_type']=='kimi_k2': (folder/'config.json').write_text(json.dumps(c | dict(model_type='deepseek_v3')))
    model = stock(folder)
    (folder/'config.json').write_text(json.dumps(c))
    with torch.no_grad(): return torch.cat([model(s[None]).logits[0] for s in toks.ids.split(toks.lengths)]), model

def same(got, want):
    "Float32 sums in another order, over four layers: 1e-5 of the largest logit"
    assert want.std()>.1, 'logits that are all alike would prove nothing'
    assert (got-want).abs().max() <= 1e-5*want.abs().max()

SLIDING = {'mixtral': dict(sliding_window=8), 'qwen3_moe': dict(use_sliding_window=True, sliding_window=8), 'qwen2_moe': dict(use_sliding_window=True, sliding_window=8, max_window_layers=2)}
CASES = {f: (f, {}, 'float32') for f in CONFIGS} | {f'{f}-tied': (f, dict(tie_word_embeddings=True), 'float32') for f in CONFIGS}
CASES |= {f'{f}-bfloat16': (f, {}, 'bfloat16') for f in CONFIGS} | {f'{f}-awq': (f, {}, 'mixed') for f in CONFIGS if f!='gpt_oss'}
CASES |= {f'{f}-sliding': (f, c, 'float32') for f,c in SLIDING.items()}
CASES |= {'qwen2_moe-dense-layer': ('qwen2_moe', dict(decoder_sparse_step=1, mlp_only_layers=[0,2]), 'float32'), 'qwen3_moe-renamed': ('qwen3_moe', dict(num_local_experts=N), 'float32'),
          'glm4_moe-no-norm': ('glm4_moe', dict(use_qk_norm=False), 'float32'), 'olmoe-unclipped': ('olmoe', dict(clip_qkv=None), 'float32')}

def packed(config, state, how):
    "(config, tensors on disk, the floats they stand for); `mixed` packs the experts with AWQ, whatever they are called"
    if how!='mixed': return pack(config, state, how)
    names = {k: k.replace('.block_sparse_moe.', '.mlp.') for k in state}
    back = {v: k for k,v in names.items()}
    c, disk, floats = pack(config, {names[k]: v for k,v in state.items()}, how)
    old = lambda k: back.get(k) or back[k.rsplit('.', 1)[0]+'.weight'].removesuffix('weight')+k.rsplit('.', 1)[1]
    return c, {old(k): v for k,v in disk.items()}, {old(k): v for k,v in floats.items()}

@pytest.mark.parametrize('case', CASES)
def test_streamed_layer_by_layer_is_the_stock_model(case, tmp_path):
    family, changes, how = CASES[case]
    if family=='kimi_k2' and case!=family: changes = changes | dict(n_routed_experts=24)    # all 384 once; packing them by hand is slow
    config, state = tiny(family, **changes)
    if 'renamed' in case: del config['num_experts']
    c, disk, floats = packed(config, state, how)
    if how=='mixed': assert any('.experts.0.' in k and k.endswith('.qweight') for k in disk)
    toks = tokens()
    want, _ = whole(write(tmp_path/'floats', config, floats, tokenizer=False), toks)
    got = logits_of(Checkpoint(write(tmp_path/'disk', c, disk, 2, tokenizer=False)), toks)(0, len(toks))
    same(got, want)

@pytest.mark.parametrize('family', [*SLIDING, 'gpt_oss'])
def test_the_window_is_not_a_matter_of_luck(family, tmp_path):
    "One as long as the longest sequence hides nothing, one of 8 tokens changes what comes later and nothing before"
    toks, n, out = tokens(), torch.tensor(tokens().lengths), []
    for w in 8, 40, 500:
        config, state = tiny(family, **SLIDING.get(family, {}) | dict(sliding_window=w))
        out.append(logits_of(Checkpoint(write(tmp_path/str(w), config, state, tokenizer=False)), toks)(0, len(toks)))
    pos = torch.cat([torch.arange(i) for i in n])
    assert torch.equal(out[1], out[2])
    assert (out[0]-out[1])[pos<8].abs().max() <= 1e-5*out[1].abs().max() < .01 < (out[0]-out[1])[pos>=8].abs().max()

@pytest.mark.parametrize('family', CONFIGS)
def test_grouped_experts_are_the_block(family, tmp_path):
    "`moe_forward`, with which runs compute, against the block's own code; biased experts are refused and not computed wrongly"
    config, state = tiny(family)
    ck, x = Checkpoint(write(tmp_path, config, state, tokenizer=False)), torch.randn(50, H, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for i,layer in stream_layers(ck, empty_model(ck)):
            if not hasattr(layer.mlp, 'experts'): continue
            if family=='gpt_oss':
                with pytest.raises(ValueError, match='GptOssExperts have biases'): moe_forward(layer.mlp, x)
            else: same(moe_forward(layer.mlp, x), layer.mlp(x[None])[0])
    assert block_inputs(ck, 1, tokens()).shape==(124, H)

@pytest.mark.parametrize('family', CONFIGS)
def test_experts_that_stay_packed_give_the_same(family, tmp_path):
    "A budget too small for a layer's floats: whatever the files call an expert, it is found; one tensor for all can't be split"
    config, state = tiny(family, **dict(n_routed_experts=24) if family=='kimi_k2' else {})
    c, disk, _ = packed(config, state, 'float32' if family=='gpt_oss' else 'mixed')
    ck, x = Checkpoint(write(tmp_path, c, disk, tokenizer=False)), torch.randn(50, H, generator=torch.Generator().manual_seed(3))
    def last(budget):
        model = empty_model(ck)
        with torch.no_grad(): return [layer_forward(layer, x, [20, 30], model.model.rotary_emb) for _,layer in stream_layers(ck, model, budget=budget)][-1]
    b = max((layer_bytes(ck, f'model.layers.{i}') for i in range(config['num_hidden_layers'])), key=lambda b: b.rest+2*b.expert)
    if family!='gpt_oss': same(last(b.rest+2*b.expert), last(None)); return
    with pytest.raises(BadInput, match='holds all experts'): last(b.rest+2*b.expert)

def parameters(state): return sum(v.numel() for k,v in state.items() if not k.endswith('e_score_correction_bias'))

@pytest.mark.parametrize('family, how', [(f, how) for f in CONFIGS for how in ('float32', 'bfloat16', 'mixed') if (f, how)!=('gpt_oss', 'mixed')])
def test_inspect_counts_every_parameter(family, how, tmp_path):
    "Total as the stock model has it; active as the shapes say: the first k experts and everything that is no expert"
    config, state = tiny(family, **dict(n_routed_experts=24) if family=='kimi_k2' else {})
    c, disk, _ = packed(config, state, how)
    info, n, k = inspect(Checkpoint(write(tmp_path/'disk', c, disk, 2, tokenizer=False))), config.get('n_routed_experts', N), config['num_experts_per_tok']
    assert info['total']==parameters(state)==sum(info['parameters'].values())
    if how=='float32': assert info['total']==whole(tmp_path/'disk', tokens((5,)))[1].num_parameters()
    used = {j: v for j,v in state.items() if '.experts.' not in j or (family!='gpt_oss' and int(j.split('.experts.')[1].split('.')[0])<k)}
    fused = parameters({j: v[:k] for j,v in state.items() if family=='gpt_oss' and '.experts.' in j})
    assert info['active']==parameters(used)+fused < info['total']
    sparse = {j.split('.')[2] for j in state if '.experts.' in j}
    assert (info['experts'], info['top_k'], info['layers'], info['dense_layers'])==(n, k, config['num_hidden_layers'], config['num_hidden_layers']-len(sparse))
    assert info['shared_experts']==(2 if family=='deepseek_v2' else int(any('shared_expert' in j for j in state)))
    assert 'other' not in info['parameters'] and info['parameters']['router']==sum(v.numel() for j,v in state.items() if '.gate.weight' in j or '.router.' in j)
    assert info['bytes']==sum(v.nbytes for v in disk.values())

def test_a_layer_behind_the_last_is_read_past(tmp_path):
    "GLM's multi-token-prediction layer, as V3's"
    config, state = tiny('glm4_moe', num_nextn_predict_layers=1)
    more = {k.replace(f'.{L-1}.', f'.{L}.', 1): v+1 for k,v in state.items() if k.startswith(f'model.layers.{L-1}.')} | {f'model.layers.{L}.eh_proj.weight': torch.ones(H, 2*H)}
    a, b = (Checkpoint(write(tmp_path/n, config, s, tokenizer=False)) for n,s in (('a', state), ('b', state | more)))
    assert torch.equal(logits_of(a, tokens())(0, 124), logits_of(b, tokens())(0, 124))
    assert inspect(b)['parameters']['mtp']==parameters(more) and inspect(b)['active']==inspect(a)['active']

def test_mxfp4_is_counted_and_not_read(tmp_path):
    "Two values a byte of a block, scales apart, as gpt-oss is published"
    config, state = tiny('gpt_oss')
    blocks = lambda n, rows, cols: (torch.zeros(n, rows, cols//32, 16, dtype=torch.uint8), torch.zeros(n, rows, cols//32, dtype=torch.uint8))
    disk = {k: v.bfloat16() for k,v in state.items() if not k.endswith(('experts.gate_up_proj', 'experts.down_proj'))}
    for i in range(L):
        for k,t in (('gate_up_proj', blocks(N, 2*I, 64)), ('down_proj', blocks(N, 64, I))): disk |= dict(zip((f'model.layers.{i}.mlp.experts.{k}_{s}' for s in ('blocks','scales')), t))
    ck = Checkpoint(write(tmp_path, config | dict(quantization_config=dict(quant_method='mxfp4')), disk, tokenizer=False))
    info = inspect(ck)
    assert info['parameters']['routed experts']==L*N*(3*I*64 + 2*I + H) and info['formats']['MXFP4']==2*L
    with pytest.raises(BadInput, match="'mxfp4' is not supported"): logits_of(ck, tokens())

def test_an_unknown_family_is_refused_with_those_known(tmp_path):
    config, state = tiny('olmoe')
    ck = Checkpoint(write(tmp_path, config | dict(model_type='llama4'), state, tokenizer=False))
    for f in inspect, empty_model:
        with pytest.raises(BadInput, match="'llama4'") as e: f(ck)
        assert all(k in str(e.value) for k in CONFIGS)

@pytest.mark.parametrize('family', CONFIGS)
def test_a_config_without_a_size_names_it(family):
    config = CONFIGS[family][1]
    for k in 'num_hidden_layers', 'num_experts_per_tok', FAMILIES[family].width, FAMILIES[family].experts:
        with pytest.raises(BadInput, match=k): check_supported({a: b for a,b in config.items() if a!=k} | dict(model_type=family))

# the main job

def run(folder, out, texts, **kw):
    from moe_fuse.pipeline import compress
    return compress(folder, out, **dict(calibration=texts[0], eval_data=texts[1], tokens=4096, eval_tokens=2048, quiet=True, baselines=[]) | kw)

def compare(r, kind, out, n=3):
    "The largest difference between stock logits of OUT and those in memory, on the longest held-out sequences"
    lengths, end = r.held.lengths[-n:], len(r.held); a = end-sum(lengths)
    with torch.no_grad(): want, got = r.logits[kind](a, end), torch.cat([m(s[None]).logits[0] for m in [stock(out)] for s in r.held.ids[a:].split(lengths)])
    assert want.std()>.1
    return (got-want).abs().max()

SHRUNK = [f for f in CONFIGS if f not in ('gpt_oss', 'deepseek_v2', 'deepseek_v3')]   # DeepSeek's runs are in test_pipeline
RUNS = {f: (f, dict(keep=.5)) for f in SHRUNK} | {f'{f}-reap': (f, dict(keep=.67, method='reap')) for f in SHRUNK if f!='kimi_k2'}
RUNS |= {f'{f}-always-on': (f, dict(keep=.5, shared_share=.3)) for f in ('qwen2_moe','glm4_moe')}
RUNS |= {f: (f, dict(keep=.5, baselines=['reap','mean'], distill_steps=2)) for f in ('qwen2_moe','mixtral')}

@pytest.mark.parametrize('case', RUNS)
def test_student_is_the_stock_architecture(case, texts, tmp_path):
    "Loaded by `transformers` alone, with nothing missing or left over, to 1e-4 in float32; names on disk are the family's own"
    family, kw = RUNS[case]
    config, state = tiny(family, **dict(n_routed_experts=24) if family=='kimi_k2' else {})
    src, out = write(tmp_path/'src', config, state), tmp_path/'out'
    r = run(src, out, texts, **kw)
    assert compare(r, kw.get('method', 'slim'), out) <= 1e-4
    ck, info = Checkpoint(out), inspect(Checkpoint(out))
    assert r.report['student']==info
    old = inspect(Checkpoint(src))
    if 'reap' in case: assert {k.split('.experts.')[0] for k in ck.entries if '.experts.' in k}=={k.split('.experts.')[0] for k in state if '.experts.' in k} and info['experts']<old['experts']
    else: assert set(ck.entries)==set(state) and info['expert_width']<old['expert_width']
    assert info['parameters']['routed experts'] <= old['parameters']['routed experts']*kw['keep']*1.001
    if 'always-on' in case: assert info['parameters']['shared experts']>old['parameters']['shared experts']

@pytest.mark.parametrize('family', SHRUNK)
def test_keep_1_is_the_teacher(family, texts, tmp_path):
    config, state = tiny(family, **dict(n_routed_experts=24) if family=='kimi_k2' else {})
    r = run(write(tmp_path/'src', config, state), tmp_path/'out', texts, keep=1., dtype='float32', tokens=2048)
    want, got = (r.logits[k](0, 500) for k in ('teacher','slim'))
    assert (got-want).abs().max() <= 1e-4 and compare(r, 'teacher', tmp_path/'out') <= 1e-4
    assert r.report['student']['total']==r.report['source']['total']

def test_a_renamed_size_is_written_under_the_name_it_had(texts, tmp_path):
    "`transformers` saves Qwen3's num_experts as num_local_experts; both in one config would contradict each other"
    config, state = tiny('qwen3_moe', num_local_experts=N); del config['num_experts']
    r = run(write(tmp_path/'src', config, state), tmp_path/'out', texts, keep=.67, method='reap')
    c = json.loads((tmp_path/'out/config.json').read_text())
    assert c['num_local_experts']==4 and 'num_experts' not in c and compare(r, 'reap', tmp_path/'out') <= 1e-4

def test_what_a_family_has_not_is_refused_before_anything_is_read(texts, tmp_path):
    for family,kw,say in ('gpt_oss', {}, "'gpt_oss' can be inspected and evaluated but not shrunk"), ('mixtral', dict(shared_share=.2), 'no shared expert to widen'):
        config, state = tiny(family)
        with pytest.raises(BadInput, match=say): run(write(tmp_path/family, config, state), tmp_path/'out', texts, **kw)
    assert not (tmp_path/'out').exists() and not (tmp_path/'out.partial').exists()

@pytest.mark.parametrize('family', CONFIGS)
def test_command_line_inspects_and_evaluates(family, texts, tmp_path, capsys):
    from moe_fuse.cli import main
    config, state = tiny(family, **dict(n_routed_experts=24) if family=='kimi_k2' else {})
    src = str(write(tmp_path, config, state))
    assert main(['inspect', src])==0 and FAMILIES[family].architecture in capsys.readouterr().out
    assert main(['eval', src, '--against', src, '--data', texts[1], '--tokens', '2048', '--json'])==0
    assert json.loads(capsys.readouterr().out)['mean']['kl']==0
