"The plan's formulas equal what the code allocates and writes, and what can't be planned is refused in one line."
import json, subprocess, sys, time
from collections import Counter
import pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from moe_fuse import calibration, fusion
from moe_fuse.cli import main
from moe_fuse.headers import *
from moe_fuse.planning import *
from moe_fuse.multiplex_lora import fuse_moe, pruned_moe, slim_moe
from moe_fuse.streaming import layer_bytes, load_layer
import test_families
from tiny_models import *

few = settings(max_examples=25, deadline=None)

@st.composite
def configs(draw):
    "Small DeepSeek configs of either family, with and without query compression, dense layers, tied embeddings"
    base, pick = draw(st.sampled_from([V2, V3])), lambda *v: draw(st.sampled_from(v))
    return base | dict(hidden_size=pick(32, 48, 64), moe_intermediate_size=pick(16, 32, 64), intermediate_size=pick(40, 80), n_routed_experts=pick(8, 16), num_experts_per_tok=pick(2, 4), n_shared_experts=pick(1, 2),
                       num_hidden_layers=pick(2, 3), first_k_dense_replace=pick(0, 1), q_lora_rank=pick(None, 24), kv_lora_rank=pick(16, 24), qk_nope_head_dim=pick(8, 16), v_head_dim=pick(8, 16), qk_rope_head_dim=8,
                       num_attention_heads=4, vocab_size=pick(64, 130), tie_word_embeddings=pick(True, False), attention_bias=pick(True, False))

def parts_of(state, layers):
    "Parameters by part, the router's bias left out"
    out = Counter()
    for k,v in state.items():
        if not k.endswith('e_score_correction_bias'): out[part_of(k, layers)] += v.numel()
    return dict(out)

@few
@given(configs())
def test_parameters_are_those_of_the_stock_model(c):
    with torch.device('meta'): model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[c['model_type']].from_dict(c))
    state = {k:v for k,v in model.state_dict().items() if not (c['tie_word_embeddings'] and k=='lm_head.weight')}
    assert parameters(c)==parts_of({k.replace('experts.gate_up_proj', 'experts.0.gate_proj').replace('experts.down_proj', 'experts.0.down_proj'):v for k,v in state.items()}, c['num_hidden_layers'])

@few
@given(configs(), st.floats(.3, 1))
def test_a_wider_step_is_the_next_one(c, keep):
    "The named keep gives 8 neurons more, and a little less than it does not"
    try: r = slim_sizes(c, keep)[0]
    except BadInput: return
    k = wider_keep(c, keep)
    if k is None: assert r+8>c['moe_intermediate_size']; return
    if k>1: return                                                             # only more than the teacher has would do
    assert k>keep and slim_sizes(c, k)[0]==r+8>slim_sizes(c, k-1e-3/c['n_routed_experts'])[0]
    z = slim_step(c, dict(keep=keep, shared_share=0.))
    assert z['width']==r and (z['wider'] is None or keep<z['wider'][0]<=1.03*keep and z['wider'][1]==slim_sizes(c, z['wider'][0])[0]>r and f"keep {z['wider'][0]:.4g} gives an expert {z['wider'][1]}" in say_step(z))

@pytest.mark.parametrize('how', ['bfloat16', 'float32', 'fp8', 'awq', 'mixed'])
@pytest.mark.parametrize('base', [V2, V3], ids=['v2', 'v3'])
def test_bytes_and_parameters_are_those_of_a_written_checkpoint(base, how, tmp_path):
    "From config.json alone, in every format"
    config, disk, _ = pack(*tiny(base, first_k_dense_replace=int(how!='mixed')), how)           # the mixed packing leaves dense layers plain and does not say so
    if how in ('bfloat16', 'float32'): config['dtype'] = how
    ck = Checkpoint(write(tmp_path/how, config, disk))
    info = inspect(ck)
    assert parameters(config)=={k:n for k,n in info['parameters'].items() if n}
    assert source_bytes(config)['total']==ck.nbytes

@few
@given(st.integers(2048, 3000), st.integers(2048, 2500), st.sampled_from([(), ('reap',), ('reap', 'mean')]), st.sampled_from(list(calibration.STATE_DTYPES)))
def test_state_files(tmp_path_factory, tokens, held, baselines, states):
    "The files that `run_layers` opens: two a stream, and y"
    z = run_sizes(V3, tokens=tokens, eval_tokens=held, baselines=baselines, states=states)
    folder = tmp_path_factory.mktemp('states')
    for i in range(2*(len(z.kinds)+1)+1): calibration.States(tokens+held, V3['hidden_size'], folder/str(i), calibration.STATE_DTYPES[states]).close()
    assert states_on_disk(z)==sum(f.stat().st_size for f in folder.iterdir())

@few
@given(configs(), st.sampled_from([1., .5, .25]), st.sampled_from([0., .25]))
def test_blocks_and_normal_matrix_are_as_large_as_planned(c, keep, share):
    "A block of each kind, made by the library, and the matrix of its fit"
    try: z = run_sizes(c, keep=keep, shared_share=share)
    except BadInput as e: assert 'less than 8 neurons' in str(e); return
    torch.manual_seed(0)
    layer = AutoModelForCausalLM.from_config(CONFIG_MAPPING[c['model_type']].from_dict(c)).model.layers[-1]
    count = lambda m: sum(p.numel() for p in m.parameters())
    moe, use = layer.mlp, torch.rand(z.n, z.i)
    assert (layer_weights(z, True), block_weights(z, 'teacher'))==(count(layer), count(moe))
    slim = slim_moe(moe, use, keep, share)
    assert (block_weights(z, 'slim'), z.r, z.s2)==(count(slim), slim.experts.down_proj.shape[2], slim.shared_experts.down_proj.in_features)
    fit = fusion.JointRidge(slim.experts.down_proj, slim.shared_experts.down_proj.weight)
    assert (z.f, fit.gram.nbytes, fit.rhs.nbytes)==(len(fit.d0), 8*z.f**2, 8*z.f*z.h)
    assert block_weights(z, 'mean')==count(fuse_moe(moe, torch.arange(z.n)%z.e, use.sum(1), mode='cores'))
    if 'reap' in z.kinds: assert block_weights(z, 'reap')==count(pruned_moe(moe, use.sum(1), z.e))

def test_normal_matrix_above_8192_rows_is_float32():
    z = run_sizes(V3 | dict(moe_intermediate_size=528, n_routed_experts=64, hidden_size=8, num_attention_heads=4), keep=.25)
    fit = fusion.JointRidge(torch.zeros(z.n, z.h, z.r, device='meta'), torch.zeros(z.h, z.s2, device='meta'))
    assert z.f>8192 and fit.gram.nbytes==4*z.f**2

def test_student_and_stages_are_those_of_a_run(demo_run):
    "Exact: what is written. And the stages have the names of the report"
    run, out = demo_run
    z = run_sizes(Checkpoint(resolve_source('demo')).config, card=False, **DEMO)
    assert student_weights(z)==inspect(Checkpoint(out))['total']
    nothing = {'reap: measure', 'mean: measure'}                               # without distillation there is nothing to measure again
    assert {s.name for s in stages(z, source_bytes(z.c))}-{'start'}==set(run.report['seconds'])-nothing
    assert z.kinds==run.report['kinds'] and MIN_TOKENS==calibration.MIN_TOKENS

FAMILY = [f for f in test_families.CONFIGS if FAMILIES[f].matrices]
SMALL = dict(kimi_k2=dict(n_routed_experts=24))                                # its 384 experts packed by hand are slow

def routed(state): return max(int(k.split('.')[2]) for k in state if '.experts.' in k)  # the last layer that has experts

@pytest.mark.parametrize('how', ['float32', 'bfloat16', 'mixed'])
@pytest.mark.parametrize('family', FAMILY)
def test_every_family_as_its_files_have_it(family, how, tmp_path):
    "Parameters by part, bytes of the files, and what a layer takes where: from config.json alone"
    config, disk, _ = test_families.packed(*test_families.tiny(family, **SMALL.get(family, {})), how)
    if how!='mixed': config['dtype'] = how
    if how=='mixed': config['quantization_config']['modules_to_not_convert'] = ['self_attn', 'shared_expert', 'gate'] + [f'model.layers.{i}.mlp' for i in range(4)]
    ck = Checkpoint(write(tmp_path/'t', config, disk, tokenizer=False))
    assert parameters(config)=={k:n for k,n in inspect(ck)['parameters'].items() if n}
    if how!='mixed': assert source_bytes(config)['total']==ck.nbytes
    assert layer_sizes(config)==layer_bytes(ck, f'model.layers.{routed(disk)}')

@pytest.mark.parametrize('family', FAMILY)
def test_every_family_has_blocks_as_large_as_planned(family):
    c, state = test_families.tiny(family, **SMALL.get(family, {}))
    z = run_sizes(c, keep=.5)
    torch.manual_seed(0)
    layer = AutoModelForCausalLM.from_config(CONFIG_MAPPING[stock_type(c)].from_dict(c | dict(model_type=stock_type(c)))).model.layers[routed(state)]
    count = lambda m: sum(p.numel() for p in m.parameters())
    moe, use = layer.mlp, torch.rand(z.n, z.i)
    assert (layer_weights(z, True), block_weights(z, 'teacher'))==(count(layer), count(moe))
    assert block_weights(z, 'slim')==count(slim_moe(moe, use, .5)) and block_weights(z, 'mean')==count(fuse_moe(moe, torch.arange(z.n)%z.e, use.sum(1), mode='cores'))
    if 'reap' in z.kinds: assert block_weights(z, 'reap')==count(pruned_moe(moe, use.sum(1), z.e))

@pytest.mark.parametrize('place', ['floats', 'packed', 'disk'])
def test_a_device_budget_puts_the_experts_where_the_run_puts_them(place, tmp_path):
    "The smallest budget of each place, and what stays in memory with it"
    config, state = tiny(V3)
    config, disk, _ = pack(config, state, 'fp8')
    ck = Checkpoint(write(tmp_path/'t', config, disk))
    b = layer_sizes(config)
    least = dict(floats=b.rest+b.experts+b.expert, packed=b.rest+b.packed+2*b.expert, disk=b.rest+2*b.expert)[place]
    sizes = lambda n: run_sizes(config, keep=.5, tokens=2048, eval_tokens=2048, device_budget=n)
    assert sizes(least).place==place
    if place!='disk': assert sizes(least-1).place==dict(floats='packed', packed='disk')[place]
    else:
        with pytest.raises(BadInput, match='too small'): sizes(least-1)
    from moe_fuse.awq_loading import empty_model
    layer = load_layer(ck, empty_model(ck).model.layers[2], 'model.layers.2', budget=least)
    held = sum(t.nbytes for t in [*layer.parameters(), *layer.buffers()])
    assert sizes(least).teacher==held + (0 if place=='floats' else 2*b.expert)

def planned(capfd, *argv):
    capfd.readouterr()
    assert main(['plan', *map(str, argv)])==0
    return capfd.readouterr().out

def test_a_bare_config_is_enough(tmp_path, capfd):
    "As a file, as a folder without weights, as `demo`: the same numbers, but for the source, which is not here"
    demo = resolve_source('demo')
    (tmp_path/'config.json').write_text((demo/'config.json').read_text())
    a, b, c = (json.loads(planned(capfd, s, '--json', '--vram', '24GB')) for s in (tmp_path/'config.json', tmp_path, 'demo'))
    assert a==b and a['stages']==c['stages'] and a['need']['vram']==c['need']['vram'] and a['need']['disk'].pop('source')==Checkpoint(demo).nbytes and a['need']['disk']==c['need']['disk']

def test_verdict_says_what_is_missing_and_what_helps(tmp_path, capfd):
    "The setting that it names does make it fit"
    small = '600MB'
    out = planned(capfd, 'demo', '--disk', small, '--tokens', '128k')
    assert out.startswith('does not fit: states, student need 1.3 GB of disk, 600 MB are there; --states float8 needs ')
    typed = out.split('are there; ')[1].split(' needs')[0].split()
    assert planned(capfd, 'demo', '--disk', small, '--tokens', '128k', *typed).startswith('fits: ')
    assert planned(capfd, 'demo', '--vram', '24GB').startswith('fits: ')
    assert 'no single setting is enough; --device-budget 1MB: ' in planned(capfd, 'demo', '--vram', '100MB')
    assert 'no setting brings it below' in planned(capfd, 'demo', '--vram', '100MB', '--device-budget', '1MB')
    assert 'no single setting is enough; --baselines none --states float8 --tokens 2048' in planned(capfd, 'demo', '--disk', '20MB', '--tokens', '8192', '--eval-tokens', '8192')

@pytest.mark.parametrize('argv,say', [(('--vram', '24'), "'24'"), (('--ram', '8gb'), "'8gb'"), (('--disk=-1GB',), "'-1GB'"), (('--tokens', '2MB'), "'2MB'"), (('--tokens', '100'), 'tokens is 100, at least 2048'),
    (('--eval-tokens', '5'), 'eval_tokens is 5'), (('--keep', '0'), 'keep is 0'), (('--keep', '1.5'), 'keep is 1.5'), (('--keep', 'nan'), 'keep is nan'), (('--keep', '.01'), 'less than 8 neurons'), (('--method', 'magic'), "'magic'"),
    (('--baselines', 'nope'), "'nope'"), (('--dtype', 'int8'), "'int8'"), (('--states', 'int8'), "'int8'"), (('--device-budget', '5'), "'5'"), (('--device-budget', '100KB'), 'a budget of 100,000 bytes'), (('--distill-steps', '-1'), 'distill_steps is -1'), (('--device-tflops', '0'), '--device-tflops'), (('--bandwidth', 'nan'), '--bandwidth')], ids=lambda v: ' '.join(v) if isinstance(v, tuple) else '')
def test_what_can_not_be_is_named(argv, say, capfd):
    assert main(['plan', 'demo', *argv])==2
    out, err = capfd.readouterr()
    assert out=='' and err.startswith('moe-fuse: ') and say in err and err.count('\n')==1

@pytest.mark.parametrize('key', ['hidden_size', 'n_routed_experts', 'kv_lora_rank', 'q_lora_rank', 'v_head_dim', 'intermediate_size', 'n_shared_experts', 'first_k_dense_replace', 'model_type'])
def test_config_without_a_key_names_it(key, tmp_path, capfd):
    (tmp_path/'config.json').write_text(json.dumps({k:v for k,v in V3.items() if k!=key}))
    assert main(['plan', str(tmp_path/'config.json')])==2
    out, err = capfd.readouterr()
    assert out=='' and key in err and err.count('\n')==1

def test_source_that_can_not_be_read(tmp_path, capfd):
    (tmp_path/'bad.json').write_text('{"a": '); (tmp_path/'list.json').write_text('[1]'); (tmp_path/'empty').mkdir()
    for f in 'bad.json', 'list.json', 'absent.json', 'empty':
        assert main(['plan', str(tmp_path/f)])==2
        out, err = capfd.readouterr()
        assert out=='' and f in err and err.count('\n')==1

def test_no_torch_and_less_than_a_second():
    code = "import sys; from moe_fuse.cli import main; code = main(['plan', 'demo', '--vram', '24GB', '--device-tflops', '20', '--bandwidth', '500']); assert not {'torch','numpy','transformers'} & set(sys.modules); sys.exit(code)"
    took = []
    for _ in range(3):
        t = time.perf_counter(); r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root); took.append(time.perf_counter()-t)
        assert r.returncode==0 and r.stderr=='' and 'given' in r.stdout, r.stderr
    assert min(took)<1

def test_measured_rates(tmp_path, capfd, monkeypatch):
    "Rates of this machine are used, said to be, and the file that was timed is gone"
    monkeypatch.chdir(tmp_path)
    p = json.loads(planned(capfd, 'demo', '--measure', '--json'))
    assert p['rates']['by']=='measured' and all(0<p['rates'][k]<1e18 for k in ('flops', 'memory', 'disk')) and list(tmp_path.iterdir())==[]
    s = p['stages'][2]
    assert s['seconds'] >= s['flops']/p['rates']['flops']

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU to measure')
def test_a_gpu_that_is_not_here_is_not_measured(capfd):
    assert main(['plan', 'demo', '--vram', '24GB', '--measure'])==2
    assert 'no GPU here' in capfd.readouterr().err
