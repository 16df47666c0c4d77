"The layer for multi-token prediction is dropped, kept or shrunk; transformers drafts with what is written, and config.json says what is there."
import json
import pytest, torch
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel
from moe_fuse import checkpoint, pipeline
from moe_fuse.cli import main
from moe_fuse.headers import *
from moe_fuse.layouts import export
from moe_fuse.pipeline import compress_and_heal
from test_cli import refused
from test_fused_run import Killed, load, stops
from tiny_models import *

N = 61                                                                          # transformers knows DeepSeek-V3's such layer by this number only

def with_mtp(**changes):
    "60 dense layers, a routed one, and the layer that drafts"
    config, state = tiny(V3, num_hidden_layers=N, first_k_dense_replace=N-1, num_nextn_predict_layers=1, initializer_range=.05, **changes)
    h, p, g = config['hidden_size'], f'model.layers.{N}.', torch.Generator().manual_seed(1)
    more = {k.replace(f'.{N-1}.', f'.{N}.', 1): v+.02*torch.randn(v.shape, generator=g) for k,v in state.items() if k.startswith(f'model.layers.{N-1}.')}
    more |= {p+'eh_proj.weight': torch.randn(h, 2*h, generator=g)*.2} | {f'{p}{k}.weight': 1+.2*torch.randn(h, generator=g) for k in ('enorm', 'hnorm', 'shared_head.norm')}
    return config, state | more | {p+'embed_tokens.weight': state['model.embed_tokens.weight'], p+'shared_head.head.weight': state['lm_head.weight']}

@pytest.fixture(scope='module')
def teacher(tmp_path_factory): return write(tmp_path_factory.mktemp('teacher')/'t', *with_mtp(), shards=2)

@pytest.fixture(scope='module')
def runs(teacher, small, tmp_path_factory):
    d, seen, old = tmp_path_factory.mktemp('students'), [], pipeline.enter_mtp
    def spy(ck, i, model, s, to, job, *a): old(ck, i, model, s, to, job, *a); seen.append(to.read(0, job.cal.lengths[0]).clone())
    pipeline.enter_mtp = spy
    try: out = {k: small(teacher, d/k, baselines=(), **kw) for k,kw in dict(whole=dict(keep=1, dtype='float32', mtp='shrink'), slim=dict(keep=.5, mtp='shrink'), reap=dict(keep=.5, method='reap', mtp='shrink'), fused=dict(keep=.5, method='cores', mtp='shrink'), kept=dict(keep=.5, mtp='keep'), dropped=dict(keep=.5)).items()}
    finally: pipeline.enter_mtp = old
    return out, seen[0]

def drafts(folder, ids):
    "What enters the layer that drafts and the logits it drafts with, by transformers' own code"
    model = stock(folder); m, got = MtpModel.from_pretrained(model).eval(), {}
    m.layers[0].mtp_block.register_forward_pre_hook(lambda mod, args, kw: got.update(x=args[0] if args else kw['hidden_states']), with_kwargs=True)
    with torch.no_grad():
        last = model(ids[None], output_hidden_states=True).hidden_states[-1]
        h = m.forward_layer(0, last[:,:-1], torch.arange(1, len(ids))[None], None, input_ids=ids[None,1:])
        return got['x'][0], m._project_to_logits(h)[0]

def words(model, ids, **kw): return model.generate(ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=4, **kw)[0].tolist()

def test_what_enters_is_what_transformers_feeds_it(runs, teacher):
    run, seen = runs; ids = run['whole'].held.ids
    cal = sample(run['whole'], len(seen))
    x, _ = drafts(teacher, cal)
    assert (x-seen[:-1]).abs().max() <= 1e-4*x.abs().max()

def sample(run, n): # the first calibration sequence, which a run doesn't hand back
    from moe_fuse.calibration import load_tokenizer, sample_tokens
    from moe_fuse.sources import read_docs
    r = run.report['recipe']; t = sample_tokens(read_docs(r['text'], seed=r['seed']), load_tokenizer(run.out), r['tokens'], 512, r['seed'])
    assert t.lengths[0]==n and t.sha256==r['calibration']
    return t.ids[:n]

def test_all_of_it_drafts_what_the_teacher_drafts(runs, teacher):
    run = runs[0]['whole']; ids = run.held.ids[:40]
    (_, a), (_, b) = drafts(teacher, ids), drafts(run.out, ids)
    assert (a-b).abs().max() <= 1e-3*a.abs().max() and run.report['mtp']['fvu']['fitted']<1e-4

@pytest.mark.parametrize('name', ['whole', 'slim', 'reap'])
def test_transformers_drafts_with_it(name, runs):
    "generate(use_mtp=True) takes the layer in the sizes of config.json, and gives the words that it gives without"
    run = runs[0][name]; model, ids = stock(run.out), run.held.ids[:20]
    assert words(model, ids, use_mtp=True)==words(model, ids)
    c = json.loads((run.out/'config.json').read_text()); t = tensors_of(run.out)
    assert c['num_nextn_predict_layers']==1 and t[f'model.layers.{N}.mlp.experts.0.up_proj.weight'].shape==(c['moe_intermediate_size'], c['hidden_size']) and t[f'model.layers.{N}.mlp.gate.weight'].shape[0]==c['n_routed_experts']
    assert 'made smaller with the rest' in (run.out/'README.md').read_text()

def test_kept_is_the_source_and_dropped_is_gone(runs, teacher):
    old, (kept, dropped) = tensors_of(teacher), (runs[0][k].out for k in ('kept', 'dropped'))
    ours = lambda t: {k: v for k,v in t.items() if k.startswith(f'model.layers.{N}.')}
    new = ours(tensors_of(kept))
    assert new.keys()==ours(old).keys() and all(torch.equal(v, old[k]) and v.dtype==old[k].dtype for k,v in new.items()) and not ours(tensors_of(dropped))
    assert [json.loads((f/'config.json').read_text())['num_nextn_predict_layers'] for f in (kept, dropped)]==[1, 0]
    stock(kept); stock(dropped)                                                # no word about tensors that it doesn't expect
    a, b = (tensors_of(f) for f in (kept, dropped)); assert all(torch.equal(v, a[k]) for k,v in b.items())
    with pytest.raises(RuntimeError, match='mismatch'): words(stock(kept), runs[0]['kept'].held.ids[:20], use_mtp=True)   # as its card says
    cards = [(f/'README.md').read_text() for f in (kept, dropped)]
    assert 'kept as it was; engines that draft with it build it in the sizes of config.json' in cards[0] and 'it was dropped' in cards[1]
    for f in kept, dropped: assert f"| parameters | {inspect(Checkpoint(dropped))['total']:,}," in (f/'README.md').read_text()

def test_a_packed_layer_is_kept_unpacked(small, tmp_path):
    config, disk, back = pack(*with_mtp(), 'fp8')
    run = small(write(tmp_path/'t', config, disk), tmp_path/'s', keep=.5, baselines=(), mtp='keep'); new = tensors_of(run.out)
    for k,v in back.items():
        if k.startswith(f'model.layers.{N}.'): assert torch.equal(new[k].float(), v if k.endswith('bias') else v.bfloat16().float()), k
    stock(run.out)

def test_exports_take_it_along(runs, tmp_path):
    "Unfolded, a fused student's drafts; in FP8 all is packed but what DeepSeek leaves as it is"
    flat = export(runs[0]['fused'].out, tmp_path/'flat', 'unfolded', text='none')
    ids = runs[0]['fused'].held.ids[:20]; model = stock(tmp_path/'flat')
    assert flat['student']['parameters']['mtp']>0 and words(model, ids, use_mtp=True)==words(model, ids)
    export(runs[0]['slim'].out, tmp_path/'o', dtype='fp8', text='none'); ck, p = Checkpoint(tmp_path/'o'), f'model.layers.{N}.'
    assert ck.config['num_nextn_predict_layers']==1 and p+'eh_proj.weight_scale_inv' not in ck and p+'mlp.experts.0.up_proj.weight_scale_inv' in ck and p+'self_attn.o_proj.weight_scale_inv' in ck
    load(runs[0]['fused'].out)

def test_healing_takes_it_along_as_it_was(runs, tmp_path):
    "config.json counts the layer, so it must be there; transformers drafts with it"
    from moe_fuse.heal import write_healed
    s = Checkpoint(runs[0]['slim'].out); w = checkpoint.CheckpointWriter(tmp_path/'o', N+2)
    write_healed(s, load(s.folder), w); w.publish()
    a, b = tensors_of(s.folder), tensors_of(tmp_path/'o')
    assert a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items() if k.startswith(f'model.layers.{N}.')) and mtp_layers(Checkpoint(tmp_path/'o'))==[N]
    model, ids = stock(tmp_path/'o'), runs[0]['slim'].held.ids[:20]
    assert words(model, ids, use_mtp=True)==words(model, ids)

@pytest.mark.parametrize('where,at', [((pipeline, 'shrink_mtp'), 1), ((pipeline, 'write_card'), 1)], ids=['before', 'behind'])
def test_killed_and_resumed(where, at, runs, teacher, small, monkeypatch, tmp_path):
    kw = dict(keep=.5, baselines=(), mtp='shrink')
    with monkeypatch.context() as m, pytest.raises(Killed): stops(m, where, at); small(teacher, tmp_path/'s', **kw)
    assert not (tmp_path/'s').exists()
    assert shard_bytes(small(teacher, tmp_path/'s', **kw, resume=True).out)==shard_bytes(runs[0]['slim'].out)

def test_refused(teacher, tiny_teacher, texts, tmp_path, capfd):
    less = ['--calibration', texts[0], '--eval', texts[1], '--tokens', '2048', '--eval-tokens', '2048']
    for src,how,say in (tiny_teacher, 'keep', 'has no multi-token-prediction layer'), (teacher, 'copy', "mtp 'copy' is none of drop, keep, shrink"): refused(['run', src, tmp_path/'o', '--mtp', how, *less], capfd, say, watch=[tmp_path])
    assert not list(tmp_path.iterdir())

def test_kept_through_healing(teacher, texts, tmp_path):
    "Healing trains the trunk; the layer that drafts is the one that was kept"
    kw = dict(calibration=texts[0], eval_data=texts[1], tokens=2048, eval_tokens=2048, quiet=True, device='cpu', keep=.5, baselines=())
    run = compress_and_heal(teacher, tmp_path/'s', 4096, mtp='keep', **kw)
    a, b = tensors_of(teacher), tensors_of(run.out)
    mine = [k for k in a if k.startswith(f'model.layers.{N}.')]
    assert mine and all(torch.equal(a[k].to(b[k].dtype), b[k]) for k in mine) and mtp_layers(Checkpoint(run.out))==[N] and 'healing' in run.report
