"A student written again is the same model, other processes load it, and it is there whole or not at all."
import json, os, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from moe_fuse.awq_loading import *
from moe_fuse.calibration import TokenSet
from moe_fuse.checkpoint import transformers_problems
from moe_fuse.cli import main
from moe_fuse.evaluation import logits_of
from moe_fuse.headers import *
from moe_fuse.layouts import *
from moe_fuse.pipeline import compress
from test_cli import refused
from test_fused_run import load
from tiny_models import *

METHODS = dict(slim='slim', pruned='reap', fused='fused')

@pytest.fixture(scope='module')
def demo(demo_run, tmp_path_factory):
    "Three layouts of the embedded teacher"
    d = tmp_path_factory.mktemp('demo')
    return dict(slim=demo_run[0]) | {l: compress('demo', d/l, **DEMO, method=METHODS[l], baselines=(), quiet=True) for l in ('pruned', 'fused')}

@pytest.fixture(scope='module')
def tinies(small, tmp_path_factory):
    "The same of random teachers, V2 from a single file and V3 from shards"
    d, out = tmp_path_factory.mktemp('tiny'), {}
    for base,n in (V2, 1), (V3, 2):
        src = write(d/base['model_type'], *tiny(base, moe_intermediate_size=64), shards=n)
        out |= {(base['model_type'], l): small(src, d/f"{base['model_type']}-{l}", keep=.375 if l=='fused' else .5, method=m, baselines=()) for l,m in METHODS.items()}
    return out

ELSEWHERE = '''
import sys; sys.modules['moe_fuse'] = sys.modules['fastcore'] = None
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.from_numpy(np.load(sys.argv[1]))[None]
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad(): np.save(folder+'.npy', model(ids).logits[0].numpy())
    tok = AutoTokenizer.from_pretrained(folder)
    words = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=4)[0,ids.shape[1]:]
    assert len(words)==16 and tok.decode(words).strip(), folder
'''

def elsewhere(ids, folders, tmp_path): return run_elsewhere(ELSEWHERE, ids, folders, tmp_path)

def single(folder, out):
    "The same checkpoint as one file"
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns('*.safetensors', '*.index.json'))
    save_file({k: v.clone() for k,v in tensors_of(folder).items()}, out/'model.safetensors', metadata={'format':'pt'})
    return out

def check_layouts(runs, tmp_path):
    "Written again in bfloat16, sharded and from a single file: bit for bit the same tensors, logits and words in a process without moe_fuse"
    run = runs['slim']; ids = run.held.ids[:run.held.lengths[0]][:48]
    folders, want = [], []
    for l,r in runs.items():
        export(r.out, tmp_path/l); export(single(r.out, tmp_path/f'{l}-file'), tmp_path/f'{l}-again')
        a, b, c = (tensors_of(f) for f in (r.out, tmp_path/l, tmp_path/f'{l}-again'))
        assert a.keys()==b.keys()==c.keys() and all(torch.equal(v, b[k]) and torch.equal(v, c[k]) for k,v in a.items())
        folders += [tmp_path/l, tmp_path/f'{l}-file']; want += [load(r.out)(ids[None]).logits[0].detach()]*2
    export(runs['fused'].out, tmp_path/'unfolded', 'unfolded', text='none'); export(single(tmp_path/'unfolded', tmp_path/'u'), tmp_path/'unfolded-again')
    got = elsewhere(ids, [*folders, tmp_path/'unfolded', tmp_path/'unfolded-again'], tmp_path)
    for f,g,w in zip(folders, got, want): assert (g-w).abs().max()<=1e-4, f
    assert torch.equal(got[-1], got[-2])
    return got[-1], want[-1]

def test_layouts_of_the_embedded_teacher(demo, tmp_path):
    flat, fused = (x.log_softmax(-1) for x in check_layouts(demo, tmp_path))
    assert (fused.exp()*(fused-flat)).sum(-1).mean() < 5e-4                     # its sums are rounded to bfloat16: FP8 costs this teacher 0.004

@pytest.mark.parametrize('base', ['deepseek_v2', 'deepseek_v3'])
def test_layouts_of_random_teachers(base, tinies, tmp_path): check_layouts({l: tinies[base, l] for l in METHODS}, tmp_path)

@pytest.mark.parametrize('dtype', ['fp8', 'awq'])
@pytest.mark.parametrize('base,layout', [(b, l) for b in ('deepseek_v2', 'deepseek_v3') for l in METHODS])
def test_packed(base, layout, dtype, tinies, texts, tmp_path):
    "Tensor by tensor the rounded student, AWQ by AutoAWQ's own code; the report has sizes and KL, and the folder for unfolding is gone"
    run, unfolds = tinies[base, layout], dict(layout='unfolded') if layout=='fused' else {}
    r = export(run.out, tmp_path/'o', dtype=dtype, group_size=16, n_tokens=2048, **unfolds); e = r['export']
    assert sorted(f.name for f in tmp_path.iterdir())==['o']
    before = Checkpoint(export(run.out, tmp_path/'plain', text='none', **unfolds) and tmp_path/'plain'); new = Checkpoint(tmp_path/'o')
    back = (lambda w: dequantize_fp8(*quantize_fp8(w))) if dtype=='fp8' else (lambda w: dequantize_awq(*quantize_awq(w, 16)))
    for k in before.entries: assert torch.equal(new.weight(k), back(before.weight(k)) if len(new.parts(k))>1 else before.weight(k)), k
    assert all(len(new.parts(k))==(3 if dtype=='awq' else 2) for k in before.entries if '.experts.' in k or 'self_attn' in k and '_proj' in k)
    if dtype=='awq':
        dequantize = pytest.importorskip('awq.utils.packing_utils', reason='autoawq is not installed; make set-up installs it').dequantize_gemm
        for k in (k for k in new.entries if k.endswith('.qweight')):
            q, z, s = (new.stored(k.replace('qweight', p)) for p in ('qweight', 'qzeros', 'scales'))
            assert torch.equal(dequantize(q, z, s, 4, 16).T, new.weight(k.replace('.qweight', '.weight')).half()), k
    assert e['bytes']==new.nbytes==r['student']['bytes'] and e['bytes_before']==Checkpoint(run.out).nbytes and json.loads((tmp_path/'o/report.json').read_text())==r
    assert e['evaluation']['mean']['kl']>0 and e['text']==texts[1] and e['layout']==('unfolded' if unfolds else layout)
    card = (tmp_path/'o/README.md').read_text()
    assert f"-{dtype.upper()}\n" in card and f"{e['evaluation']['mean']['kl']:.4f} nats" in card and f'| bytes | {new.nbytes:,} ' in card and str(tmp_path) not in card

def test_the_measured_kl_is_that_of_the_two_models(tinies, tmp_path):
    run = tinies['deepseek_v3', 'slim']
    r = export(run.out, tmp_path/'o', dtype='awq', group_size=16, n_tokens=2048)
    with torch.no_grad(): a, b = (logits_of(Checkpoint(f), run.held)(0, len(run.held)).double().log_softmax(-1) for f in (run.out, tmp_path/'o'))
    kl, last, domain = (a.exp()*(a-b)).sum(-1), torch.tensor(run.held.lengths).cumsum(0)-1, np.repeat(run.held.domains, run.held.lengths)
    keep = torch.ones(len(kl), dtype=torch.bool); keep[last] = False
    assert abs(r['export']['evaluation']['mean']['kl'] - np.mean([kl[keep & torch.from_numpy(domain==d)].mean() for d in set(domain)])) < 1e-6

def test_fp8_in_transformers_where_blocks_divide(tmp_path):
    "Rows and columns in multiples of 128: its own loader gives the logits of the weights that were written"
    src = write(tmp_path/'s', *tiny(V3, num_hidden_layers=2, hidden_size=128, intermediate_size=256, moe_intermediate_size=128, q_lora_rank=128, kv_lora_rank=96, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32))
    export(src, tmp_path/'o', dtype='fp8', text='none')
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path/'o', output_loading_info=True)
    assert not any(info.values()), info
    t = TokenSet([('a', list(range(40, 90)))])
    with torch.no_grad(): got, want = model.float()(t.ids[None]).logits[0], logits_of(Checkpoint(tmp_path/'o'), t)(0, 50)
    p, q = want.log_softmax(-1), got.log_softmax(-1)
    assert (p.exp()*(p-q)).sum(-1).mean()<.01                             # without a GPU it unpacks to bfloat16

# what transformers would misread

MISFITS = [dict(n_group=None), dict(n_group=16, topk_group=8), dict(n_group=3), dict(n_group=8, topk_group=1)]

@pytest.mark.parametrize('change', MISFITS, ids=str)
def test_what_is_refused_does_fail(change, tmp_path):
    "Each misfit of the router makes `transformers` raise, or choose an expert whose group is out; without it neither happens"
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3TopkRouter, DeepseekV3MoE
    def broken(changes):
        c = {k: v for k,v in (V3 | changes).items() if k!='model_type'}
        torch.manual_seed(0)
        try:
            moe = DeepseekV3MoE(DeepseekV3Config(**c)); moe.gate.weight.data.normal_(); x = torch.randn(64, c['hidden_size'])
            _,_,chosen = moe.gate(x)
            return len({int(i)//(c['n_routed_experts']//c['n_group']) for i in chosen[0]})>c['topk_group'] or any(len({int(i)//(c['n_routed_experts']//c['n_group']) for i in row})>c['topk_group'] for row in chosen)
        except Exception: return True
    assert not broken({}) and broken(change) and transformers_problems(V3 | change) and not transformers_problems(V3)
    with pytest.raises(BadInput, match='transformers would not run it'): export(write(tmp_path/'s', *(lambda c, t: (c | change, t))(*tiny(V3))), tmp_path/'o')
    assert [f.name for f in tmp_path.iterdir()]==['s']

# refusals

@pytest.mark.parametrize('layout,more,say', [('slim', ['--layout', 'unfolded'], 'is slim, so it can be written as slim'), ('pruned', ['--layout', 'slim'], 'is pruned'), ('fused', ['--layout', 'pruned'], 'as fused or unfolded'),
                                             ('fused', ['--dtype', 'awq'], 'no engine reads fused layers in awq'), ('fused', ['--dtype', 'gguf:f16'], '--layout unfolded writes'), ('slim', ['--layout', 'flat'], "layout 'flat' is none of"),
                                             *(('slim', ['--dtype', 'awq', '--group-size', g], f'group_size {g} does not divide') for g in ('7', '0', '-5')), ('slim', ['--dtype', 'fp8', '--eval', 'nothing.jsonl'], 'nothing.jsonl'),
                                             ('fused', ['--dtype', 'fp8', '--layout', 'unfolded', '--eval', 'nothing.jsonl'], 'nothing.jsonl')])
def test_refused(layout, more, say, tinies, tmp_path, capfd):
    (tmp_path/'o').mkdir(); refused(['export', tinies['deepseek_v3', layout].out, tmp_path/'o'/'out', *more], capfd, say, watch=[tmp_path])

def test_out_that_is_there_stays_as_it_was(tinies, tmp_path, capfd):
    (tmp_path/'out').mkdir(); (tmp_path/'out'/'mine').write_text('x'); (tmp_path/'new.unfolded').mkdir(); (tmp_path/'new.unfolded'/'mine').write_text('x')
    refused(['export', tinies['deepseek_v3', 'slim'].out, tmp_path/'out'], capfd, 'not an empty folder', watch=[tmp_path])
    refused(['export', tinies['deepseek_v3', 'fused'].out, tmp_path/'new', '--layout', 'unfolded', '--dtype', 'fp8'], capfd, 'new.unfolded', watch=[tmp_path])

def test_out_in_or_at_the_student(tinies, tmp_path, capfd):
    "The student stays as it was, and a folder made inside is a student of its own"
    run = tinies['deepseek_v3', 'slim']; shutil.copytree(run.out, tmp_path/'s')
    refused(['export', tmp_path/'s', tmp_path/'s'], capfd, 'not an empty folder', watch=[tmp_path])
    for command in ['export', tmp_path/'s', '/'], ['export', tinies['deepseek_v3', 'fused'].out, '/', '--layout', 'unfolded', '--dtype', 'fp8']: refused(command, capfd, '/: is no folder that can be made', watch=[tmp_path])
    assert main(['export', str(tmp_path/'s'), str(tmp_path/'s'/'in')])==0 and shard_bytes(tmp_path/'s')==shard_bytes(run.out)
    stock(tmp_path/'s'/'in', torch.bfloat16)

@pytest.mark.parametrize('method', ['random', 'ream', 'seeds', 'hc_smoe'])
def test_students_of_the_baselines_have_a_layout(method, tinies, small, tmp_path):
    r = tinies['deepseek_v3', 'slim'].report['source']['name']
    run = small(r, tmp_path/'s', keep=.5, method=method, baselines=()); layout = 'pruned' if method in ('random', 'ream') else 'fused'
    assert export(run.out, tmp_path/'o', layout)['export']['layout']==layout and tensors_of(tmp_path/'o').keys()==tensors_of(run.out).keys()
    if method=='seeds':
        with pytest.raises(BadInput, match=f"{run.out}: mode 'multiplex_mixture' mixes"): export(run.out, tmp_path/'flat', 'unfolded', 'fp8')
        assert sorted(f.name for f in tmp_path.iterdir())==['o', 's']

BROKEN = [dict(kinds=5), dict(kinds=[]), dict(kinds=['slop']), dict(evaluation={}), dict(sizes=3), dict(export=3), dict(export={}), dict(recipe=7)]

@pytest.mark.parametrize('change', BROKEN, ids=str)
def test_a_damaged_report_is_named_before_anything_is_written(change, tinies, tmp_path, capfd):
    shutil.copytree(tinies['deepseek_v3', 'slim'].out, tmp_path/'s'); f = tmp_path/'s/report.json'
    f.write_text(json.dumps(json.loads(f.read_text()) | change)); refused(['export', tmp_path/'s', tmp_path/'o'], capfd, 'report.json: is damaged', watch=[tmp_path])
    refused(['heal', tmp_path/'s', tmp_path/'o', '--teacher', tinies['deepseek_v3', 'slim'].report['source']['name']], capfd, 'report.json: is damaged', watch=[tmp_path])

def test_what_bfloat16_rounds_is_measured(tinies, small, tmp_path):
    "A student in float32, and the sums of an unfolded one; what had bfloat16 already is the same"
    run = small(tinies['deepseek_v3', 'slim'].report['source']['name'], tmp_path/'s', keep=.5, baselines=(), dtype='float32')
    a, b, c = export(run.out, tmp_path/'a', n_tokens=2048), export(tinies['deepseek_v3', 'fused'].out, tmp_path/'b', 'unfolded', n_tokens=2048), export(tinies['deepseek_v3', 'slim'].out, tmp_path/'c')
    assert all(0<r['export']['evaluation']['mean']['kl']<1e-2 for r in (a, b)) and c['export']['not_measured']=='nothing was rounded'

def test_a_healed_student_keeps_report_card_and_layout(tinies, texts, tmp_path, capfd):
    src = Path(tinies['deepseek_v3', 'slim'].report['source']['name'])
    for layout in 'slim', 'fused':
        run = tinies['deepseek_v3', layout]; shutil.copytree(run.out, tmp_path/layout); (src/'README.md').write_text('---\nlicense: mit\n---\n'); out = tmp_path/f'{layout}-healed'
        assert main(['heal', str(tmp_path/layout), str(out), '--teacher', str(src), '--data', texts[0], '--eval', texts[1], '--tokens', '4096', '--batch-tokens', '2048', '--seq-len', '128', '--eval-tokens', '2048'])==0
        r, card, info = json.loads((out/'report.json').read_text()), (out/'README.md').read_text(), inspect(Checkpoint(out))
        assert r['kinds'][0]==layout and r['student']==info and r['healing']['steps']==2 and r['evaluation']==run.report['evaluation']
        assert 'license: mit' in card and 'After healing, end to end' in card and f"{info['total']:,}, of them {info['active']:,} active" in card and str(tmp_path) not in card
        e = export(out, tmp_path/f'{layout}-again', layout); card = (tmp_path/f'{layout}-again/README.md').read_text()
        assert e['export']['layout']==layout and 'After healing, end to end' in card and 'license: mit' in card
    with pytest.raises(BadInput, match='biases of mode exact are not zero'): export(tmp_path/'fused-healed', tmp_path/'flat', 'unfolded', 'fp8')   # they were trained
    (src/'README.md').unlink()

def test_a_text_that_is_gone_is_no_error(tinies, tmp_path):
    r = tinies['deepseek_v3', 'slim']; shutil.copytree(r.out, tmp_path/'s')
    d = json.loads((tmp_path/'s/report.json').read_text()); d['recipe']['eval_text'] = 'gone.jsonl'; (tmp_path/'s/report.json').write_text(json.dumps(d))
    e = export(tmp_path/'s', tmp_path/'o', dtype='fp8')['export']
    assert 'gone.jsonl' in e['not_measured'] and 'evaluation' not in e and 'not measured: ' in (tmp_path/'o/README.md').read_text()

# full disks and kills

FULL = '''
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),)*2)
from moe_fuse.cli import main
sys.exit(main(sys.argv[2:]))
'''

@pytest.mark.parametrize('kb,more', [(30, ['--layout', 'unfolded']), (215, ['--layout', 'unfolded', '--dtype', 'fp8', '--eval', 'none'])], ids=['unfolding', 'packing'])
def test_full_disk_leaves_nothing(kb, more, tinies, tmp_path):
    r = subprocess.run([sys.executable, '-c', FULL, str(kb*1000), 'export', str(tinies['deepseek_v3', 'fused'].out), str(tmp_path/'o'), *more], capture_output=True, text=True, cwd=root)
    assert r.returncode==2 and r.stdout=='' and 'Traceback' not in r.stderr and 'large' in r.stderr.splitlines()[-1], r.stderr
    assert not list(tmp_path.iterdir())

KILL = '''
import os, signal, sys
import moe_fuse.checkpoint as m, moe_fuse.quantized_checkpoint, moe_fuse.fused_files
old, n = m.CheckpointWriter.write, [0]
def write(self, *a):
    old(self, *a); n[0] += 1
    if n[0]==int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)
m.CheckpointWriter.write = write
from moe_fuse.cli import main
sys.exit(main(sys.argv[2:]))
'''

@pytest.mark.parametrize('at,more', [(2, ['--dtype', 'fp8']), (3, ['--dtype', 'bf16'])], ids=['fp8', 'bf16'])
def test_killed_leaves_nothing_that_looks_complete(at, more, tinies, tmp_path):
    "The final name is not there, the partial folder has no index; the same command then goes through"
    argv = ['export', str(tinies['deepseek_v3', 'slim'].out), str(tmp_path/'o'), '--eval', 'none', *more]
    assert subprocess.run([sys.executable, '-c', KILL, str(at), *argv], capture_output=True, cwd=root).returncode==-9
    assert [f.name for f in tmp_path.iterdir()]==['o.partial'] and not list((tmp_path/'o.partial').glob('*.index.json')) and list((tmp_path/'o.partial').glob('*.safetensors'))
    with pytest.raises(BadInput): Checkpoint(tmp_path/'o.partial')
    assert main(argv)==0 and [f.name for f in tmp_path.iterdir()]==['o'] and stock(tmp_path/'o', dtype=torch.bfloat16) if more[1]!='fp8' else main(argv)==0

def test_killed_between_unfolding_and_packing(tinies, tmp_path):
    "Nothing has a final name, and the same command goes through"
    argv = ['export', str(tinies['deepseek_v3', 'fused'].out), str(tmp_path/'o'), '--layout', 'unfolded', '--dtype', 'fp8', '--eval', 'none']
    assert subprocess.run([sys.executable, '-c', KILL, '6', *argv], capture_output=True, cwd=root).returncode==-9
    assert {f.suffix for f in tmp_path.iterdir()}=={'.partial'}
    assert main(argv)==0 and [f.name for f in tmp_path.iterdir()]==['o'] and Checkpoint(tmp_path/'o')

def test_leftovers_go_and_an_interrupted_run_stays(tinies, tmp_path, capfd):
    run, left = tinies['deepseek_v3', 'slim'], tmp_path/'o.partial'
    left.mkdir(); (left/'model-00009-of-00009.safetensors').write_bytes(b'x'); (left/'modeling_fused_deepseek.py').write_text('x')
    export(run.out, tmp_path/'o')
    assert not left.exists() and not {'model-00009-of-00009.safetensors', 'modeling_fused_deepseek.py', 'states'} & {f.name for f in (tmp_path/'o').iterdir()}
    for name in 'p.partial', 'q.unfolded.partial':
        (tmp_path/name).mkdir(); (tmp_path/name/'run.json').write_text('{}'); (tmp_path/name/'model-00001-of-00004.safetensors').write_bytes(b'hours')
    refused(['export', run.out, tmp_path/'p'], capfd, 'holds an interrupted run', watch=[tmp_path])
    refused(['export', tinies['deepseek_v3', 'fused'].out, tmp_path/'q', '--layout', 'unfolded', '--dtype', 'fp8'], capfd, 'holds an interrupted run', watch=[tmp_path])
