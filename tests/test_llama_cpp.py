"Written students in llama.cpp: the same logits, the same words, and nothing that it would misread."
import json, os, shutil, subprocess, sys
import numpy as np, pytest, torch, transformers
from tiny_models import *
from test_families import tiny
from tiny_models import write
from moe_fuse.fused_files import unfold
from moe_fuse.headers import *
from moe_fuse.layouts import export
from moe_fuse.llama_cpp import *
from moe_fuse.pipeline import compress

try: import llama_cpp
except ImportError: llama_cpp = None
missing = 'llama-cpp-python is not installed' if llama_cpp is None else None if os.environ.get('LLAMA_CPP') else 'LLAMA_CPP names no converter'
if missing and os.environ.get('CI'): raise RuntimeError(f'{missing}: these tests must run in CI')
engine = pytest.mark.skipif(bool(missing), reason=str(missing))

def run_both(folder, file, ids, steps=32): # -> (largest difference of logits, largest logit, tokens of transformers, tokens of llama.cpp)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    x = torch.tensor([ids])
    with torch.no_grad():
        want = hf(x).logits[0].numpy()
        words = hf.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0)[0,len(ids):].tolist()
    m = llama_cpp.Llama(str(file), logits_all=True, n_ctx=len(ids)+steps, type_k=0, type_v=0, flash_attn=False, verbose=False)
    m.eval(ids); got, mine = np.array(m.scores[:len(ids)]), []
    eos = hf.generation_config.eos_token_id
    for _ in range(steps):
        z = np.array(m.scores[m.n_tokens-1]); z[[] if eos is None else eos] = -np.inf   # as min_new_tokens does
        mine.append(int(z.argmax())); m.eval(mine[-1:])
    m.close()
    return np.abs(got-want).max(), np.abs(want).max(), words, mine

@pytest.fixture(scope='module')
def students(tmp_path_factory):
    d = tmp_path_factory.mktemp('students')
    for name,kw in dict(slim=dict(keep=.25), pruned=dict(keep=.5, method='reap'), shared=dict(keep=.5, shared_share=.25), fused=dict(keep=.25, method='fused')).items():
        compress('demo', d/name, tokens=4096, eval_tokens=2048, baselines=(), dtype='float32', quiet=True, **kw)
    return d

@engine
@pytest.mark.parametrize('name', ['slim', 'pruned', 'shared'])
def test_students_of_the_trained_teacher(students, tmp_path, name):
    found = write_gguf(students/name, tmp_path/'s.gguf', 'f32')
    assert found['vocabulary'] and sorted(f.name for f in tmp_path.iterdir())==['s.gguf']
    tok = transformers.AutoTokenizer.from_pretrained(students/name)
    text = 'class Reader:\n    """Reads `path` — naïve, 2.5x slower."""\n    def __init__(self, path):\n        self.path = path\n\n    def read(self):'
    ids = tok(text)['input_ids']
    far, most, words, mine = run_both(students/name, tmp_path/'s.gguf', ids)
    assert far<1e-4 and words==mine
    m = llama_cpp.Llama(str(tmp_path/'s.gguf'), vocab_only=True, verbose=False)
    assert m.tokenize(text.encode(), add_bos=False, special=False)==ids
    m.close()

@engine
def test_a_fused_student_is_unfolded_on_the_way(students, tmp_path):
    found = export(students/'fused', tmp_path/'s.gguf', 'unfolded', 'gguf:f32')
    assert found['vocabulary'] and [f.name for f in tmp_path.iterdir()]==['s.gguf']
    unfold(students/'fused', tmp_path/'flat')
    far, most, words, mine = run_both(tmp_path/'flat', tmp_path/'s.gguf', list(range(40, 120)))
    assert far<1e-4 and words==mine

@engine
def test_the_layer_for_multi_token_prediction_is_left_out(tmp_path):
    "The converter knows it by its index; 61 random layers amplify rounding"
    from test_mtp import with_mtp
    write_gguf(write(tmp_path/'s', *with_mtp(scoring_func='sigmoid', topk_method='noaux_tc')), tmp_path/'s.gguf', 'f32')
    far, most, words, mine = run_both(tmp_path/'s', tmp_path/'s.gguf', list(range(5, 60)), 16)
    assert far<1e-4*most and words==mine

FAMILIES_IN_LLAMA = {'qwen2_moe': dict(decoder_sparse_step=1), 'qwen3_moe': dict(mlp_only_layers=[]), 'mixtral': {}, 'deepseek_v2': dict(q_lora_rank=32, norm_topk_prob=False), 'deepseek_v3': {}}

@engine
@pytest.mark.parametrize('family', FAMILIES_IN_LLAMA)
def test_other_families_with_random_weights(tmp_path, family):
    "Random layers amplify rounding, so the bound is relative: 1e-4 of the largest logit"
    write(tmp_path/'s', *tiny(family, **FAMILIES_IN_LLAMA[family]))
    write_gguf(tmp_path/'s', tmp_path/'s.gguf', 'f32')
    far, most, words, mine = run_both(tmp_path/'s', tmp_path/'s.gguf', list(range(5, 60)), 16)
    assert far<1e-4*most and words==mine

@engine
@pytest.mark.parametrize('family', ['deepseek_v2', 'deepseek_v3'])
def test_the_file_says_what_the_config_says(students, tmp_path, family):
    "Keys and tensors by which llama.cpp routes; read with its own reader"
    if family=='deepseek_v3': folder = students/'slim'
    else: folder = write(tmp_path/'s', *tiny(family, **FAMILIES_IN_LLAMA[family], routed_scaling_factor=1.5))
    write_gguf(folder, tmp_path/'s.gguf', 'f32')
    sys.path.insert(0, f'{os.environ["LLAMA_CPP"]}/gguf-py')
    try: from gguf import GGUFReader
    finally: sys.path.pop(0)
    r, c = GGUFReader(tmp_path/'s.gguf'), json.loads((folder/'config.json').read_text())
    says = {k.removeprefix('deepseek2.'): f.contents() for k,f in r.fields.items() if k.startswith('deepseek2.')}
    want = dict(block_count=c['num_hidden_layers'], expert_count=c['n_routed_experts'], expert_used_count=c['num_experts_per_tok'], expert_feed_forward_length=c['moe_intermediate_size'],
                expert_shared_count=c['n_shared_experts'], leading_dense_block_count=c['first_k_dense_replace'], expert_weights_scale=c['routed_scaling_factor'])
    for k,v in want.items(): assert says[k]==v, k
    assert says['expert_gating_func']==(2 if family=='deepseek_v3' else 1)      # sigmoid, softmax
    assert bool(says.get('expert_weights_norm'))==c['norm_topk_prob']
    if family=='deepseek_v3': assert says['expert_group_count']==c['n_group'] and says['expert_group_used_count']==c['topk_group']
    names, i = {t.name for t in r.tensors}, c['first_k_dense_replace']
    assert {'blk.0.attn_k_b.weight', 'blk.0.attn_v_b.weight', f'blk.{i}.ffn_gate_exps.weight', f'blk.{i}.ffn_gate_shexp.weight'}<=names and 'blk.0.attn_kv_b.weight' not in names
    assert (f'blk.{i}.exp_probs_b.bias' in names)==(family=='deepseek_v3')

@engine
@pytest.mark.parametrize('how', ['f16', 'bf16', 'q8_0', 'q4_0', 'q4_k_m', 'q6_k'])
def test_every_type_is_written_and_read(students, tmp_path, how):
    r = write_gguf(students/'slim', tmp_path/'s.gguf', how)
    assert r['bytes']==(tmp_path/'s.gguf').stat().st_size and sorted(f.name for f in tmp_path.iterdir())==['s.gguf']
    m = llama_cpp.Llama(str(tmp_path/'s.gguf'), n_ctx=64, verbose=False)
    assert m.create_completion('import ', max_tokens=4)['choices'][0]['text']
    m.close()
    assert ('hidden_size' in r['odd_columns'])==(how in ('q4_k_m', 'q6_k'))

@engine
def test_unknown_tokenizer_gives_token_ids_only(students, tmp_path):
    shutil.copytree(students/'slim', tmp_path/'s')
    t = json.loads((tmp_path/'s'/'tokenizer.json').read_text()); t['pre_tokenizer'] = dict(type='Sequence', pretokenizers=[dict(type='Digits', individual_digits=True), t['pre_tokenizer']])
    (tmp_path/'s'/'tokenizer.json').write_text(json.dumps(t))
    assert not write_gguf(tmp_path/'s', tmp_path/'s.gguf', 'f32')['vocabulary']
    far, most, words, mine = run_both(tmp_path/'s', tmp_path/'s.gguf', list(range(5, 40)))
    assert far<1e-4 and words==mine

@engine
def test_a_failing_converter_leaves_nothing(students, tmp_path):
    shutil.copytree(students/'slim', tmp_path/'s')
    (tmp_path/'s'/'tokenizer.json').write_text('{')
    with pytest.raises(BadInput, match='converter failed'): write_gguf(tmp_path/'s', tmp_path/'s.gguf', 'f32')
    assert not list(tmp_path.glob('*.gguf*'))

@engine
def test_full_disk_is_said_and_leaves_nothing(tmp_path):
    from test_layouts import FULL
    r = subprocess.run([sys.executable, '-c', FULL, '300000', 'export', str(write(tmp_path/'t', *tiny('deepseek_v3'))), str(tmp_path/'s.gguf'), '--dtype', 'gguf:f32'], capture_output=True, text=True, cwd=root)
    assert r.returncode==2 and 'converter failed: OSError: ' in r.stderr.splitlines()[-1], r.stderr
    assert [f.name for f in tmp_path.iterdir()]==['t']

def test_refused_before_anything_is_written(tmp_path):
    with pytest.raises(BadInput, match='weights are packed'): write_gguf('demo', tmp_path/'s.gguf')
    assert not list(tmp_path.iterdir())
