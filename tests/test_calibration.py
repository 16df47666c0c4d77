"Tokens are cut, dealt out and stored so that nothing depends on how: not on padding, batches, parts, or where a pass was stopped."
import json, random, signal, subprocess, sys, time
from collections import Counter
from functools import reduce
from operator import add
import pytest, torch
from hypothesis import given, settings, strategies as st
from moe_fuse.awq_loading import *
from moe_fuse.calibration import *
from moe_fuse.calibration_pass import *
from moe_fuse.headers import *
from moe_fuse.pipeline import compress
from tiny_models import *

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)
def some_tokens(lengths, seed=0, assistant=False):
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, 2048, (n,), generator=g).tolist() for n in lengths]
    return TokenSet([('abc'[i%3], s, *([[t%2==0 for t in s]] if assistant else [])) for i,s in enumerate(ids)])

# padding

@given(lengths)
@settings(max_examples=50, deadline=None)
def test_unpad_undoes_pad(lengths):
    x = torch.arange(sum(lengths)*2.).view(-1, 2)
    assert torch.equal(unpad(pad(x, lengths), lengths), x)

@pytest.mark.parametrize('base', [V3, V2], ids=['v3', 'v2'])
def test_a_sequence_neither_sees_padding_nor_another_sequence(base, tmp_path):
    "Whatever stands in the others, NaN included, not a bit of it changes; alone, in another shape of product, only rounding does"
    ck = Checkpoint(write(tmp_path/'t', *tiny(base)))
    model = empty_model(ck); rot, n = model.model.rotary_emb, [3, 20, 21]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(n), 48, generator=g)
    other = x.clone(); other[:3] = torch.nan; other[23:] *= -7
    with torch.no_grad():
        for _,layer in stream_layers(ck, model):
            a, b, alone = (attend(layer, v, l, rot) for v,l in ((x, n), (other, n), (x[3:23], [20])))
            assert torch.equal(a[3:23], b[3:23]) and not torch.equal(a[23:], b[23:])
            assert (a[3:23]-alone).abs().max() <= 1e-5*a.abs().max()

# states

@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from([*STATE_DTYPES]), st.integers(0, 9), st.floats(-30, 30))
@settings(max_examples=80, deadline=None)
def test_states_come_back_as_their_dtype_allows(t, h, name, seed, size):
    "Half a step: 2^-8 of the value in bfloat16, 2^-4 in float8, and in float8 at least half of its smallest step, 2^-10 of the row's scale; 2^-22 for the scale's own rounding"
    g, dtype = torch.Generator().manual_seed(seed), STATE_DTYPES[name]
    x = torch.randn(t, h, generator=g)*2**size
    x[::3] = 0
    y = decode_states(encode_states(x, dtype), dtype)
    step = dict(float32=0, bfloat16=x.abs()*2**-8, float8=torch.maximum(x.abs()*2**-4, x.abs().amax(1, keepdim=True)/448*2**-10))[name]
    assert ((y-x).abs() <= step*(1+2**-20) + x.abs()*2**-22*(name=='float8')).all() and (y[::3]==0).all() and y.dtype==torch.float32
    assert encode_states(x, dtype).shape==(t, state_bytes(h, dtype))

@pytest.mark.parametrize('outlier', [1, 1000])
def test_float8_keeps_an_error_under_3_percent_beside_an_outlier_of_1000_sigma(outlier):
    "Relative L2 error of every other channel together, in the worst of 1,000 tokens; 2.6 % is what 3 bits of mantissa cost"
    x = torch.randn(1000, 2048, generator=torch.Generator().manual_seed(0)); x[:,5] = outlier
    y = decode_states(encode_states(x, torch.float8_e4m3fn), torch.float8_e4m3fn)
    rest = torch.arange(2048)!=5
    assert .02 < ((y-x)[:,rest].norm(dim=1)/x[:,rest].norm(dim=1)).max() < .03

@pytest.mark.parametrize('name', STATE_DTYPES)
def test_a_file_of_states_is_what_memory_would_be(name, tmp_path):
    dtype, g = STATE_DTYPES[name], torch.Generator().manual_seed(0)
    f, m = States(50, 17, tmp_path/'s', dtype), States(50, 17, None, dtype)
    for a in (40, 0, 13):
        x = torch.randn(10, 17, generator=g)
        f.write(a, x); m.write(a, x)
    assert torch.equal(f.read(0, 50), m.read(0, 50)) and (f.read(25, 40)==0).all()
    f.close()
    f = States(50, 17, tmp_path/'s', dtype)
    assert torch.equal(f.read(7, 50), m.read(7, 50))
    f.close()

# parts and batches

@given(lengths, st.integers(1, 5), st.integers(1, 120), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_batches_of_the_parts_are_those_of_the_whole(lengths, n, max_tokens, assistant):
    t = some_tokens(lengths, assistant=assistant)
    rows = lambda s: [(s.ids[a:b].tolist(), l, None if s.assistant is None else s.assistant[a:b].tolist()) for a,b,l in s.batches(max_tokens)]
    parts = [t.shard(i, n, max_tokens) for i in range(n)]
    for i,p in enumerate(parts): assert rows(p)==rows(t)[i::n]
    assert sum((p.count() for p in parts), Counter())==t.count()
    with pytest.raises(ValueError, match='part'): t.shard(n, n)

@given(lengths, st.integers(1, 300), st.integers(40, 300))
@settings(max_examples=100, deadline=None)
def test_every_row_is_done_once_whatever_fits(lengths, start, limit):
    t, done, failed = some_tokens(lengths), [], []
    def fn(a, b, l):
        assert b-a==sum(l)
        if max(l)*len(l)>limit: failed.append(b-a); raise torch.OutOfMemoryError
        done.extend(range(a, b))
    end = each_batch(t, fn, start)
    assert done==list(range(len(t))) and (end<=start//2 if failed else end==start)
    with pytest.raises(torch.OutOfMemoryError): each_batch(t, lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()), start)

def test_without_a_halving_the_batches_are_the_token_sets_own():
    t, seen = some_tokens(range(1, 30)), []
    assert each_batch(t, lambda *b: seen.append(b), 90)==90 and seen==list(t.batches(90))

def same(a, b, rtol=0):
    for s,t in zip(a, b, strict=True):
        assert (s is None)==(t is None)
        if s is None: continue
        assert vars(s).keys()==vars(t).keys() and torch.equal(s.coactivation, t.coactivation)
        for k,v in vars(s).items(): torch.testing.assert_close(getattr(t, k), v, rtol=rtol, atol=0)

@pytest.mark.parametrize('base', [V3, V2], ids=['v3', 'v2'])
@pytest.mark.parametrize('n', [2, 5])
def test_parts_add_up_to_one_pass(n, base, tmp_path):
    "Counts bit for bit; sums to 1e-12, for float64 adds batches in another order"
    ck, t = Checkpoint(write(tmp_path/'t', *tiny(base))), some_tokens([7]*40 + [30]*20 + [64, 65, 200])
    parts = [layer_statistics(ck, t, (i, n), max_tokens=256) for i in range(n)]
    whole = layer_statistics(ck, t, max_tokens=256)
    assert [s and int(s.counts.sum()) for s in whole]==[None, 4*len(t), 4*len(t)]
    same(whole, [reduce(add, s) if s[0] else None for s in zip(*parts)], rtol=1e-12)
    assert len(t.shard(n-1, n, 10**6))==0
    same(whole, [s and s+e for s,e in zip(whole, layer_statistics(ck, t, (1, 2), max_tokens=10**6))])   # a part without text adds nothing

# killed, and continued

PASS = '''
import sys, torch
from moe_fuse.awq_loading import *
from moe_fuse.calibration import *
from moe_fuse.calibration_pass import *
from moe_fuse.headers import *
g = torch.Generator().manual_seed(0)
torch.set_num_threads(1)
tokens = TokenSet([('ab'[n%2], torch.randint(5, 2048, (n,), generator=g).tolist()) for n in [200, 300]*20])
layer_statistics(Checkpoint(resolve_source('demo')), tokens, folder=sys.argv[1], max_tokens=4096)
print('done')
'''

@pytest.mark.skipif(sys.platform=='win32', reason='SIGKILL')
def test_a_pass_killed_at_any_moment_ends_in_the_same_bits(tmp_path):
    "Killed after a random time, again and again, then left alone; compared with a pass that nobody stopped"
    rng, run = random.Random(time.time()), lambda d: subprocess.Popen([sys.executable, '-c', PASS, str(tmp_path/d)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)
    p = run('straight'); out, err = p.communicate()
    assert out=='done\n', err
    layers = lambda d: len(list((tmp_path/d).glob('*.safetensors')))
    killed = 0
    while True:
        p, begun, more = run('stopped'), layers('stopped'), rng.random()*.5
        while p.poll() is None and layers('stopped')<=begun: time.sleep(.005)   # one more layer each time, and some way into the next
        time.sleep(more)
        if p.poll() is None: p.send_signal(signal.SIGKILL)
        out, err = p.communicate()
        if p.returncode==0: break
        assert p.returncode==-signal.SIGKILL, err
        killed += 1
    assert killed>=2 and layers('stopped')==6
    files = lambda d: {f.name: f.read_bytes() for f in sorted((tmp_path/d).iterdir())}
    assert files('stopped')==files('straight') and set(files('straight'))=={'pass.json', *(f'{i}.safetensors' for i in range(6))}

def test_a_pass_is_not_continued_with_other_text(tiny_teacher, tmp_path):
    ck = Checkpoint(tiny_teacher)
    layer_statistics(ck, some_tokens([9]*9), folder=tmp_path/'p')
    for t,kw,say in ((some_tokens([9]*9, seed=1), {}, 'tokens'), (some_tokens([9]*9), dict(shard=(0, 2)), 'shard'), (some_tokens([9]*9), dict(max_tokens=50), 'max_tokens')):
        with pytest.raises(BadInput, match=say): layer_statistics(ck, t, folder=tmp_path/'p', **kw)

# the main job

@pytest.mark.parametrize('states', ['bfloat16', 'float8'])
def test_a_run_with_smaller_states(states, small, tiny_teacher, tmp_path, texts):
    "The student is still a whole checkpoint; at keep 1 what is lost is what the states lose"
    run = small(tiny_teacher, tmp_path/'out', states=states, keep=1., dtype='float32', baselines=[])
    kl = run.report['evaluation']['slim']['mean']['kl']
    assert run.report['recipe']['states']==states and 1e-12 < kl < .05
    stock(tmp_path/'out')
    with pytest.raises(BadInput, match="states 'int4' is none of"): small(tiny_teacher, tmp_path/'no', states='int4')
    assert not list(tmp_path.glob('no*'))

def test_the_report_counts_what_was_read(tmp_path, texts):
    "Documents are cut at the context of the model, and held-out text that was calibrated on is told"
    src = write(tmp_path/'src', *tiny(V3, max_position_embeddings=64))
    run = compress(src, tmp_path/'out', calibration=texts[0], eval_data=texts[0], tokens=3000, eval_tokens=2048, baselines=[], quiet=True)
    r = json.loads((tmp_path/'out'/'report.json').read_text())
    for k in 'calibration', 'held_out':
        assert set(r[k]['documents'])==set(r[k]['tokens'])=={'chat', 'code'} and r[k]['cut']>0 and r[k]['duplicates']==r[k]['empty']==0
        assert r[k]['origins']==sorted(texts[0].split(','))
    assert max(run.held.lengths)<=64 and 0 < r['held_out']['also_in_calibration'] <= len(run.held.lengths)

def test_all_statistics_add_up_and_are_continued(tiny_teacher, tmp_path):
    "ExpertStats with every moment: parts and a folder give what one pass gives, counts and peaks bit for bit"
    ck, t, kw = Checkpoint(tiny_teacher), some_tokens([9, 30, 30, 30, 31, 40]*3), dict(max_tokens=70, full=True, moments='full')
    whole = layer_statistics(ck, t, **kw)
    for other in ([reduce(add, s) if s[0] else None for s in zip(*(layer_statistics(ck, t, (i, 3), **kw) for i in range(3)))],
                  layer_statistics(ck, t, folder=tmp_path/'p', **kw), layer_statistics(ck, t, folder=tmp_path/'p', **kw)):
        for a,b in zip(whole, other):
            if a is None: assert b is None; continue
            assert type(b) is type(a) and vars(a).keys()==vars(b).keys() and {'moments', 'peak', 'cosine'} <= vars(a).keys()
            assert torch.equal(a.coactivation, b.coactivation) and torch.equal(a.peak, b.peak)
            for k,v in vars(a).items(): assert (vars(b)[k]-v).abs().max() <= 1e-6*v.abs().max(), k
            assert torch.allclose(a.moment(3, .1), b.moment(3, .1))
    few = layer_statistics(ck, t, max_tokens=70)
    for a,b in zip(whole, few):
        if a: assert torch.equal(a.usefulness, b.usefulness) and torch.equal(a.coactivation, b.coactivation)
    with pytest.raises(BadInput, match='other settings: full'): layer_statistics(ck, t, folder=tmp_path/'p', max_tokens=70)

def test_domains_are_parts_too(tiny_teacher):
    t = some_tokens([9, 12, 30, 7], assistant=True); parts = t.by_domain()
    assert list(parts)==['a', 'b', 'c'] and {d: len(p) for d,p in parts.items()}==dict(t.count())
    assert sorted(s.tolist() for p in parts.values() for s in p.ids.split(p.lengths))==sorted(s.tolist() for s in t.ids.split(t.lengths))
    assert all(torch.equal(p.assistant, p.ids%2==0) for p in parts.values())

def test_a_token_outside_the_vocabulary_is_named(tiny_teacher):
    t = TokenSet([('a', [5]*9), ('a', [5]*20 + [2048])])
    with pytest.raises(BadInput, match='row 29: token 2048 is outside the vocabulary of 2048'): layer_statistics(Checkpoint(tiny_teacher), t)
