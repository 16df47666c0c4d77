"Fused students are evaluated and healed as any other: what was trained is what loads, with moe_fuse and without it."
import json
import pytest, torch
from moe_fuse.baselines import BASELINES
from moe_fuse.calibration import *
from moe_fuse.checkpoint import CheckpointWriter
from moe_fuse.cli import main
from moe_fuse.evaluation import evaluate
from moe_fuse.fused_files import MODELLING
from moe_fuse.heal import *
from moe_fuse.headers import *
from test_fused_run import elsewhere, load, logits, longest
from test_heal import SMALL, sums
from tiny_models import *

@pytest.fixture(scope='module')
def teachers(tmp_path_factory):
    d = tmp_path_factory.mktemp('teachers')
    return {c['model_type']: write(d/c['model_type'], *tiny(c, moe_intermediate_size=64)) for c in (V2, V3)}

@pytest.fixture(scope='module')
def students(teachers, small, tmp_path_factory):
    "In float32, so that nothing is rounded on the way: (Run, teacher)"
    d = tmp_path_factory.mktemp('students')
    return {m: (small(teachers[t], d/m, method=m, keep=.375, baselines=(), dtype='float32'), teachers[t]) for m,t in (('fused','deepseek_v3'), ('hc_smoe','deepseek_v3'), ('seeds','deepseek_v2'))}

RECIPE = dict(SMALL, rank=4, kd=.5, top_k=8, lr=2e-3, spike=4., seed=0, save_every=None, eval_every=None)
CASES = {'fused': ('all','none','none'), 'hc_smoe': ('experts,norms,attention','dora','nf4'), 'seeds': ('experts,router,norms,attention','lora','none')}

@pytest.fixture(scope='module')
def healed(students, texts, tmp_path_factory):
    "method -> (folder, the model in memory, HealTrainer)"
    d, out = tmp_path_factory.mktemp('healed'), {}
    for m,(train,adapter,quantize) in CASES.items():
        run, teacher = students[m]; recipe = dict(RECIPE, train=train, adapter=adapter, quantize_base=quantize)
        tokens = healing_tokens(read_docs(texts[0]), load_tokenizer(teacher), 4096, 128)
        ex = Examples(tokens, 128, 8, teacher_topk(Checkpoint(teacher), tokens, d/f'{m}-cache', 8))
        model, trainer, guess = train_student(Checkpoint(run.out), recipe, healing_args(recipe, d/f'{m}-states', 3, 'cpu', False, checkpointing=m=='fused'), ex, None, d/'log.csv', quiet=True)
        writer = CheckpointWriter(d/m, 4); write_healed(Checkpoint(run.out), model, writer); writer.publish()
        assert guess['tokens_per_second']>0 and guess['trained']>0
        out[m] = d/m, model, trainer
    return out

def test_what_was_trained_is_what_loads(students, healed, tmp_path):
    "Here, and in one process without moe_fuse"
    ids = longest(students['fused'][0])[0][-1][:40]
    for (m,(folder,model,_)),alone in zip(healed.items(), elsewhere(ids, [f for f,_,_ in healed.values()], tmp_path)):
        mem = logits(model, [ids])
        assert (logits(load(folder), [ids])-mem).abs().max()<=1e-5 and (alone[0]-mem).abs().max()<=1e-5, m
        assert (logits(load(students[m][0].out), [ids])-mem).abs().max()>1e-3, m

def test_what_is_trained(students, healed):
    "Of a block with adapters the corrections too; the router where it is asked for, and which core an expert has never"
    for m,(folder,_,trainer) in healed.items():
        a, b, groups = tensors_of(students[m][0].out), tensors_of(folder), check_groups(CASES[m][0])
        assert a.keys()==b.keys() and all(a[k].dtype==b[k].dtype for k in a)
        same = {k for k in a if torch.equal(a[k], b[k])}
        frozen = {k for k in a if k.endswith(('groups', 'e_score_correction_bias')) or group_of(k) not in groups}
        packed = {k for k in frozen if CASES[m][2]=='nf4' and group_of(k)=='dense'}
        assert frozen-packed<=same and len(same-frozen)<=.1*len(a), (m, same-frozen, frozen-packed-same)
        assert set(trainer.weights()).isdisjoint(n for n,_ in trainer.model.named_buffers())

def test_evaluated_as_in_the_run(students, texts, capsys):
    for m,(run,teacher) in students.items():
        got, want = evaluate(run.out, teacher, texts[1], 2048), run.report['evaluation'][m]
        assert got['mean']==pytest.approx(want['mean'], rel=1e-4)
    assert main(['eval', str(run.out), '--against', str(teacher), '--data', texts[1], '--tokens', '2048', '--device', 'cpu', '--json'])==0
    assert json.loads(capsys.readouterr().out)==got

def test_padding_and_packing_change_no_loss(students, texts, tmp_path):
    run, teacher = students['seeds']
    tokens = healing_tokens(read_docs(texts[0]), load_tokenizer(teacher), 4096, 64)
    top, model = teacher_topk(Checkpoint(teacher), tokens, tmp_path, 8), whole_model(Checkpoint(run.out))
    want, got = sums(model, Examples(tokens, 64, teacher=top), 1), sums(model, Examples(tokens, 192, teacher=top, seed=1), 2)
    assert got[2]==want[2]==carries_loss(tokens).sum() and torch.allclose(got, want, rtol=2e-6)

def test_autocast_leaves_the_first_router_alone(students):
    "Products in bfloat16, the router in float32: the same tokens go to the same experts with the same weights"
    run, _ = students['fused']; ids = longest(run)[0][-1][None]
    model, seen = prepare_student(Checkpoint(run.out), 'experts'), []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda m, i, o: seen.append((i[0].detach(), *o)))
    with torch.no_grad():
        full = model(input_ids=ids).logits
        with torch.autocast('cpu', torch.bfloat16): half = model(input_ids=ids).logits
        gate = model.model.layers[1].mlp.gate; want = type(gate).forward(gate, seen[1][0].float())
    assert all(torch.equal(g, w) for g,w in zip(seen[1][1:], want))
    assert half.dtype==torch.bfloat16 and 0<(half-full).abs().median()<2**-6*full.abs().max()   # of most logits: a token that the second router sends elsewhere changes more

def test_resumed_is_the_same_to_the_last_bit(students, texts, monkeypatch, tmp_path):
    "The teacher in memory; stopped after its third step"
    run, teacher = students['fused']; do = lambda out, **kw: heal(run.out, out, teacher, texts[0], eval_data=texts[1], live_teacher=True, save_every=2, **(SMALL | dict(tokens=4096) | kw))
    class Killed(BaseException): pass
    def killed(self, args, state, control, **kw):
        if state.global_step==3: raise Killed
    with monkeypatch.context() as mp, pytest.raises(Killed): mp.setattr(HealLog, 'on_step_end', killed); do(tmp_path/'o')
    assert not (tmp_path/'o').exists() and not list((tmp_path/'o.partial').glob(MODELLING))
    do(tmp_path/'o', resume=True); do(tmp_path/'alone')
    assert shard_bytes(tmp_path/'o')==shard_bytes(tmp_path/'alone') and (tmp_path/'o'/MODELLING).read_text()==(run.out/MODELLING).read_text()

# baselines as students

@pytest.mark.parametrize('method', ['frequency', 'ream', 'merge_moe', 'random_groups', 'hc_smoe', 'seeds'])
def test_a_baseline_is_written(method, students, teachers, small, tmp_path):
    "As it was in memory, with the sizes its table says, and the router bit for bit where it keeps one"
    run, teacher = students.get(method) or (small(teachers['deepseek_v3'], tmp_path/'s', method=method, keep=.375, baselines=('reap',)), teachers['deepseek_v3'])
    ids, a, b = longest(run); info, z = inspect(Checkpoint(run.out)), run.report['sizes'][method]
    with torch.no_grad(): assert (logits(load(run.out), ids)-run.logits[method](a, b)).abs().max()<=1e-4
    assert (z['bytes'], z['total'], z['active'])==(info['bytes'], info['total'], info['active'])
    assert z['routed']<=.375*run.report['sizes']['teacher']['routed'] and 'fitted' not in run.report['fvu'][method]['1']
    assert (run.out/MODELLING).exists()==BASELINES[method].fused!=BASELINES[method].pruned
    assert ('Pruned-6E' if BASELINES[method].pruned else 'Fused-') in (run.out/'README.md').read_text()
    new = tensors_of(run.out)
    assert BASELINES[method].pruned or all(torch.equal(new[k], v) for k,v in tensors_of(teacher).items() if '.mlp.gate.' in k)

def test_run_writes_a_baseline_and_heals_it(teachers, texts, tmp_path, capfd):
    words = ['run', str(teachers['deepseek_v3']), str(tmp_path/'o'), '--method', 'seeds', '--keep', '.375', '--calibration', texts[0], '--eval', texts[1], '--tokens', '2048', '--eval-tokens', '2048', '--baselines', 'none', '--heal-tokens', '4096', '--device', 'cpu', '--json']
    assert main(words)==0
    r = json.loads(capfd.readouterr().out)
    assert r['healing']['steps']==8 and r['healing']['before']['mean']['kl']==pytest.approx(r['evaluation']['seeds']['mean']['kl'], rel=1e-3)
    assert sorted(f.name for f in tmp_path.iterdir())==['o'] and (tmp_path/'o'/MODELLING).exists(); load(tmp_path/'o')

@pytest.mark.parametrize('kw,say', [(dict(method='mone'), "method 'mone' is none of"), (dict(method='seeds', keep=.01), 'no room for a rank'), (dict(method='hc_smoe', keep=.01), 'leaves none whole'), (dict(method='ream', keep=.01), 'leaves none whole'),
                                    (dict(method='ream', keep=.1), 'fewer than the 4'), (dict(method='hc_smoe', shared_share=.2), 'needs method slim')])
def test_refused(kw, say, teachers, small, tmp_path):
    with pytest.raises(BadInput, match=say): small(teachers['deepseek_v3'], tmp_path/'s', **kw)
    assert not list(tmp_path.iterdir())

def test_fused_students_are_neither_teachers_nor_shrunk_again(students, texts, tmp_path):
    run, teacher = students['fused']
    with pytest.raises(BadInput, match="'fused_deepseek_v3' is not supported"): heal(run.out, tmp_path/'o', run.out, texts[0], **SMALL)
    with pytest.raises(BadInput, match='nothing to train in dense'): heal(write(tmp_path/'s', Checkpoint(run.out).config, {k: v for k,v in tensors_of(run.out).items() if '.layers.0.mlp.' not in k}), tmp_path/'o', teacher, texts[0], train='dense', **SMALL)
    for words in ['run', str(run.out), str(tmp_path/'o')], ['plan', str(run.out)], ['analyse', str(run.out), str(tmp_path/'o')], ['export', str(run.out), str(tmp_path/'o'), '--dtype', 'fp8']: assert main(words)==2
    assert not list(tmp_path.glob('o*'))
