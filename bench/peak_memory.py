"""Does `moe-fuse run` need no more memory than 3 times the largest layer in float32, plus 1 GB, however large the checkpoint?

    python bench/peak_memory.py            # writes 8.6 GB of random weights to a temporary folder; needs 13 GB of disk in all
    python bench/peak_memory.py FOLDER     # the same in FOLDER, where the weights stay for the next time
    python bench/peak_memory.py --small    # 0.2 GB, to try the script out: libraries and activations, not layers, fill most of its limit

The checkpoint has the embedded teacher's architecture, tokenizer and vocabulary, with a larger hidden size and much larger routed experts. The run,
baselines included, is a process of its own, so that its peak is its own. Exit code 1 if it was over the limit.
"""
import argparse, json, os, shutil, subprocess, sys, tempfile, time
from collections import defaultdict
from pathlib import Path

import numpy as np

from moe_fuse.headers import BadInput, Checkpoint, read_json, resolve_source   # no torch: a child's peak counts that of the process it was forked from

# A layer of 128 experts is 1.2 GB in float32; at keep 0.25 the fit's normal matrix has 128*48+192 rows, which is 0.32 GB in float64.
FULL  = dict(hidden_size=4096, moe_intermediate_size=192, n_routed_experts=128, num_hidden_layers=15)
SMALL = dict(hidden_size=1024, moe_intermediate_size=128, n_routed_experts=64, num_hidden_layers=5)
CHUNK = 2**20  # weights drawn at a time

def layer_shapes(c, i): # config, layer -> {tensor name: shape}
    "One decoder layer with the embedded teacher's architecture."
    h, heads, q, kv = c['hidden_size'], c['num_attention_heads'], c['q_lora_rank'], c['kv_lora_rank']
    attention = dict(q_a_proj=(q, h), q_a_layernorm=(q,), q_b_proj=(heads*(c['qk_nope_head_dim']+c['qk_rope_head_dim']), q), kv_a_proj_with_mqa=(kv+c['qk_rope_head_dim'], h),
                     kv_a_layernorm=(kv,), kv_b_proj=(heads*(c['qk_nope_head_dim']+c['v_head_dim']), kv), o_proj=(h, heads*c['v_head_dim']))
    mlp = lambda prefix, width: {f'{prefix}{k}_proj.weight': (width, h) if k!='down' else (h, width) for k in ('gate', 'up', 'down')}
    out = dict.fromkeys(('input_layernorm.weight', 'post_attention_layernorm.weight'), (h,)) | {f'self_attn.{k}.weight':s for k,s in attention.items()}
    n, width = c['n_routed_experts'], c['moe_intermediate_size']
    if i < c['first_k_dense_replace']: out |= mlp('mlp.', c['intermediate_size'])
    else:
        out |= {'mlp.gate.weight':(n, h), 'mlp.gate.e_score_correction_bias':(n,)} | mlp('mlp.shared_experts.', width*c['n_shared_experts'])
        for e in range(n): out |= mlp(f'mlp.experts.{e}.', width)
    return {f'model.layers.{i}.{k}':s for k,s in out.items()}

def draw(name, shape, rng): # yields bytes
    "Norms are 1, the router's bias 0; all else is uniform, of variance 1 in embeddings, in matrices one over their inputs."
    n = int(np.prod(shape))
    if name.endswith('e_score_correction_bias'): yield bytes(4*n); return
    std = 1 if 'embed_tokens' in name else shape[-1]**-.5
    for a in range(0, n, CHUNK):
        w = np.ones(n, np.float32) if 'norm' in name else (rng.random(min(CHUNK, n-a), np.float32)-np.float32(.5))*np.float32(12**.5*std)
        yield (w.view(np.uint32)>>16).astype(np.uint16)                        # bfloat16 is the upper half of float32

def write_shard(path, shapes, rng):
    "Write one safetensors file, a chunk at a time."
    head, at = {}, 0
    for k,s in shapes.items():
        dtype, size = ('F32', 4) if k.endswith('e_score_correction_bias') else ('BF16', 2)
        head[k] = dict(dtype=dtype, shape=s, data_offsets=[at, at := at+size*int(np.prod(s))])
    head = json.dumps(head).encode(); head += b' '*(-len(head)%8)
    with open(path, 'wb') as f:
        f.write(len(head).to_bytes(8, 'little') + head)
        for k,s in shapes.items():
            for part in draw(k, s, rng): f.write(part)

def write_checkpoint(folder, size):
    "Write the synthetic teacher; one that is already there is kept. Its config is written last."
    demo = resolve_source('demo')
    c = {k:v for k,v in read_json(demo/'config.json').items() if k!='quantization_config'} | size
    if (folder/'config.json').exists():
        if read_json(folder/'config.json')!=c: raise BadInput(f'{folder}: holds another checkpoint; delete it first')
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng, n, ends = np.random.default_rng(0), c['num_hidden_layers'], (c['vocab_size'], c['hidden_size'])
    shards = [{'model.embed_tokens.weight':ends, 'model.norm.weight':ends[1:], 'lm_head.weight':ends}, *(layer_shapes(c, i) for i in range(n))]
    name = lambda i: f'model-{i+1:05}-of-{n+1:05}.safetensors'
    for i,s in enumerate(shards): write_shard(folder/name(i), s, rng)
    for f in demo.iterdir():
        if f.name.startswith(('tokenizer', 'chat_template', 'generation_config')): shutil.copy(f, folder)
    (folder/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map={k:name(i) for i,s in enumerate(shards) for k in s})))
    (folder/'config.json').write_text(json.dumps(c))

def layer_bytes(ck): # -> [bytes of each layer in float32]
    n = defaultdict(int)
    for k,e in ck.entries.items():
        if k.startswith('model.layers.'): n[k.split('.')[2]] += 4*int(np.prod(e.shape))
    return list(n.values())

def measure(cmd): # -> (stdout, bytes, seconds)
    "Run a command and ask the system for its peak resident memory."
    start = time.time()
    p = subprocess.Popen(cmd, stdout=subprocess.PIPE)
    out = p.stdout.read()
    _, status, usage = os.wait4(p.pid, 0)
    p.returncode = os.waitstatus_to_exitcode(status)
    if p.returncode: sys.exit(f'{" ".join(cmd)} ended with exit code {p.returncode}')
    return out, usage.ru_maxrss*(1 if sys.platform=='darwin' else 1024), time.time()-start

def bench(folder, a):
    start = time.time()
    write_checkpoint(folder/'teacher', SMALL if a.small else FULL)
    ck, wrote = Checkpoint(folder/'teacher'), time.time()-start
    cmd = [sys.executable, '-m', 'moe_fuse', 'run', str(folder/'teacher'), str(folder/'out'), '--keep', str(a.keep), '--tokens', str(a.tokens), '--eval-tokens', str(a.eval_tokens), '--device', 'cpu', '--json']
    try: out, peak, seconds = measure(cmd)
    finally:
        for d in 'out', 'out.partial': shutil.rmtree(folder/d, ignore_errors=True)
    report, layer = json.loads(out), max(layer_bytes(ck))
    limit = 3*layer + 10**9
    c, gb = ck.config, lambda n: f'{n/1e9:.3f} GB'
    rows = [('checkpoint', gb(ck.nbytes)), ('layers', f'{c["num_hidden_layers"]} ({c["first_k_dense_replace"]} dense)'), ('hidden size', c['hidden_size']),
            ('routed experts a layer', f'{c["n_routed_experts"]} of width {c["moe_intermediate_size"]}'), ('tokens', f'{a.tokens:,} calibration, {a.eval_tokens:,} held out'), ('keep', a.keep),
            ('largest layer in float32', gb(layer)), ('limit: 3 of these + 1 GB', gb(limit)), ('peak memory', gb(peak)), ('  as the run itself counts it', gb(report['peak_rss'])),
            ('peak / limit', f'{peak/limit:.3f}'), ('peak above 1 GB, in layers', f'{(peak-1e9)/layer:.2f}'), ('seconds, writing the checkpoint', f'{wrote:.0f}'), ('seconds, the run', f'{seconds:.0f}'),
            *((f'  {k}', f'{s:.1f}') for k,s in report['seconds'].items())]
    print('\n'.join(f'| {k:<31} | {v!s:>34} |' for k,v in [('', ''), *rows]).replace(f'|\n| {rows[0][0]}', f'|\n|{"-"*33}|{"-"*35}:|\n| {rows[0][0]}', 1))
    return peak<=limit

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', nargs='?', type=Path, help='where the checkpoint goes and stays; left out, a temporary folder')
    p.add_argument('--small', action='store_true', help='0.2 GB instead of 8.6'); p.add_argument('--keep', type=float, default=.25)
    p.add_argument('--tokens', type=int, default=4096, help='calibration tokens'); p.add_argument('--eval-tokens', type=int, default=2048, help='held-out tokens')
    a = p.parse_args()

    if a.folder: ok = bench(a.folder, a)
    else:
        with tempfile.TemporaryDirectory() as d: ok = bench(Path(d), a)
    sys.exit(not ok)
