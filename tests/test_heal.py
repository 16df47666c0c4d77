"Healing end to end: what is trained is what is saved, however it was cut into processes, micro-batches and interruptions."
import csv, json, math, os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from moe_fuse.calibration import *
from moe_fuse.checkpoint import CheckpointWriter
from moe_fuse.cli import main
from moe_fuse.heal import *
from moe_fuse.headers import *
from moe_fuse.healing import lr_at
from tiny_models import *

SMALL = dict(lr=1e-3, tokens=8192, batch_tokens=1024, seq_len=128, eval_tokens=2048, device='cpu', quiet=True)

@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    "Two random models: a bfloat16 student and its teacher"
    d = tmp_path_factory.mktemp('pair')
    return [write(d/n, *pack(*tiny(V3, seed), 'bfloat16')[:2]) for n,seed in (('student', 1), ('teacher', 0))]

@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')

@pytest.fixture(scope='module')
def run(pair, texts, cache): return lambda out, **kw: heal(pair[0], out, pair[1], texts[0], eval_data=texts[1], cache=cache, **(SMALL | kw))

@pytest.fixture(scope='module')
def healed(run, tmp_path_factory):
    out = tmp_path_factory.mktemp('healed')/'out'
    return run(out), out

def command(pair, texts, out, *more, **kw):
    words = [f'--{k.replace("_","-")}={v}' for k,v in (SMALL | kw).items() if k!='quiet']
    return ['heal', str(pair[0]), str(out), '--teacher', str(pair[1]), '--data', texts[0], '--eval', texts[1], *words, *more]

def worst(a, b):
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys()==b.keys()
    return max((a[k].float()-b[k].float()).abs().max().item() for k in a)

# the loss

@torch.no_grad()
def sums(model, ex, rows):
    "Cross-entropy, KL and number of predictions over all of the data, `rows` rows at a time"
    out = torch.zeros(3, dtype=torch.double)
    for i in range(0, len(ex), rows):
        b = ex.collate([ex[j] for j in range(i, min(i+rows, len(ex)))])
        logits = model(input_ids=b['input_ids'], position_ids=b['position_ids']).logits.flatten(0, 1)[b['rows']]
        out += torch.stack([*heal_losses(logits, b['input_ids'].flatten()[b['rows']+1], b['top_ids'], b['top_logp']), torch.tensor(float(len(b['rows'])))]).double()
    return out

def test_padding_and_packing_change_no_loss(pair, texts, tmp_path):
    "Rows of any length, in any company, with much or no padding; prompts and padding carry none"
    tok = load_tokenizer(pair[1])
    tokens = healing_tokens(read_docs(texts[0]), tok, 4096, 64)
    top = teacher_topk(Checkpoint(pair[1]), tokens, tmp_path, 8)
    model = whole_model(Checkpoint(pair[0]))
    want = sums(model, Examples(tokens, 64, teacher=top), 1)
    assert want[2]==carries_loss(tokens).sum() and 0<want[2]<len(tokens)-len(tokens.lengths)
    for seq_len,rows in (100, 3), (192, 2), (1000, 1):
        got = sums(model, Examples(tokens, seq_len, teacher=top, seed=seq_len), rows)
        assert got[2]==want[2] and torch.allclose(got, want, rtol=2e-6), (seq_len, got, want)

def test_only_the_assistant_is_learned_from(pair, texts):
    tok = load_tokenizer(pair[1])
    tokens = healing_tokens(read_docs(texts[0]), tok, 4096, 10**6)
    for d,ids,c in zip(tokens.domains, tokens.ids.split(tokens.lengths), carries_loss(tokens).split(tokens.lengths)):
        if d.startswith('code'): assert c[1:].all() and not c[0]; continue
        said = tok.decode(ids[c]); full = tok.decode(ids)
        assert said in full and full.index(said)>=200*.9 or not c.any()        # the first 200 characters are the user's

def test_packing_keeps_every_sequence_once_and_fits():
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 129, (500,), generator=g).tolist()
    rows = pack_rows(lengths, 128)
    assert sorted(s for r in rows for s in r)==list(range(500)) and all(sum(lengths[s] for s in r)<=128 for r in rows)
    assert sum(lengths)/(128*len(rows))>.95

def test_topk_kl_is_a_lower_bound_and_exact_with_all_words():
    g = torch.Generator().manual_seed(0)
    t, s = (2*torch.randn(32, 50, generator=g) for _ in range(2))
    p, q = t.double().softmax(-1), s.double().log_softmax(-1)
    full = (p*(p.log()-q)).sum().item()
    kls = [heal_losses(s, torch.zeros(32, dtype=torch.long), *topk_of(t, k))[1].item() for k in (1, 4, 16, 49)]
    assert kls==sorted(kls) and kls[-1]==pytest.approx(full, rel=1e-5) and kls[0]<.8*full

def test_cache_is_resumed_and_survives_a_half_written_chunk(pair, texts, tmp_path):
    tokens = healing_tokens(read_docs(texts[0]), load_tokenizer(pair[1]), 4096, 64)
    one = teacher_topk(Checkpoint(pair[1]), tokens, tmp_path/'one', 8)
    many = teacher_topk(Checkpoint(pair[1]), tokens, tmp_path/'many', 8, chunk=512)
    files = sorted((tmp_path/'many').glob('*.safetensors')); assert len(files)>3 and len(many)==len(one)==carries_loss(tokens).sum()
    kept = files[0].stat().st_mtime_ns; files[2].rename(files[2].with_suffix('.tmp')); (tmp_path/'many'/'states').write_bytes(b'x')
    again = teacher_topk(Checkpoint(pair[1]), tokens, tmp_path/'many', 8, chunk=512)
    assert files[0].stat().st_mtime_ns==kept
    n = torch.randperm(len(one), generator=torch.Generator().manual_seed(0))
    for t in many, again: assert all(torch.equal(a, b) if a.dtype==torch.long else (a-b).abs().max()<.02 for a,b in zip(t(n), one(n)))
    assert sum(f.stat().st_size for f in (tmp_path/'one').glob('*.safetensors'))==pytest.approx(len(one)*topk_bytes(8, 2048), abs=500)

# the run

def test_healing_helps_and_says_so(healed):
    h, out = healed; r = json.loads((out/'report.json').read_text())
    assert r==json.loads(json.dumps(h.report)) and r['after']['mean']['kl']<r['before']['mean']['kl'] and r['after']['mean']['loss_student']<r['before']['mean']['loss_student']
    assert r['recovered'] is None or 0<r['recovered']
    assert set(r['text']['tokens'])=={'code','chat'} or len(r['text']['tokens'])==2
    rows = list(csv.DictReader((out/'report.csv').open()))
    assert [int(x['step']) for x in rows]==list(range(1, 9)) and all(math.isfinite(float(x['ce'])) for x in rows) and any(x['eval_kl'] for x in rows)
    assert (out/'report.png').read_bytes()[:4]==b'\x89PNG' and not out.with_name('out.partial').exists() and 'healed' in repr(h)

def test_last_learning_rate_is_the_recipes(healed):
    want = [lr_at(s, 8, 1e-3) for s in range(8)]
    rows = list(csv.DictReader((healed[1]/'report.csv').open()))
    assert [float(x['learning_rate']) for x in rows]==pytest.approx(want, rel=1e-4) and healed[0].report['last_lr']==pytest.approx(want[-1], rel=1e-6)

def test_what_is_not_trained_is_untouched_and_stock_loads_it(pair, healed):
    a, b = tensors_of(pair[0]), tensors_of(healed[1])
    assert a.keys()==b.keys() and all(a[k].dtype==b[k].dtype for k in a)
    same = {k for k in a if torch.equal(a[k], b[k])}
    frozen = {k for k in a if k.endswith('e_score_correction_bias') or group_of(k) in ('attention','dense','embeddings')}
    assert frozen<=same and len(same-frozen)<=.1*len(a)
    stock(healed[1], torch.bfloat16)

@pytest.mark.parametrize('train,adapter,quantize', [('all','none','none'), ('experts,router,norms,attention','lora','none'), ('experts,attention,norms','dora','none'), ('experts,dense,router','lora','nf4'), ('attention','dora','nf4')])
def test_reloaded_logits_are_those_in_memory(train, adapter, quantize, pair, texts, cache, tmp_path):
    "A float32 student, so that nothing is rounded on the way"
    s = Checkpoint(write(tmp_path/'s', *tiny(V3, 1)))
    recipe = dict(SMALL, train=train, adapter=adapter, rank=4, quantize_base=quantize, kd=.5, top_k=8, lr=2e-3, spike=4., seed=0, save_every=None, eval_every=None)
    tokens = healing_tokens(read_docs(texts[0]), load_tokenizer(pair[1]), 4096, 128)
    ex = Examples(tokens, 128, 8, teacher_topk(Checkpoint(pair[1]), tokens, cache/'r', 8))
    model, trainer, _ = train_student(s, recipe, healing_args(recipe, tmp_path/'states', 3, 'cpu', False, checkpointing=quantize=='nf4'), ex, None, tmp_path/'log.csv', quiet=True)
    writer = CheckpointWriter(tmp_path/'out', 4); write_healed(s, model, writer); writer.publish()
    ids = tokens.ids[:128][None]
    with torch.no_grad(): mem, disk, before = (m(input_ids=ids).logits for m in (model, stock(tmp_path/'out'), stock(tmp_path/'s')))
    assert (mem-disk).abs().max()<=1e-5 and (mem-before).abs().max()>1e-3
    if train=='all':                                                           # evaluation asks the teacher about its own text
        held = healing_tokens(read_docs(texts[1]), load_tokenizer(pair[1]), 4096, 128)
        watch = Examples(held, 128, teacher=teacher_topk(Checkpoint(pair[1]), held, cache/'held', 8))
        trainer.evaluate(watch); ce, kl, n = sums(model, watch, 4).tolist(); last = trainer.state.log_history[-1]
        assert (last['eval_ce'], last['eval_kl'])==pytest.approx((ce/n, kl/n), rel=1e-5)

def test_micro_batches_change_nothing(run, healed, tmp_path):
    "Eight rows at once or two times four: one part in 2^8 is bfloat16's step on disk"
    run(tmp_path/'o', micro_rows=2)
    assert worst(tmp_path/'o', healed[1])<=2**-7

def test_the_teacher_can_be_asked_instead_of_a_cache(run, healed, tmp_path):
    h = run(tmp_path/'o', live_teacher=True)
    assert h.report['log'][0]['kl']==pytest.approx(healed[0].report['log'][0]['kl'], abs=2e-3)
    assert worst(tmp_path/'o', healed[1])<=2**-6

TWO = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=29617']
QUIET = {**os.environ, 'OMP_NUM_THREADS': '1'}

@pytest.mark.parametrize('launch', [['-m', 'moe_fuse'], ['tests/sharded_cpu.py']], ids=['DDP', 'FSDP'])
def test_two_processes_are_one(pair, texts, cache, healed, tmp_path, launch):
    "gloo on the CPU, the same batch cut in two, and with FSDP the weights too"
    r = subprocess.run([*TWO, *launch, *command(pair, texts, tmp_path/'o', '--cache', str(cache), '--json')], capture_output=True, text=True, cwd=root, env=QUIET)
    assert r.returncode==0, r.stderr[-3000:]
    report = json.loads(r.stdout)
    assert report['processes']==2 and report['log'][0]['ce']==pytest.approx(healed[0].report['log'][0]['ce'], rel=1e-5)
    assert report['after']['mean']['kl']==pytest.approx(healed[0].report['after']['mean']['kl'], rel=1e-3)
    assert worst(tmp_path/'o', healed[1])<=2**-7

def test_sharded_and_killed_it_goes_on(pair, texts, cache, healed, tmp_path):
    "FSDP: SIGKILL once there is a checkpoint; --resume ends where one process does that was left alone"
    words = [*TWO, 'tests/sharded_cpu.py', *command(pair, texts, tmp_path/'o', '--cache', str(cache), '--json', save_every=2)]
    p = subprocess.Popen(words, cwd=root, env=QUIET, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while last_checkpoint(tmp_path/'o.partial'/'states') is None and p.poll() is None: time.sleep(.005)
    assert p.poll() is None, 'it ended before it could be killed'
    for pid in [p.pid, *map(int, Path(f'/proc/{p.pid}/task/{p.pid}/children').read_text().split())]: os.kill(pid, signal.SIGKILL)
    p.wait()
    r = subprocess.run([*words, '--resume'], capture_output=True, text=True, cwd=root, env=QUIET)
    assert r.returncode==0, r.stderr[-3000:]
    log = [l for l in json.loads(r.stdout)['log'] if 'ce' in l]
    assert len(log)==8 and log[-1]['ce']==pytest.approx([l for l in healed[0].report['log'] if 'ce' in l][-1]['ce'], rel=1e-3)
    assert worst(tmp_path/'o', healed[1])<=2**-7

def test_killed_in_mid_step_it_goes_on(pair, texts, cache, run, tmp_path):
    "SIGKILL once there is a checkpoint; --resume ends with the same bytes as a run that was left alone"
    more = dict(tokens=12288, save_every=3)
    p = subprocess.Popen([sys.executable, '-m', 'moe_fuse', *command(pair, texts, tmp_path/'o', '--cache', str(cache), **more)], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    states = tmp_path/'o.partial'/'states'
    while last_checkpoint(states) is None and p.poll() is None: time.sleep(.005)
    assert p.poll() is None, 'it ended before it could be killed'
    p.send_signal(signal.SIGKILL); p.wait()
    with pytest.raises(BadInput, match='--resume'): run(tmp_path/'o', **more)
    with pytest.raises(BadInput, match='lr'): run(tmp_path/'o', resume=True, lr=.5, **more)
    half = states/'checkpoint-99'; half.mkdir(); (half/'trainer_state.json').write_text('{"global')      # what a kill while saving leaves
    h = run(tmp_path/'o', resume=True, **more)
    run(tmp_path/'alone', **more)
    assert len([l for l in h.report['log'] if 'ce' in l])==12
    assert shard_bytes(tmp_path/'o')==shard_bytes(tmp_path/'alone')

def load_state(f):
    from safetensors.torch import load_file
    return load_file(f/'model.safetensors')

class Bar:
    "Stands where the progress bar is"
    n = 0
    def update(self, n=1): pass
    unpause = set_postfix = lambda self, **kw: None

@pytest.mark.parametrize('at,factor,say', [(2, math.nan, 'step 3 of 10: the loss is nan'), (5, 40., r'step 6 of 10: the loss is [\d.]+, [\d.]+ was usual')])
def test_nan_or_a_spike_stops_the_run_and_keeps_the_last_good_checkpoint(at, factor, say, pair, texts, tmp_path):
    "The last norm is spoilt once `at` steps are done"
    recipe = dict(SMALL, lr=1e-3, seed=0, save_every=1, eval_every=None)
    ex = Examples(healing_tokens(read_docs(texts[0]), load_tokenizer(pair[1]), 8192, 128), 128, 8)
    spoilt = []
    class Spoilt(Examples):
        def __getitem__(self, i):
            if trainer.state.global_step==at and not spoilt: trainer.model.model.norm.weight.data *= factor; spoilt.append(i)
            return super().__getitem__(i)
    ex.__class__ = Spoilt
    trainer = HealTrainer(prepare_student(Checkpoint(pair[0]), 'norms'), healing_args(recipe, tmp_path/'s', 10, 'cpu', False), ex.collate, ex, kd=0.)
    trainer.add_callback(HealLog(trainer, Bar(), tmp_path/'log.csv', 1024))
    with pytest.raises(BadInput, match=f'healing stopped at {say}') as e: trainer.train()
    f = last_checkpoint(tmp_path/'s')
    assert str(f) in str(e.value) and all(v.isfinite().all() and v.abs().max()<3 for v in load_state(f).values())
    assert int(f.name.split('-')[1]) in (at, at-1)                             # a batch is fetched before the step before it is saved

def test_run_heals_when_asked(pair, texts, tmp_path, capfd):
    words = ['run', str(pair[1]), str(tmp_path/'o'), '--calibration', texts[0], '--eval', texts[1], '--tokens', '2048', '--eval-tokens', '2048', '--baselines', 'none', '--heal-tokens', '4096', '--device', 'cpu', '--json']
    assert main(words)==0
    r = json.loads(capfd.readouterr().out)
    assert r['healing']['steps']==8 and r['healing']['before']['mean']['kl']==pytest.approx(r['evaluation']['slim']['mean']['kl'], rel=1e-3)
    assert sorted(f.name for f in tmp_path.iterdir())==['o']; stock(tmp_path/'o')

# what is refused, before anything long starts

def refused(pair, texts, tmp_path, *say, student=None, data=None, **kw):
    with pytest.raises(BadInput) as e: heal(student or pair[0], tmp_path/'out', pair[1], data or texts[0], **(SMALL | dict(eval_data=texts[1]) | kw))
    for s in say: assert s in str(e.value), str(e.value)
    assert '\n' not in str(e.value) and not list(tmp_path.glob('out*'))

def test_different_vocabularies(pair, texts, tmp_path):
    refused(pair, texts, tmp_path, 'vocabularies differ: 1024 and 2048', student=write(tmp_path/'s', *tiny(V3, vocab_size=1024)))
    other = write(tmp_path/'t', *tiny(V3)); f = other/'tokenizer.json'; d = json.loads(f.read_text())
    a, b = list(d['model']['vocab'])[300:302]; v = d['model']['vocab']; v[a], v[b] = v[b], v[a]; f.write_text(json.dumps(d))
    refused(pair, texts, tmp_path, 'different numbers', student=other)

def test_no_assistant(pair, texts, tmp_path):
    f = tmp_path/'mute.jsonl'; f.write_text(''.join(json.dumps(dict(messages=[dict(role='user', content=f'{i} says '*50)]))+'\n' for i in range(200)))
    refused(pair, texts, tmp_path, 'no assistant turn', data=str(f))

@pytest.mark.parametrize('kw,say', [(dict(tokens=1000), 'fewer than one batch'), (dict(tokens=3072), '3,072 tokens shared out over 2 domains are too few'), (dict(lr=0), 'lr is 0'), (dict(batch_tokens=64), 'less than one row'), (dict(train='router', adapter='lora'), 'nothing to go on'), (dict(train='experts', quantize_base='nf4'), 'freezes experts'),
    (dict(train='expert'), "can't train 'expert'"), (dict(adapter='qlora'), 'none of none, lora, dora'), (dict(quantize_base='int4'), "'int4'"), (dict(kd=2), 'kd is 2'), (dict(top_k=2048), 'top_k'), (dict(seq_len=4096, batch_tokens=8192), 'seq_len'), (dict(tokens=10**6, batch_tokens=10**6), 'fewer than one batch')])
def test_bad_settings(kw, say, pair, texts, tmp_path): refused(pair, texts, tmp_path, say, **kw)

def test_quantised_students_are_sent_back(pair, texts, tmp_path):
    c, disk, _ = pack(*tiny(V3), 'fp8')
    refused(pair, texts, tmp_path, 'is quantised', student=write(tmp_path/'s', c, disk))

def test_groups_that_are_not_there(pair, texts, tmp_path):
    refused(pair, texts, tmp_path, 'nothing to train in dense', student=write(tmp_path/'s', *tiny(V3, first_k_dense_replace=0)), train='dense')
