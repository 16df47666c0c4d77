"""How many tokens a second does a student decode beside its teacher, at batch 1, in `transformers` and in llama.cpp, and how far is each from what memory allows?

    python bench/decode.py                                                       # 200 M parameters in float32
    python bench/decode.py --hidden 2048 --width 1408 --layers 12 --device cuda --dtype bfloat16

Teacher and student are random: the embedded teacher's architecture in a larger size, and the same with experts a quarter as wide, as a slim student has them. A token has to read the weights that are active for it, once;
the ceiling is their bytes at the rate of a copy, which is measured here too. What `transformers` takes beyond is Python between small kernels. llama.cpp runs the student's GGUF, on the CPU, if llama-cpp-python and
the converter (LLAMA_CPP) are there; `make llama` brings both.
"""
import contextlib, tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from measure import *
from moe_fuse.headers import *
from moe_fuse.llama_cpp import write_gguf
from peak_memory import write_checkpoint

p = arguments(__doc__, hidden=1024, width=256, experts=64, layers=5, prompt=16, tokens=32, repeats=3)
p.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
a = p.parse_args(); dtype = getattr(torch, a.dtype)
torch.manual_seed(0); torch.set_grad_enabled(False)

def checkpoint(folder, width, n_shared):
    write_checkpoint(folder, dict(hidden_size=a.hidden, moe_intermediate_size=width, n_routed_experts=a.experts, num_hidden_layers=a.layers, n_shared_experts=n_shared))
    return Checkpoint(folder)

def read_by_token(info): return info['active'] - info['parameters']['embeddings']           # one row of these, not all

def generate(folder): # -> function that decodes a.tokens
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(a.device).eval()
    ids = torch.arange(40, 40+a.prompt, device=a.device)[None]
    def run(n): assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=4).shape[1]==a.prompt+n
    return run

def llama(file, stack): # -> the same of llama.cpp
    import llama_cpp
    m = llama_cpp.Llama(str(file), n_ctx=a.prompt+a.tokens+8, n_threads=torch.get_num_threads(), n_threads_batch=torch.get_num_threads(), n_gpu_layers=0, verbose=False)
    stack.callback(m.close)
    def run(n):
        m.reset(); m.eval(list(range(40, 40+a.prompt)))
        for _ in range(n): m.eval([m.sample(temp=0)])
    return run

with tempfile.TemporaryDirectory() as d, contextlib.ExitStack() as stack:
    d = Path(d); cks = dict(teacher=checkpoint(d/'teacher', a.width, 1), student=checkpoint(d/'student', a.width//4, 4))
    info = {k: inspect(c) for k,c in cks.items()}
    ways = {f'{k}, transformers': (k, generate(c.folder), dtype.itemsize) for k,c in cks.items()}
    missing = None
    try:
        import llama_cpp
        for how,size in (('f32', 4), ('q8_0', 34/32)):
            write_gguf(d/'student', d/f'{how}.gguf', how)
            ways[f'student, llama.cpp {how}'] = 'student', llama(d/f'{how}.gguf', stack), size
    except (ImportError, BadInput) as e: missing = str(e) if isinstance(e, BadInput) else 'llama-cpp-python is not installed'
    # the time of one token is the difference between many and one: the prompt and what `generate` sets up are in both
    more = {f'{k} {n}': (lambda f=f, n=n: f(n)) for k,(_,f,_) in ways.items() for n in (1, a.tokens+1)}
    t = in_turns(more, a.repeats, a.device, warm=1)
    one = {k: (t[f'{k} {a.tokens+1}']-t[f'{k} 1'])/a.tokens for k in ways}
    _, copy = ceilings(a.device, dtype)
    facts = {k: dict(tokens=1, active=info[of]['active'], bytes=read_by_token(info[of])*size, flops=2*read_by_token(info[of])) | (dict(engine=f'llama-cpp-python {llama_cpp.__version__}') if 'llama' in k else {}) for k,(of,_,size) in ways.items()}
    first = 'teacher, transformers'
    rows = [row(f'decode at batch 1, {k}', one[k], 'the teacher in transformers' if of!='teacher' and 'llama' not in k else 'the student in transformers', one[first if 'llama' not in k else 'student, transformers'],
                'bytes and, in transformers, Python' if 'llama' not in k else 'bytes', **facts[k]) for k,(of,_,_) in ways.items() if k!=first]
    rows += [row(f'decode at batch 1, {k}', one[k], 'its active weights at the rate of a copy', facts[k]['bytes']/copy, 'bytes' if 'llama' in k else 'Python between small kernels', ceiling=True, **facts[k]) for k in ways]
    if missing: rows.append(not_run('decode at batch 1, student, llama.cpp', missing))
    print('teacher', {k: info['teacher'][k] for k in ('total', 'active')}, 'student', {k: info['student'][k] for k in ('total', 'active')}, f'copy {copy/1e9:.1f} GB/s')
    give(a, rows)
