"What the main job writes is a stock checkpoint, the same one every time, also when it was killed on the way."
import json, os, signal, subprocess, sys, time
import numpy as np, pytest, torch
from moe_fuse.calibration import TokenSet
from moe_fuse.cli import main
from moe_fuse.headers import *
from moe_fuse.pipeline import compress
from moe_fuse.streaming import layer_bytes, place_experts
from tiny_models import *

def in_memory(run, kind, n=3):
    "Ids and lengths of the `n` longest held-out sequences, and the pipeline's logits for them"
    lengths, end = run.held.lengths[-n:], len(run.held)
    a = end-sum(lengths)
    with torch.no_grad(): return run.held.ids[a:], lengths, run.logits[kind](a, end)

def stock_logits(folder, ids, lengths):
    with torch.no_grad(): return torch.cat([m(s[None]).logits[0] for m in [stock(folder)] for s in ids.split(lengths)])

LOADER = '''
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0]=='moe_fuse': raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
try: import moe_fuse
except ModuleNotFoundError: pass
else: sys.exit('moe_fuse is importable')
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
folder, ids, out = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
assert not any(info.values()), info
ids = np.load(ids)
with torch.no_grad(): np.save(out, torch.cat([model(torch.from_numpy(ids[k])[None]).logits[0] for k in ids]).numpy())
tok = AutoTokenizer.from_pretrained(folder)
text = tok.apply_chat_template([dict(role='user', content='What does `len` do?')], tokenize=False, add_generation_prompt=True)
new = model.generate(**tok(text, return_tensors='pt', add_special_tokens=False), max_new_tokens=4, do_sample=False)
GenerationConfig.from_pretrained(folder)
assert not [m for m in sys.modules if m.startswith('moe_fuse')]
print(tok.decode(new[0]))
'''

def test_a_process_without_moe_fuse_loads_out_and_gives_the_logits(demo_run, tmp_path):
    "Also the tokenizer, the chat template and `generate`"
    run, out = demo_run
    ids, lengths, want = in_memory(run, 'slim')
    np.savez(tmp_path/'ids.npz', **{str(i): s.numpy() for i,s in enumerate(ids.split(lengths))})
    r = subprocess.run([sys.executable, '-I', '-c', LOADER, str(out), str(tmp_path/'ids.npz'), str(tmp_path/'logits.npy')], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode==0, r.stderr
    assert np.abs(np.load(tmp_path/'logits.npy')-want.numpy()).max() <= 1e-4
    assert 'What does' in r.stdout

def strict(text):
    "JSON without NaN and Infinity, which are no JSON"
    def no(c): raise AssertionError(f'{c} in JSON')
    return json.loads(text, parse_constant=no)

def check_report(run, out):
    "report.json is what the run returns and says what is on the disk"
    r, info = strict((out/'report.json').read_text()), inspect(Checkpoint(out))
    assert r==json.loads(json.dumps(run.report)) and r['student']==info
    z = r['sizes'][r['kinds'][0]]
    assert (z['bytes'], z['total'], z['active'])==(info['bytes'], info['total'], info['active'])
    assert info['bytes']==sum(t.nbytes for t in tensors_of(out).values())
    assert (out/'report.png').read_bytes()[:8]==b'\x89PNG\r\n\x1a\n'
    for k in r['kinds']:
        assert r['sizes'][k]['routed'] <= r['sizes']['teacher']['routed']*r['recipe']['keep']*(1+1e-9) or k!='slim', k
        assert set(r['evaluation'][k])==set(r['held_out']['tokens']) | {'mean'}
        assert len(r['fvu'][k])==r['source']['layers']-r['source']['dense_layers']
    return r, info

def check_files(out):
    "Nothing is left of the work, and nothing but a checkpoint and its report is there"
    assert not out.with_name(out.name+'.partial').exists()
    assert not (out/'states').exists()
    rest = [f.name for f in out.iterdir() if not f.name.startswith(('model-','tokenizer','special_tokens')) and f.name not in
            ('config.json','generation_config.json','chat_template.jinja','model.safetensors.index.json','report.json','report.png','README.md')]
    assert rest==[]
    c = json.loads((out/'config.json').read_text())
    assert 'quantization_config' not in c and 'auto_map' not in c
    assert c['num_nextn_predict_layers']==0
    if c['model_type']=='deepseek_v3': assert (c['scoring_func'], c['topk_method'])==('sigmoid','noaux_tc')
    index = json.loads((out/'model.safetensors.index.json').read_text())
    tensors = tensors_of(out)
    assert set(index['weight_map'])==set(tensors) and index['metadata']['total_size']==sum(t.nbytes for t in tensors.values())
    assert not any('gate_up_proj' in k for k in tensors)

def test_report_says_all_that_it_should(demo_run):
    "Source and its hash, recipe, seed, bytes and exact parameters before and after, FVU per layer and step, loss per domain and KL, tokens, seconds, memory, versions"
    run, out = demo_run
    r, info = check_report(run, out); check_files(out)
    assert r['source']['name']=='demo' and len(r['recipe']['source'])==64 and r['recipe']['seed']==0 and r['recipe']['keep']==.25
    before = inspect(Checkpoint(resolve_source('demo')))
    assert {k: r['source'][k] for k in before}==before
    assert r['sizes']['teacher']['total']==before['total'] and r['sizes']['teacher']['active']==before['active']
    assert info['parameters']['routed experts']*4==before['parameters']['routed experts']
    assert r['kinds']==['slim','reap','mean']
    for i in map(str, range(1, 6)): assert set(r['fvu']['slim'][i])=={'built','fitted'} and set(r['fvu']['reap'][i])=={'built'}
    for k in r['kinds']:
        for d in 'chat','code','docs','mean':
            e = r['evaluation'][k][d]
            assert e['kl']>0 and 0<e['agreement']<1 and e['loss_student']>e['loss_teacher']
            assert e['loss_teacher']==r['evaluation']['slim'][d]['loss_teacher']
    assert sum(r['calibration']['tokens'].values())==4096 and sum(r['held_out']['tokens'].values())==2048
    assert set(r['calibration']['tokens'])=={'chat','code','docs'} and r['calibration']['sha256']!=r['held_out']['sha256']
    assert all(v>0 for v in r['seconds'].values()) and {'read','teacher','slim: fit','write','evaluation'} <= set(r['seconds'])
    assert r['peak_rss']>50e6 and r['peak_vram']==(0 if not torch.cuda.is_available() else r['peak_vram'])
    assert set(r['versions'])>={'moe_fuse','torch','transformers','python'}

def test_slim_beats_pruning_and_averaging_at_the_same_bytes(demo_run):
    "The reason for the package; 4,096 calibration tokens are enough to see it"
    e = {k: v['mean']['kl'] for k,v in demo_run[0].report['evaluation'].items()}
    assert e['slim']<.85*e['reap']<e['mean'], e

def test_the_command_gives_the_same_tensors_and_one_json_document(demo_run, tmp_path):
    "A second run with the same seed, in another process"
    r = subprocess.run([sys.executable, '-m', 'moe_fuse', 'run', 'demo', str(tmp_path/'again'), '--json', *(w for k,v in DEMO.items() for w in (f'--{k.replace("_","-")}', str(v)))],
                       capture_output=True, text=True, cwd=root)
    assert r.returncode==0, r.stderr
    assert strict(r.stdout)==strict((tmp_path/'again/report.json').read_text())
    for i in range(6): assert f'layer {i}' in r.stderr, 'progress names the layer'
    assert shard_bytes(tmp_path/'again')==shard_bytes(demo_run[1])

def test_another_seed_gives_another(small, tiny_teacher, tmp_path):
    for name,seed in dict(a=0, b=0, c=1).items(): small(tiny_teacher, tmp_path/name, seed=seed, distill_steps=4, baselines=[])
    a, b, c = (shard_bytes(tmp_path/n) for n in 'abc')
    assert a==b
    assert [k for k in a if a[k]!=c[k]]==[f'model-{i:05}-of-00004.safetensors' for i in (3, 4)], 'routed layers differ, all else is copied'

def test_keep_1_in_float32_is_the_teacher(small, tmp_path):
    "The embedded FP8 teacher, dequantised: student in memory, student on disk and teacher agree"
    run = small('demo', tmp_path/'out', keep=1., dtype='float32', baselines=[])
    ids, lengths, want = in_memory(run, 'teacher')
    got = stock_logits(tmp_path/'out', ids, lengths)
    assert (got-want).abs().max() <= 1e-4 and (in_memory(run, 'slim')[2]-want).abs().max() <= 1e-4
    assert run.report['evaluation']['slim']['mean']['kl'] <= 1e-6 and run.report['evaluation']['slim']['mean']['agreement']>.999
    assert run.report['sizes']['slim']['total']==run.report['sizes']['teacher']['total']
    check_files(tmp_path/'out')

# what comes in, what goes out

def source(folder, base=V3, how='float32', shards=1, auto_map=False, **changes):
    config, disk, _ = pack(*tiny(base, **changes), how)
    if auto_map: config['auto_map'] = dict(AutoConfig='configuration_deepseek.DeepseekConfig', AutoModelForCausalLM='modeling_deepseek.DeepseekForCausalLM')
    write(folder, config, disk, shards)
    if auto_map:
        for f in 'configuration_deepseek', 'modeling_deepseek': (folder/f'{f}.py').write_text("raise SystemExit('code of a checkpoint was run')\n")
    return folder

VARIANTS = {
    'plain': ({}, {}), 'bfloat16-teacher': (dict(how='bfloat16'), {}), 'awq': (dict(how='awq', shards=3), {}), 'mixed': (dict(how='mixed'), {}), 'fp8': (dict(how='fp8'), {}),
    'float16-student': ({}, dict(dtype='float16')), 'float32-student': (dict(how='fp8'), dict(dtype='float32')),
    'v2': (dict(base=V2), {}), 'v2-awq': (dict(base=V2, how='mixed', auto_map=True), {}), 'v2-reap': (dict(base=V2), dict(method='reap')),
    'v2-groups-reap': (dict(base=V2, topk_method='group_limited_greedy', n_group=4, topk_group=2), dict(method='reap', keep=.5)),
    'tied': (dict(tie_word_embeddings=True), {}), 'reap': ({}, dict(method='reap', baselines=['mean'])), 'reap-0.6': ({}, dict(method='reap', keep=.6)),
    'always-on': ({}, dict(keep=.5, shared_share=.5)), 'v2-always-on': (dict(base=V2), dict(keep=.5, shared_share=.5)), 'keep-0.3': ({}, dict(keep=.3)),
    'odd-share': ({}, dict(keep=.5, shared_share=.37)), 'distilled': ({}, dict(distill_steps=3)), 'half': ({}, dict(keep=.5))}

@pytest.mark.parametrize('name', VARIANTS)
def test_student_loads_stock_and_gives_the_logits(small, name, tmp_path):
    "To 1e-4 in float32, whatever the teacher is stored in and the student is written in"
    src, how = VARIANTS[name]
    run = small(source(tmp_path/'src', **src), tmp_path/'out', **dict(baselines=[]) | how)
    ids, lengths, want = in_memory(run, how.get('method', 'slim'))
    assert want.std()>.1
    got = stock_logits(tmp_path/'out', ids, lengths)
    assert (got-want).abs().max() <= 1e-4
    check_report(run, tmp_path/'out'); check_files(tmp_path/'out')

def test_router_stays_bit_for_bit(small, tiny_teacher, tmp_path):
    "Its weight keeps float32 and the bias too, whatever the student's dtype"
    small(tiny_teacher, tmp_path/'out', baselines=[], dtype='bfloat16')
    a, b = tensors_of(tiny_teacher), tensors_of(tmp_path/'out')
    routers = [k for k in a if '.mlp.gate.' in k]
    assert len(routers)==4 and all(torch.equal(a[k], b[k]) and b[k].dtype==torch.float32 for k in routers)

def test_keep_too_small_for_reap_leaves_it_out(small, tmp_path):
    "16 experts at 0.25 / 2 leave 2, and the router wants 4 of them; slim needs none of that"
    run = small(source(tmp_path/'src', moe_intermediate_size=64), tmp_path/'out', keep=.125)
    assert run.report['kinds']==['slim','mean'] and 'reap' not in run.report['evaluation'] and 'reap' not in run.report['sizes']
    stock_logits(tmp_path/'out', torch.arange(5, 40), [35])
    with pytest.raises(BadInput, match='experts are fewer'): small(tmp_path/'src', tmp_path/'reap', keep=.125, method='reap')
    assert not (tmp_path/'reap').exists() and not (tmp_path/'reap.partial').exists()

def test_keep_so_small_that_no_engine_could_run_it_is_refused_or_works(small, tiny_teacher, tmp_path):
    "0.05 of 32 neurons is one: either a clear refusal, or a checkpoint that loads and runs"
    try: run = small(tiny_teacher, tmp_path/'out', keep=.05)
    except BadInput as e:
        assert 'keep' in str(e) and not (tmp_path/'out').exists() and not (tmp_path/'out.partial').exists(); return
    assert 'reap' not in run.report['kinds']
    ids, lengths, want = in_memory(run, 'slim')
    assert (stock_logits(tmp_path/'out', ids, lengths)-want).abs().max() <= 1e-4

@pytest.mark.parametrize('how', ['fp8', 'awq'])
def test_a_device_budget_changes_no_bit(small, how, tmp_path):
    "Experts that stay packed, or on disk, give the tensors that floats give"
    config, disk, _ = pack(*tiny(V3), how)
    teacher = write(tmp_path/'teacher', config, disk)
    b = layer_bytes(Checkpoint(teacher), 'model.layers.2')
    budgets = dict(floats=None, packed=b.rest+b.packed+2*b.expert, disk=b.rest+2*b.expert)
    assert [place_experts(b, n) for n in budgets.values()]==list(budgets)
    runs = {k: (small(teacher, tmp_path/k, device_budget=n), shard_bytes(tmp_path/k))[1] for k,n in budgets.items()}
    assert runs['packed']==runs['floats'] and runs['disk']==runs['floats']

def test_a_device_budget_too_small_for_one_expert_is_refused(tmp_path, capfd):
    assert main(['run', 'demo', str(tmp_path/'out'), '--device-budget', '100KB', '--tokens', '4096', '--eval-tokens', '2048'])==2
    assert 'too small' in capfd.readouterr().err and not list(tmp_path.iterdir())

def test_batches_of_another_size_change_nothing(small, tiny_teacher, tmp_path, monkeypatch):
    "Float32 noise of 1e-7 may grow by the condition number of the fit, which the ridge holds under 1e4 times the spread of the diagonal; nothing is chosen differently"
    a = small(tiny_teacher, tmp_path/'a', dtype='float32', keep=.5, baselines=[])
    monkeypatch.setattr(TokenSet.batches, '__defaults__', (700,))
    assert max(len(l) for _,_,l in a.held.batches()) < len(a.held.lengths)
    b = small(tiny_teacher, tmp_path/'b', dtype='float32', keep=.5, baselines=[])
    x, y = tensors_of(tmp_path/'a'), tensors_of(tmp_path/'b')
    assert x.keys()==y.keys()
    for k in x:
        if k.endswith('down_proj.weight') and 'layers.0.' not in k: assert (x[k]-y[k]).abs().max() <= 1e-3*x[k].abs().max(), k
        else: assert torch.equal(x[k], y[k]), k
    for u,v in zip(a.report['evaluation']['slim']['mean'].values(), b.report['evaluation']['slim']['mean'].values()): assert abs(u-v) <= 1e-3*abs(u)

@pytest.mark.parametrize('base', [V3, V2], ids=['v3', 'v2'])
@pytest.mark.parametrize('where', ['attend', 'combine', 'block_forward'])
def test_a_batch_that_runs_out_of_memory_is_done_again_and_counted_once(small, base, where, tmp_path, monkeypatch):
    "At keep 1/2 nothing is chosen differently and the fit differs by float32 noise; counting a batch twice would move the fit by far more"
    import moe_fuse.pipeline as p
    src, real, calls = write(tmp_path/'src', *tiny(base)), getattr(p, where), []
    a = small(src, tmp_path/'a', dtype='float32', keep=.5, baselines=[])
    def tight(*args, **kw):
        out = real(*args, **kw); calls.append(len(out))
        if len(out)>700: raise torch.OutOfMemoryError('there was room for 700 tokens')
        return out
    monkeypatch.setattr(p, where, tight)
    b = small(src, tmp_path/'b', dtype='float32', keep=.5, baselines=[])
    assert max(calls)>700 and sum(n>700 for n in calls)<8                        # the size that fitted is kept
    x, y = tensors_of(tmp_path/'a'), tensors_of(tmp_path/'b')
    for k in x: assert (x[k]-y[k]).abs().max() <= 1e-3*x[k].abs().max(), k
    for u,v in zip(a.report['evaluation']['slim']['mean'].values(), b.report['evaluation']['slim']['mean'].values()): assert abs(u-v) <= 1e-3*abs(u)

# widths that differ

@pytest.mark.parametrize('base', [V3, V2, V3|dict(n_shared_experts=3)], ids=['v3', 'v2', 'three shared'])
def test_widths_that_differ_are_padded_and_load_stock(small, base, tmp_path):
    "Also where the shared expert is padded, and through distillation; padding is zero and stays zero"
    run = small(write(tmp_path/'src', *tiny(base)), tmp_path/'out', keep={1: 11, '2': [0, 20]*8}, dtype='float32', distill_steps=2, baselines=['reap'])
    r, s = run.report, run.report['sizes']['slim']
    assert (r['student']['expert_width'], s['routed'], r['recipe']['keep'])==(24, 3*48*(16*11+8*20), (16*11+8*20)/(2*16*32))
    assert s['padded_bytes']-s['bytes']==4*3*48*(2*16*24 + 2*(r['student']['shared_experts']*24-base['n_shared_experts']*32) - 16*11-8*20)
    assert f"{s['padded_bytes']/1e6:,.1f} MB with its padding" in str(run)
    w = tensors_of(tmp_path/'out')
    alive = lambda l,e: {k: int((w[f'model.layers.{l}.mlp.experts.{e}.{k}_proj.weight']!=0).any(d).sum()) for k,d in (('gate', 1), ('up', 1), ('down', 0))}
    assert all(set(alive(1, e).values())=={11} and set(alive(2, e).values())=={20*(e%2)} for e in range(16))
    ids, lengths, logits = in_memory(run, 'slim')
    assert (stock_logits(tmp_path/'out', ids, lengths)-logits).abs().max() <= 1e-4*logits.abs().max()

def test_equal_widths_are_a_uniform_student(small, tiny_teacher, tmp_path):
    a, b = (small(tiny_teacher, tmp_path/n, keep=k, dtype='float32', baselines=[]).report for n,k in (('a', {1: 16, 2: 16}), ('b', .5)))
    assert a['recipe']['keep']==.5 and abs(a['evaluation']['slim']['mean']['kl']/b['evaluation']['slim']['mean']['kl']-1) < 1e-3
    assert {k: a['sizes']['slim'][k] for k in b['sizes']['slim']}==b['sizes']['slim'] and a['student']['expert_width']==b['student']['expert_width']==16

@pytest.mark.parametrize('kw,say', [(dict(keep={1: 8}), 'layers \\[1\\], the layers with experts are \\[1, 2\\]'), (dict(keep={1: 8, 2: 33}), 'layer 2: .*0..32'), (dict(keep={1: 0, 2: 8}), 'layer 1: .*not all 0'),
    (dict(keep={1: 8, 2: [8]*15}), 'layer 2: .*16 numbers'), (dict(keep={1: 8, 2: 8}, method='reap'), 'need method slim'), (dict(keep={1: 8, 2: 8}, shared_share=.5), 'no shared_share')])
def test_widths_that_can_not_be_are_refused(kw, say, small, tiny_teacher, tmp_path):
    with pytest.raises(BadInput, match=say): small(tiny_teacher, tmp_path/'out', **kw)
    assert not list(tmp_path.iterdir())

# killed, and continued

def words(src, out, **kw): return ['run', str(src), str(out), *(w for k,v in (DEMO | kw).items() for w in (f'--{k.replace("_","-")}', str(v)))]

def kill_at(argv, partial, layer):
    "Start the command and kill it as soon as it has done this many layers"
    p = subprocess.Popen([sys.executable, '-m', 'moe_fuse', *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=root)
    try:
        end = time.time()+120
        while time.time()<end:
            try: done = json.loads((partial/'run.json').read_text())['layer']
            except (OSError, ValueError): done = -1
            if done>=layer: break
            assert p.poll() is None, p.stderr.read().decode()
            time.sleep(.01)
        p.send_signal(signal.SIGKILL)
        assert p.wait()==-signal.SIGKILL and done<6, 'it was through before it could be killed'
    finally:
        if p.poll() is None: p.kill()
        p.stderr.close()

def snapshot(folder): return {str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.read_bytes()) for f in sorted(folder.rglob('*')) if f.is_file()}

@pytest.mark.skipif(os.name=='nt', reason='SIGKILL')
def test_killed_and_resumed_ends_in_the_same_tensors(demo_run, tmp_path, capfd):
    "Without --resume, or with other settings, nothing is touched"
    out, partial = tmp_path/'out', tmp_path/'out.partial'
    kill_at(words('demo', out), partial, 2)
    before = snapshot(partial)
    capfd.readouterr()
    for argv,say in ((words('demo', out), '--resume'), (words('demo', out, keep=.5)+['--resume'], 'keep'), (words('demo', out, seed=4)+['--resume'], 'seed'),
                     (words('demo', out)+['--resume', '--dtype', 'float32'], 'dtype')):
        assert main(argv)==2
        o, e = capfd.readouterr()
        assert o=='' and e.count('\n')==1 and say in e and 'Traceback' not in e
        assert snapshot(partial)==before and not out.exists()
    assert main(words('demo', out)+['--resume'])==0
    assert shard_bytes(out)==shard_bytes(demo_run[1])
    check_files(out)
    a, b = (json.loads((d/'report.json').read_text()) for d in (out, demo_run[1]))
    for k in 'fvu','evaluation','sizes','student','calibration','held_out','recipe': assert a[k]==b[k], k

def test_killed_again_and_again_ends_in_the_same_tensors(small, tiny_teacher, tmp_path, monkeypatch):
    "Stopped at every place where a file takes its name, and continued"
    small(tiny_teacher, tmp_path/'straight', distill_steps=2)
    real, calls, stop = os.replace, [0], [0]
    class Killed(BaseException): pass
    def replace(a, b):
        calls[0] += 1
        if calls[0]==stop[0]: raise Killed
        real(a, b)
    monkeypatch.setattr(os, 'replace', replace)
    places = [1,2,3,4, 3,2,3, 1,2,3,4,5, 8]                                     # head and layers; more of them; config, index, report, card, the folder's name, after which it starts again; once more near the end
    for n,stop[0] in enumerate([*places, 99]):
        calls[0] = 0
        try: small(tiny_teacher, tmp_path/'out', distill_steps=2, resume=True); break
        except Killed: pass
    assert n==len(places) and shard_bytes(tmp_path/'out')==shard_bytes(tmp_path/'straight')
    check_files(tmp_path/'out')
