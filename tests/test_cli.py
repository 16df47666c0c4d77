"What is wrong is said in one line, with exit code 2, and nothing is left behind."
import json, os, re, resource, shlex, shutil, subprocess, sys, time
from pathlib import Path
import pytest, torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from moe_fuse.cli import main
from moe_fuse.headers import *
from tiny_models import *

LESS = ('--tokens', '2048', '--eval-tokens', '2048', '--baselines', 'none')

def refused(argv, capfd, *say, watch=(), any_of=('',)):
    "Run the command in this process: one line on stderr that says it, nothing on stdout, nothing new on the disk"
    before = {f: sorted(f.rglob('*')) for f in watch}
    capfd.readouterr()
    try: code = main([str(w) for w in argv])
    except SystemExit as e: code = e.code
    out, err = capfd.readouterr()
    assert code==2, f'exit code {code}\n{err}'
    assert out==''
    lines = [l for l in re.split(r'[\r\n]+', err) if l.strip() and '%|' not in l and 'pass/s' not in l and '?pass' not in l]  # a progress bar is no complaint
    assert len(lines)==1 and lines[0].startswith('moe-fuse: ') and 'Traceback' not in err, err
    for s in say: assert str(s) in lines[0], (s, lines[0])
    assert any(s in lines[0] for s in any_of), lines[0]
    for f in watch: assert sorted(f.rglob('*'))==before[f], f'left behind: {set(f.rglob("*"))-set(before[f])}'

@pytest.fixture
def src(tmp_path):
    (tmp_path/'o').mkdir()
    return write(tmp_path/'src', *tiny(V3, num_hidden_layers=2), shards=2)

def run(src, tmp_path, texts, *more): return ['run', src, tmp_path/'o'/'out', '--calibration', texts[0], '--eval', texts[1], *LESS, *more]

def rewrite(src, change, name='config.json'):
    d = json.loads((src/name).read_text()); change(d); (src/name).write_text(json.dumps(d))

def test_the_same_command_without_the_fault_works(src, tmp_path, texts, capfd):
    "Else the tests below would prove nothing"
    assert main([str(w) for w in run(src, tmp_path, texts)])==0
    o, _ = capfd.readouterr()
    assert '| slim' in o and str(tmp_path/'o'/'out') in o and 'report.png' in o

# damaged checkpoints

def weight_shard(src, name): return src/json.loads((src/'model.safetensors.index.json').read_text())['weight_map'][name]
def spoil(src, name, value, at=5):
    "Put one value into a stored weight"
    from safetensors.torch import load_file, save_file
    f = weight_shard(src, name); t = load_file(f); t[name].view(-1)[at] = value; save_file(t, f, metadata={'format':'pt'})

@pytest.mark.parametrize('command', ['run','inspect','eval'])
def test_missing_shard(command, src, tmp_path, texts, capfd):
    f = src/'model-00002-of-00002.safetensors'; f.unlink()
    argv = dict(run=run(src, tmp_path, texts), inspect=['inspect', src], eval=['eval', src, '--against', 'demo', '--data', texts[1]])[command]
    refused(argv, capfd, f.name, 'missing shard', watch=[tmp_path])

@pytest.mark.parametrize('command', ['run','inspect'])
@pytest.mark.parametrize('left', [0, 4, 100, .5, -1])
def test_truncated_shard(left, command, src, tmp_path, texts, capfd):
    f = src/'model-00002-of-00002.safetensors'; b = f.read_bytes()
    f.write_bytes(b[:int(len(b)*left) if isinstance(left, float) else left])
    refused(run(src, tmp_path, texts) if command=='run' else ['inspect', src], capfd, f.name, 'truncated', watch=[tmp_path])

def test_index_that_names_a_tensor_the_shard_lacks(src, tmp_path, texts, capfd):
    rewrite(src, lambda d: d['weight_map'].update({'model.layers.1.mlp.gate.extra': 'model-00001-of-00002.safetensors'}), 'model.safetensors.index.json')
    refused(run(src, tmp_path, texts), capfd, 'model.layers.1.mlp.gate.extra', 'model-00001-of-00002.safetensors', watch=[tmp_path])

@pytest.mark.parametrize('change', [lambda d: d.update(weight_map=[1,2]), lambda d: d.pop('weight_map'), lambda d: d.update(weight_map={'a': 3}), lambda d: d.update(weight_map={'a': '../x.safetensors'})])
def test_index_of_another_shape(change, src, tmp_path, texts, capfd):
    rewrite(src, change, 'model.safetensors.index.json')
    for argv in run(src, tmp_path, texts), ['inspect', src]: refused(argv, capfd, src, watch=[tmp_path])

def test_index_and_config_that_are_no_json(src, tmp_path, texts, capfd):
    for name in 'model.safetensors.index.json', 'config.json':
        (src/name).write_text('{"a": ')
        refused(['inspect', src], capfd, name, watch=[tmp_path])

@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('name', ['model.layers.1.mlp.experts.7.up_proj.weight', 'model.layers.0.self_attn.o_proj.weight', 'model.embed_tokens.weight', 'model.norm.weight', 'lm_head.weight',
                                  'model.layers.1.mlp.gate.weight', 'model.layers.1.mlp.gate.e_score_correction_bias'])
def test_nan_or_inf_in_a_weight_is_named(name, value, src, tmp_path, texts, capfd):
    "Found in the middle of the run; what was written by then is removed"
    spoil(src, name, value)
    refused(run(src, tmp_path, texts), capfd, name, watch=[tmp_path])

def test_nan_in_a_scale_is_named(tmp_path, texts, capfd):
    (tmp_path/'o').mkdir()
    for how,part in ('awq','.scales'), ('fp8','.weight_scale_inv'):
        config, disk, _ = pack(*tiny(V3, num_hidden_layers=2), how)
        k = f'model.layers.1.mlp.experts.3.down_proj{part}'
        disk[k] = disk[k].clone(); disk[k].view(-1)[0] = float('nan')
        refused(run(write(tmp_path/how, config, disk), tmp_path, texts), capfd, 'model.layers.1.mlp.experts.3.down_proj', watch=[tmp_path])

@pytest.mark.parametrize('lost', ['model.layers.1.mlp.experts.3.down_proj.weight', 'model.norm.weight', 'model.embed_tokens.weight', 'model.layers.1.self_attn.kv_b_proj.weight'])
def test_checkpoint_without_one_of_its_tensors(lost, tmp_path, texts, capfd):
    config, state = tiny(V3, num_hidden_layers=2)
    del state[lost]; (tmp_path/'o').mkdir()
    refused(run(write(tmp_path/'src', config, state), tmp_path, texts), capfd, lost, watch=[tmp_path])

def test_weights_that_are_not_of_the_configs_size(src, tmp_path, texts, capfd):
    for change,name in (dict(moe_intermediate_size=40), 'experts'), (dict(vocab_size=4096), 'embed_tokens'), (dict(n_routed_experts=32), 'experts'):
        old = (src/'config.json').read_text()
        rewrite(src, lambda d: d.update(change))
        refused(run(src, tmp_path, texts), capfd, name, watch=[tmp_path])
        (src/'config.json').write_text(old)

@pytest.mark.parametrize('kind', ['llama4', 'deepseek_v32', None])
def test_unsupported_architecture_names_those_supported(kind, src, tmp_path, texts, capfd):
    rewrite(src, lambda d: d.update(model_type=kind))
    for argv in run(src, tmp_path, texts), ['inspect', src], ['eval', src, '--against', src, '--data', texts[1]]:
        refused(argv, capfd, repr(kind), 'deepseek_v2', 'deepseek_v3', 'qwen3_moe', 'gpt_oss', watch=[tmp_path])

@pytest.mark.parametrize('key', ['num_hidden_layers', 'n_routed_experts', 'moe_intermediate_size', 'num_experts_per_tok', 'vocab_size'])
def test_config_without_a_size_names_it(key, src, tmp_path, texts, capfd):
    rewrite(src, lambda d: d.pop(key))
    refused(run(src, tmp_path, texts), capfd, key, watch=[tmp_path])

def test_checkpoint_without_a_tokenizer(src, tmp_path, texts, capfd):
    for f in src.glob('tokenizer*'): f.unlink()
    refused(run(src, tmp_path, texts), capfd, src, watch=[tmp_path])

def test_code_in_a_checkpoint_is_never_run(src, tmp_path, texts):
    "Nor asked about, nor is a pickle read: there is no way to say yes"
    (src/'evil.py').write_text(f"open({str(tmp_path/'pwned')!r}, 'w')\n")
    rewrite(src, lambda d: d.update(auto_map=dict(AutoConfig='evil.Config', AutoModelForCausalLM='evil.Model', AutoTokenizer=['evil.Tok', None])))
    rewrite(src, lambda d: d.update(auto_map=dict(AutoTokenizer=['evil.Tok', None])), 'tokenizer_config.json')
    r = subprocess.run([sys.executable, '-m', 'moe_fuse', *map(str, run(src, tmp_path, texts))], capture_output=True, text=True, cwd=root, stdin=subprocess.DEVNULL)
    assert not (tmp_path/'pwned').exists()
    assert r.returncode==0 or (r.returncode==2 and 'Traceback' not in r.stderr), r.stderr
    assert 'trust_remote_code' not in r.stdout and '[y/N]' not in r.stderr + r.stdout

# settings

@pytest.mark.parametrize('more,say', [((f'--keep={v}',), ('keep', '(0, 1]')) for v in ('0', '-0.5', '1.01', 'nan', 'inf', '-inf', '1e9')] + [
    (('--keep', '1e-9'), ('keep',)), (('--tokens', '-5'), ('tokens',)), (('--tokens', '-100000'), ('tokens',)), (('--eval-tokens', '-5'), ('tokens',)), (('--tokens', '100'), ('100', '2048')),
    (('--distill-steps', '-1'), ('distill_steps', '-1')), (('--shared-share', '1'), ('shared_share',)), (('--shared-share', '-0.1'), ('shared_share',)), (('--shared-share', 'nan'), ('shared_share',)),
    (('--dtype', 'float8'), ('float8', 'bfloat16')), (('--dtype', 'int8'), ('int8', 'bfloat16')), (('--dtype', 'nn'), ('nn', 'bfloat16')), (('--dtype', 'Tensor'), ('Tensor', 'bfloat16')),
    (('--dtype', 'float64'), ('float64', 'bfloat16')), (('--dtype', 'float8_e4m3fn'), ('float8_e4m3fn', 'bfloat16')), (('--method', 'magic'), ('magic', 'slim', 'reap')), (('--method', 'mean'), ('mean', 'slim')),
    (('--baselines', 'reap,nope'), ('nope', 'mean')), (('--device', 'tpu'), ('tpu',)), (('--seed', '-1', '--baselines', 'mean'), ('seed', '-1')), (('--seed', str(2**40), '--baselines', 'mean'), ('seed',))],
    ids=lambda v: ' '.join(v) if isinstance(v, tuple) and str(v[0]).startswith('--') else '')
def test_setting_that_can_not_be(more, say, src, tmp_path, texts, capfd): refused(run(src, tmp_path, texts, *more), capfd, *say, watch=[tmp_path])

@pytest.mark.parametrize('more', [('--keep', 'half'), ('--tokens', '1.5'), ('--what', '1')])
def test_setting_that_can_not_be_read(more, src, tmp_path, texts, capfd):
    "argparse shows the usage too"
    with pytest.raises(SystemExit) as e: main([str(w) for w in run(src, tmp_path, texts, *more)])
    o, err = capfd.readouterr()
    assert e.value.code==2 and o=='' and more[-1] in err and 'Traceback' not in err and not list((tmp_path/'o').iterdir())

# texts

def one(tmp_path, text, name='bad.jsonl'): (tmp_path/name).write_text(text); return tmp_path/name

@pytest.mark.parametrize('text,say', [('', 'no documents'), ('\n \n', 'no documents'), ('{"text": "a"}\n\n{"text": \n', 'line 3'), ('hello\n', 'line 1'), ('[1]\n', 'line 1'), ('{"txt": "a"}\n', 'line 1'),
    ('{"text": "a"}\n{"text": 3}\n', 'line 2'), ('{"text": "a"}\n{"messages": "a"}\n', 'line 2'), ('{"text": "a"}\n{"messages": [1, 2]}\n', 'line 2'), ('{"messages": [{"role": "user"}]}\n', ''),
    ('{"text": "too short"}\n', '2048'), ('{"text": ""}\n', '2048'), ('{"messages": []}\n', '')],
    ids=['empty','blank','not-json','no-json-at-all','a-list','no-text','text-is-a-number','messages-is-a-text','messages-of-numbers','message-without-content','too-short','empty-text','no-messages'])
@pytest.mark.parametrize('which', ['--calibration', '--eval'])
def test_text_that_can_not_be_used(which, text, say, src, tmp_path, texts, capfd):
    f = one(tmp_path, text)
    refused(run(src, tmp_path, texts, which, str(f)), capfd, say, *([f] if say not in ('2048', '') else []), watch=[tmp_path])

def test_text_that_is_not_there_or_not_text(src, tmp_path, texts, capfd):
    (tmp_path/'folder.jsonl').mkdir(); (tmp_path/'binary.jsonl').write_bytes(b'\xff\xfe\x00\x80'*100); (tmp_path/'bad.jsonl.gz').write_bytes(b'not gzip at all'); (tmp_path/'cut.jsonl.gz').write_bytes(b'\x1f\x8b\x08\x00')
    for name in 'absent.jsonl', 'folder.jsonl', 'binary.jsonl', 'bad.jsonl.gz', 'cut.jsonl.gz':
        refused(run(src, tmp_path, texts, '--calibration', f'{texts[0]},{tmp_path/name}'), capfd, name, watch=[tmp_path])

def test_half_a_surrogate_in_a_text_stops_nothing_or_is_named(src, tmp_path, texts, capfd):
    "JSON allows it, UTF-8 does not"
    f = one(tmp_path, '{"text": "' + 'a \\ud800 b '*2000 + '"}\n', 'odd.jsonl')
    argv = run(src, tmp_path, texts, '--calibration', f'{texts[0]},{f}')
    if main([str(w) for w in argv])!=0: refused(argv, capfd, 'odd.jsonl', watch=[tmp_path])

# where it goes

def test_out_that_is_not_empty_or_a_file(src, tmp_path, texts, capfd):
    (tmp_path/'full').mkdir(); one(tmp_path/'full', 'precious', 'mine.txt'); one(tmp_path, 'precious', 'file')
    for out,say in ('full','not an empty folder'), ('file','not an empty folder'), ('file/below','file'), ('src','not an empty folder'):
        argv = run(src, tmp_path, texts); argv[2] = tmp_path/out
        refused(argv, capfd, say, watch=[tmp_path])
    assert (tmp_path/'full/mine.txt').read_text()==(tmp_path/'file').read_text()=='precious'

def test_a_folder_called_out_partial_that_is_no_run_is_not_deleted(src, tmp_path, texts, capfd):
    "It might be somebody's own"
    (tmp_path/'o/out.partial').mkdir(); one(tmp_path/'o/out.partial', 'precious', 'mine.txt')
    main([str(w) for w in run(src, tmp_path, texts)])
    assert (tmp_path/'o/out.partial/mine.txt').read_text()=='precious'

def test_folders_made_on_the_way_to_out_go_too(src, tmp_path, texts, capfd):
    spoil(src, 'model.norm.weight', float('nan'))
    argv = run(src, tmp_path, texts); argv[2] = tmp_path/'deep'/'er'/'out'
    refused(argv, capfd, 'model.norm.weight', watch=[tmp_path])

def test_out_may_be_an_empty_folder_even_this_one(src, tmp_path, texts, capfd, monkeypatch):
    (tmp_path/'empty').mkdir()
    argv = run(src, tmp_path, texts); argv[2] = tmp_path/'empty'
    assert main([str(w) for w in argv])==0 and (tmp_path/'empty/config.json').exists()
    monkeypatch.chdir(tmp_path/'o'); argv[2] = '.'
    try: code = main([str(w) for w in argv])
    finally: os.chdir(root)
    o, e = capfd.readouterr()
    assert (code==0 and (tmp_path/'o/config.json').exists()) or (code==2 and 'Traceback' not in e)

FULL = '''
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),)*2)
from moe_fuse.cli import main
sys.exit(main(sys.argv[2:]))
'''

@pytest.mark.parametrize('kb', [100, 500, 900])
def test_file_that_grows_too_big(kb, tmp_path, texts):
    "100 KB: no room for the states; 500: for the embedding; 900: for the layer. Files may not grow, as on a full disk"
    src = write(tmp_path/'src', *tiny(V3, num_hidden_layers=2, hidden_size=32, vocab_size=2048, n_routed_experts=64, moe_intermediate_size=64))
    (tmp_path/'o').mkdir(); watch = sorted(tmp_path.rglob('*'))
    r = subprocess.run([sys.executable, '-c', FULL, str(kb*1000), *map(str, run(src, tmp_path, texts, '--dtype', 'float32', '--keep', '1'))], capture_output=True, text=True, cwd=root)
    assert r.returncode==2 and r.stdout=='' and 'Traceback' not in r.stderr, (r.returncode, r.stderr)
    assert [l for l in r.stderr.splitlines() if l.startswith('moe-fuse: ')][-1:]==r.stderr.splitlines()[-1:] and 'large' in r.stderr
    assert sorted(tmp_path.rglob('*'))==watch

@pytest.mark.skipif(sys.platform!='linux' or os.geteuid()!=0, reason='only root can mount a small disk')
@pytest.mark.parametrize('kb', [300, 1900, 2700, 3600])
def test_full_disk(kb, tmp_path, texts, capfd):
    "Full at the states, at the embedding, at a layer, at the report"
    src = write(tmp_path/'src', *tiny(V3, num_hidden_layers=2, hidden_size=32, n_routed_experts=64, moe_intermediate_size=64))
    disk = tmp_path/'disk'; disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={kb}k', 'tmpfs', str(disk)], capture_output=True).returncode: pytest.skip('mounting is not allowed here')
    try:
        argv = run(src, tmp_path, texts, '--keep', '1', '--dtype', 'float32'); argv[2] = disk/'out'
        refused(argv, capfd, watch=[tmp_path], any_of=('No space left', 'are free'))   # the system's words, or ours where it can be known before
    finally: subprocess.run(['umount', '-l', str(disk)], check=True)

def test_hub_id_while_offline(tmp_path, texts):
    env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path/'hf')}
    for argv in run('nobody/no-such-model', tmp_path, texts), ['inspect', 'nobody/no-such-model']:
        r = subprocess.run([sys.executable, '-m', 'moe_fuse', *map(str, argv)], capture_output=True, text=True, cwd=root, env=env)
        assert (r.returncode, r.stdout, r.stderr.count('\n'))==(2, '', 1) and 'nobody/no-such-model' in r.stderr and not (tmp_path/'o').exists()

def test_source_that_is_not_there(tmp_path, texts, capfd):
    (tmp_path/'empty').mkdir()
    for src in tmp_path/'absent', tmp_path/'empty', 'a/b/c', one(tmp_path, 'x', 'file.safetensors'), '':
        for argv in run(src, tmp_path, texts), ['inspect', src]: refused(argv, capfd, src, watch=[tmp_path])

# eval and inspect

def test_eval_prints_one_json_document(src, tmp_path, texts, capfd):
    "A model against itself: no divergence, full agreement"
    assert main(['eval', str(src), '--against', str(src), '--data', texts[1], '--tokens', '2048', '--json'])==0
    o, e = capfd.readouterr()
    r = json.loads(o)
    assert set(r)=={'chat','code','mean'} and all(v['kl']==0 and v['agreement']==1 and v['loss_teacher']==v['loss_student'] for v in r.values())
    assert main(['eval', str(src), '--against', str(src), '--data', texts[1], '--tokens', '2048'])==0
    assert [l.split()[0] for l in capfd.readouterr().out.splitlines()]==['chat','code','mean']

def test_eval_of_models_with_different_vocabularies(src, tmp_path, texts, capfd):
    other = write(tmp_path/'other', *tiny(V3, num_hidden_layers=2, vocab_size=2056))
    refused(['eval', other, '--against', src, '--data', texts[1], '--tokens', '2048'], capfd, 'vocabular', watch=[tmp_path])

def test_eval_refuses_what_run_refuses(src, tmp_path, texts, capfd):
    for more,say in (('--tokens', '-5'), 'tokens'), (('--data', str(one(tmp_path, 'x\n'))), 'line 1'), (('--device', 'tpu'), 'tpu'):
        refused(['eval', src, '--against', src, '--data', texts[1], *more], capfd, say, watch=[tmp_path])

def test_inspect_needs_no_torch_and_less_than_a_second():
    "From headers alone; also the only thing on stdout is the JSON"
    code = "import sys; from moe_fuse.cli import main; code = main(['inspect', 'demo', '--json']); assert not {'torch','numpy','transformers','numba'} & set(sys.modules); sys.exit(code)"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root)
    assert r.returncode==0 and r.stderr=='', r.stderr
    assert json.loads(r.stdout)==json.loads(json.dumps(inspect(Checkpoint(resolve_source('demo')))))
    took = []
    for _ in range(3):
        t = time.perf_counter(); r = subprocess.run([sys.executable, '-m', 'moe_fuse', 'inspect', 'demo'], capture_output=True, text=True, cwd=root); took.append(time.perf_counter()-t)
        assert r.returncode==0 and 'DeepseekV3ForCausalLM' in r.stdout and '7.9 M parameters' in r.stdout
    assert min(took)<1

def test_help_and_no_command(capfd):
    with pytest.raises(SystemExit) as e: main(['--help'])
    assert e.value.code==0 and 'run' in capfd.readouterr().out
    with pytest.raises(SystemExit) as e: main([])
    assert e.value.code==2 and capfd.readouterr().out==''

def commands():
    from moe_fuse.cli import parser
    return next(a for a in parser()._actions if a.dest=='command').choices

@pytest.mark.parametrize('name', list(commands()))
def test_help_of_every_command(name, capfd):
    "Each says what every argument is, and has examples that parse"
    from moe_fuse.cli import parser
    with pytest.raises(SystemExit) as e: main([name, '--help'])
    said = capfd.readouterr().out
    assert e.value.code==0 and 'default: None' not in said and 'default: False' not in said
    assert [a.dest for a in commands()[name]._actions if not a.help]==[]
    examples = re.findall(r'^  (moe-fuse .*)', said.partition('examples:')[2], re.M)
    assert examples and all(parser().parse_args(shlex.split(x)[1:]).command==name for x in examples)

@pytest.mark.skipif(shutil.which('bash') is None, reason='the pipe is made in bash')
def test_a_pipe_that_closes_is_no_fault():
    "`moe-fuse plan demo | head -1` says its line and complains of nothing"
    r = subprocess.run(['bash', '-c', f'set -o pipefail; {shlex.quote(sys.executable)} -u -m moe_fuse plan demo | head -c 9'], capture_output=True, text=True, cwd=root)
    assert (r.returncode, r.stdout, r.stderr)==(0, 'fits: 1.4', '')

def test_demo_is_run_demo_with_the_defaults(monkeypatch, capfd):
    "The same call, into ./moe_fuse_demo if no folder is named"
    import moe_fuse.pipeline as pipeline
    calls = []
    def compress(**kw): calls.append(kw); raise KeyboardInterrupt
    monkeypatch.setattr(pipeline, 'compress', compress)
    for argv in ['demo'], ['run', 'demo', 'moe_fuse_demo'], ['demo', 'x'], ['run', 'demo', 'x']: assert main(argv)==130
    assert calls[0]==calls[1] and calls[2]==calls[3] and (calls[0]['out'], calls[2]['out'])==('moe_fuse_demo', 'x')

@pytest.mark.skipif(shutil.which('bash') is None, reason='completion is tried in bash')
def test_completion_in_bash(tmp_path):
    "Commands, options and files, through the function that argcomplete registers"
    pytest.importorskip('argcomplete')
    (tmp_path/'moe-fuse').write_text(f'#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(root)!r})\nfrom moe_fuse.cli import main\nsys.exit(main())\n')
    (tmp_path/'moe-fuse').chmod(0o755); (tmp_path/'student').mkdir()
    setup = subprocess.run([sys.executable, '-c', 'import argcomplete; print(argcomplete.shellcode(["moe-fuse"]))'], capture_output=True, text=True, check=True).stdout
    def complete(line):
        ask = f'{setup}\nCOMP_LINE={shlex.quote(line)}; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9; _python_argcomplete moe-fuse\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
        env = {**os.environ, 'PATH': f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'}
        return {w.strip() for w in subprocess.run(['bash', '--norc', '-c', ask], capture_output=True, text=True, cwd=tmp_path, env=env).stdout.split()}
    assert complete('moe-fuse ')>=set(commands())
    assert complete('moe-fuse ex')=={'export'}
    assert complete('moe-fuse run demo out --ke')=={'--keep'}
    assert 'student/' in complete('moe-fuse export stu')

# headers

def header_file(folder, body, n=None, tail=64):
    f = folder/'x.safetensors'
    f.write_bytes((len(body) if n is None else n).to_bytes(8, 'little') + body + b'\0'*tail)
    return f

def sound(path):
    "Either BadInput, or entries that are whole and lie in the file"
    try: head = read_header(path)
    except BadInput as e: assert '\n' not in str(e) and str(path) in str(e); return
    size = path.stat().st_size
    for e in head.values():
        assert e.dtype in ITEM_BYTES and all(isinstance(d, int) and d>=0 for d in e.shape) and isinstance(e.start, int) and isinstance(e.end, int) and 8<=e.start<=e.end<=size

json_values = st.recursive(st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=5) | st.sampled_from(['F32','BF16','I32']),
                           lambda x: st.lists(x, max_size=4) | st.dictionaries(st.sampled_from(['dtype','shape','data_offsets','a','__metadata__']), x, max_size=4), max_leaves=12)
fuzz = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

@fuzz
@given(st.binary(max_size=200))
@example(b'')
@example(b'\xff'*8)
def test_any_bytes_are_refused_in_one_line(tmp_path, data):
    (tmp_path/'x.safetensors').write_bytes(data)
    sound(tmp_path/'x.safetensors')

@fuzz
@given(st.binary(max_size=100))
@example(b'['*2000)
@example(b'{"a":'*1500 + b'1' + b'}'*1500)
@example(b'"a"')
@example(b'\xff\xfe{\x00}\x00')
def test_any_header_bytes_are_refused_in_one_line(tmp_path, data): sound(header_file(tmp_path, data))

@fuzz
@given(json_values)
@example([])
@example(3)
@example(None)
def test_any_json_as_a_header_is_refused_in_one_line(tmp_path, value): sound(header_file(tmp_path, json.dumps(value).encode()))

@fuzz
@given(st.dictionaries(st.text(max_size=4), st.fixed_dictionaries(dict(dtype=st.sampled_from(['F32','BF16','U8']) | json_values, shape=st.lists(st.integers(-2, 4), max_size=3) | json_values,
                                                                       data_offsets=st.lists(st.integers(-8, 80), min_size=2, max_size=2) | json_values)), max_size=3))
@example({'w': dict(dtype=['F32'], shape=[1], data_offsets=[0, 4])})
@example({'w': dict(dtype='F32', shape=['x'], data_offsets=[0, 4])})
@example({'w': dict(dtype='F32', shape=[-1, -1], data_offsets=[0, 4])})
@example({'w': dict(dtype='F32', shape=[1.0], data_offsets=[0.0, 4.0])})
@example({'w': dict(dtype='F32', shape=[1], data_offsets=['a', 'b'])})
@example({'w': dict(dtype='F32', shape='', data_offsets=[0, 4])})
@example({'w': dict(dtype='F32', shape=[True], data_offsets=[False, 4])})
@example({'w': 3})
def test_any_entry_in_a_header_is_whole_or_refused_in_one_line(tmp_path, head): sound(header_file(tmp_path, json.dumps(head).encode()))

@fuzz
@given(st.integers(0, 400), st.integers(0, 255))
def test_one_wrong_byte_in_a_header(tmp_path, at, byte):
    from safetensors.torch import save_file
    f = tmp_path/'x.safetensors'
    save_file({'a': torch.ones(3, 4), 'b.weight': torch.ones(5, dtype=torch.bfloat16)}, f, metadata={'format':'pt'})
    b = bytearray(f.read_bytes()); b[at%len(b)] = byte; f.write_bytes(bytes(b))
    sound(f)
