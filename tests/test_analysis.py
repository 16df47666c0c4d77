"The numbers are those of plain loops, a pilot of full size is the teacher, and what can't be analysed is said in one line."
import json
import numpy as np, pytest, torch
from moe_fuse.analysis import *
from moe_fuse.awq_loading import *
from moe_fuse.calibration import *
from moe_fuse.cli import main
from moe_fuse.expert_analysis import *
from moe_fuse.headers import *
import test_families
from tiny_models import *

PICTURES = {'analysis.json','coactivation.png','energy.png','load.png','prediction.png','similarity.png'}
LESS = dict(tokens=2048, fit_tokens=1024, pilot_tokens=2048, quiet=True)

def test_effective_rank():
    x = torch.randn(500, 9, dtype=torch.float64) @ torch.diag(torch.linspace(1, 0, 9, dtype=torch.float64))
    p = np.linalg.svd(x-x.mean(0), compute_uv=False)**2; p = p[p>p.max()*1e-14]/p.sum()
    assert abs(effective_rank(x.T.cov())-np.exp(-(p*np.log(p)).sum())) < 1e-8
    assert effective_rank(torch.zeros(4, 4))==0 and abs(effective_rank(torch.eye(5))-5)<1e-9

def test_fire_together_is_counted_over_tokens():
    idx = torch.stack([torch.randperm(8)[:3] for _ in range(400)]); groups = torch.tensor([0,0,0,1,1,2,3,3])
    hits = tries = 0
    for row in idx.tolist():
        for i in row:
            others = [j for j in range(8) if j!=i and groups[j]==groups[i]]
            tries += len(others); hits += sum(j in row for j in others)
    assert abs(fire_together(torch.from_numpy(coactivation(idx.numpy(), 8)), groups)-hits/tries) < 1e-6
    assert fire_together(torch.zeros(4, 4, dtype=torch.long), torch.tensor([0,0,1,2]))==0

@pytest.fixture(scope='module', params=['v2','v3'])
def teacher(request, tmp_path_factory): return write(tmp_path_factory.mktemp(request.param)/'t', *tiny(dict(v2=V2, v3=V3)[request.param], seed=2))

def test_one_pass_moves_the_teacher_and_keeps_rows(teacher, texts):
    ck = Checkpoint(teacher); model = empty_model(ck)
    cal = sample_tokens(read_docs(texts[0]), load_tokenizer(teacher), 2048)
    s, want, rot = States(len(cal), 48), States(len(cal), 48), model.model.rotary_emb
    rows = torch.tensor([0, 3, 700, len(cal)-1])
    for z in s, want: embed_tokens(ck, cal.ids, z)
    with torch.no_grad():
        for i,layer in stream_layers(ck, model):
            xs, ys = [], []
            for a,b,lengths in cal.batches(512):
                x = layer.post_attention_layernorm(attend(layer, want.read(a, b), lengths, rot))
                xs.append(x); ys.append(layer.mlp(x))
                want.write(a, layer_forward(layer, want.read(a, b), lengths, rot))
            if i==0: pilot_layer(layer, layer.mlp, s, cal, rot)
            else:
                stats, cov, x, y = survey_layer(layer, s, cal, rows, rot, batch=512)
                routed = (torch.cat(ys)-layer.mlp.shared_experts(torch.cat(xs))).double()
                for got,wanted in ((x, torch.cat(xs)[rows]), (y, torch.cat(ys)[rows]), (cov, routed.T.cov(correction=0))): assert (got-wanted).abs().max() <= 1e-4*wanted.abs().max()   # float32 over three layers
                assert stats.counts.sum()==4*len(cal)
            assert (s.read(0, len(cal))-want.read(0, len(cal))).abs().max() <= 1e-4*want.read(0, len(cal)).abs().max()

def test_a_pilot_of_full_size_is_the_teacher(teacher, texts, tmp_path):
    "Nothing is cut, so the fit finds nothing to change"
    r = analyse(teacher, tmp_path/'o', texts[0], keeps=(1.,), **LESS)
    assert len(r['layers'])==2 and abs(r['kl']['1.0']) < 1e-6
    for l in r['layers']: assert all(abs(v) < 1e-6 for v in l['predicted']['1.0'].values()) and l['energy']['1.0']==1

def test_less_is_kept_more_is_lost(teacher, texts, tmp_path):
    r = analyse(teacher, tmp_path/'o', texts[0], keeps=(.125, .5, .25), **LESS)
    assert list(r['kl'])==['0.5','0.25'] and list(r['impossible'])==['0.125'] and 'less than 8' in r['impossible']['0.125']   # 32 neurons: 4 would be left
    assert r['kl']['0.5'] < r['kl']['0.25']
    for l in r['layers']:
        a, b = (l['predicted'][k] for k in ('0.5','0.25'))
        assert all(a[k]<b[k] for k in a) and list(l['energy'])==['0.5','0.25','0.125']
        assert abs(1-l['energy']['0.5']-a['energy_dropped']) < 1e-5 and l['effective_rank'] <= l['hidden']==48
    assert {p.name for p in (tmp_path/'o').iterdir()}==PICTURES
    assert json.loads((tmp_path/'o'/'analysis.json').read_text())==json.loads(json.dumps(r))
    again = analyse(teacher, tmp_path/'p', texts[0], keeps=(.25, .5, .125), **LESS)
    assert again['layers']==r['layers'] and again['kl']==r['kl']

def test_an_expert_that_never_fires(texts, tmp_path):
    config, state = tiny(V3, seed=2)
    state['model.layers.1.mlp.gate.e_score_correction_bias'][5] = -9
    r = analyse(write(tmp_path/'t', config, state), tmp_path/'o', texts[0], keeps=(.5,), **LESS)
    assert r['layers'][0]['dead']==[5] and r['layers'][1]['dead']==[] and '| ' in verdict(r)
    assert 'NaN' not in (tmp_path/'o'/'analysis.json').read_text()

def test_held_out_documents_are_others():
    docs = [dict(domain=d, text=f'{d}{i}') for i in range(60) for d in 'ab']
    rest, held = split_text(docs)
    assert sorted(d['text'] for d in rest+held)==sorted(d['text'] for d in docs)
    assert {d['text'] for d in held}=={f'{d}{i}' for d in 'ab' for i in range(0,60,8)}
    with pytest.raises(BadInput, match='one document only'): split_text(docs[:2])

# the command

def test_command(teacher, texts, tmp_path, capfd):
    argv = ['analyse', str(teacher), str(tmp_path/'o'), '--calibration', texts[0], '--tokens', '2048', '--keeps', '0.5,0.25', '--device', 'cpu']
    assert main(argv)==0
    out, _ = capfd.readouterr()
    assert 'predicted KL' in out and str(tmp_path/'o') in out and {p.name for p in (tmp_path/'o').iterdir()}==PICTURES
    argv[2] = str(tmp_path/'p')
    assert main([*argv, '--json'])==0
    assert json.loads(capfd.readouterr()[0])['tokens'].keys()=={'code','chat'}

@pytest.mark.parametrize('more,say', [(['--keeps','half'],'half'), (['--keeps','1.5'],'keep is 1.5'), (['--keeps','0.01'],'less than 8'), (['--tokens','7'],'2048'), (['--calibration','no.jsonl'],'no.jsonl'), (['--device','tpu'],'tpu')])
def test_what_is_refused(more, say, teacher, texts, tmp_path, capfd):
    assert main(['analyse', str(teacher), str(tmp_path/'o'), '--calibration', texts[0], '--tokens', '2048', *more])==2
    out, err = capfd.readouterr()
    assert out=='' and say in err and len(err.strip().splitlines())==1 and list(tmp_path.iterdir())==[]

def test_a_full_folder_is_refused(teacher, texts, tmp_path, capfd):
    (tmp_path/'o').mkdir(); (tmp_path/'o'/'mine').write_text('x')
    assert main(['analyse', str(teacher), str(tmp_path/'o'), '--calibration', texts[0]])==2
    assert 'not an empty folder' in capfd.readouterr()[1] and (tmp_path/'o'/'mine').read_text()=='x'

def test_a_fault_on_the_way_leaves_nothing(texts, tmp_path, capfd):
    config, state = tiny(V3, seed=2)
    state['model.layers.2.mlp.experts.3.up_proj.weight'][0,0] = float('nan')
    assert main(['analyse', str(write(tmp_path/'t', config, state)), str(tmp_path/'o'), '--calibration', texts[0], '--tokens', '2048', '--keeps', '0.5'])==2
    assert 'model.layers.2.mlp.experts.3.up_proj.weight' in capfd.readouterr()[1] and not (tmp_path/'o').exists()

# other families

@pytest.mark.parametrize('family', ['qwen2_moe', 'qwen3_moe', 'mixtral', 'olmoe', 'glm4_moe', 'kimi_k2'])
def test_every_family(family, texts, tmp_path):
    "With and without shared experts, its gate, dense layers: a pilot of full size is the teacher, a smaller one loses"
    config, state = test_families.tiny(family, **(dict(n_routed_experts=24) if family=='kimi_k2' else {}))
    r = analyse(write(tmp_path/'t', config, state), tmp_path/'o', texts[0], keeps=(1., .5), **LESS)
    assert [l['layer'] for l in r['layers']]==sorted({int(k.split('.')[2]) for k in state if '.experts.' in k})
    assert abs(r['kl']['1.0']) < 1e-6 < r['kl']['0.5']
    for l in r['layers']:
        assert sum(l['counts'])==config['num_experts_per_tok']*sum(r['tokens'].values())
        assert all(abs(v) < 1e-6 for v in l['predicted']['1.0'].values()) and l['predicted']['0.5']['fvu'] > .01
    first = r['layers'][0]['predicted']['0.5']                                 # nothing was cut before it
    assert abs(first['fvu']-first['fvu_alone']) < 1e-6 and first['fvu'] < 1 and 0 < first['energy_dropped'] < 1

def test_experts_with_biases_are_refused(texts, tmp_path, capfd):
    assert main(['analyse', str(write(tmp_path/'t', *test_families.tiny('gpt_oss'))), str(tmp_path/'o'), '--calibration', texts[0]])==2
    assert 'not shrunk' in capfd.readouterr()[1] and not (tmp_path/'o').exists()
