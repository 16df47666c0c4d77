"""What does a forward pass over calibration text cost more when the layers come from the disk one by one?

    python bench/streaming.py                    # the embedded teacher with 8 times as many experts, 50 MB of FP8
    python bench/streaming.py FOLDER             # any checkpoint that fits into memory in float32
    python bench/streaming.py --tokens 65536 --repeats 5 --device cuda

The same layers, batches and states are gone through twice, in turns: with every layer read, unpacked and let go again, and with all layers held in memory.
Prints the ratio of the medians; the aim is 1.15 at most. It falls with the number of tokens, for a layer is read once, however many tokens pass through it.
"""
import argparse, json, shutil, statistics, tempfile, time
from pathlib import Path

import torch
from safetensors.torch import save_file

from moe_fuse.awq_loading import *
from moe_fuse.calibration import *
from moe_fuse.headers import *

def inflate(folder, times): # -> folder
    "The embedded teacher with each of its experts and router rows repeated: the size of a larger model, the format and architecture of the small one."
    demo = Checkpoint(resolve_source('demo'))
    n, state = demo.config['n_routed_experts'], {}
    for k in demo.entries:
        t, parts = demo.stored(k).clone(), k.split('.mlp.experts.')
        if '.mlp.gate.' in k: t = t.repeat(times, *[1]*(t.dim()-1))
        if len(parts)==1: state[k] = t; continue
        e, rest = parts[1].split('.', 1)
        for r in range(times): state[f'{parts[0]}.mlp.experts.{int(e)+r*n}.{rest}'] = t.clone()
    save_file(state, folder/'model.safetensors')
    (folder/'config.json').write_text(json.dumps(demo.config | dict(n_routed_experts=n*times)))
    for f in demo.folder.glob('*token*'): shutil.copy(f, folder)
    for f in demo.folder.glob('chat_template*'): shutil.copy(f, folder)
    return folder

@torch.no_grad()
def forward(layers, states, tokens, rotary, device): # -> seconds
    "Move all states through layers, as (index, layer) pairs give them."
    if device=='cuda': torch.cuda.synchronize()
    start = time.perf_counter()
    for _,layer in layers:
        for a,b,lengths in tokens.batches(): states.write(a, layer_forward(layer, states.read(a, b, device), lengths, rotary))
    if device=='cuda': torch.cuda.synchronize()
    return time.perf_counter()-start

def bench(folder, a):
    ck = Checkpoint(folder)
    tokens = sample_tokens(read_docs(a.text), load_tokenizer(folder), a.tokens, min(512, ck.config['max_position_embeddings']))
    held, model = empty_model(ck), empty_model(ck)
    states, rotary = States(len(tokens), ck.config['hidden_size']), model.model.rotary_emb
    held.config._attn_implementation = 'padded_sdpa'
    layers = [(i, load_module(ck, l, f'model.layers.{i}', device=a.device)) for i,l in enumerate(held.model.layers)]
    times, last = dict(memory=[], streamed=[], read=[]), {}
    for r in range(a.repeats+1):                                               # the first one warms up and is not counted
        for k,source in (('memory', layers), ('streamed', stream_layers(ck, model, device=a.device)), ('read', None)):
            embed_tokens(ck, tokens.ids, states)
            start = time.perf_counter()
            if k=='read': [None for _ in stream_layers(ck, model, device=a.device)]
            t = time.perf_counter()-start if k=='read' else forward(source, states, tokens, rotary, a.device)
            if r: times[k].append(t)
            if k!='read': last[k] = states.read(0, len(tokens))
    assert torch.equal(last['memory'], last['streamed']), 'the two passes differ'
    m = {k: statistics.median(v) for k,v in times.items()}
    size = sum(p.numel()*p.element_size() for _,l in layers for p in l.parameters())
    rows = [('checkpoint', f'{ck.nbytes/1e6:.1f} MB'), ('layers in float32', f'{size/1e6:.1f} MB'), ('tokens', f'{len(tokens):,}'), ('device, threads', f'{a.device}, {torch.get_num_threads()}'),
            *((f'seconds, {n}', f'{m[k]:.2f} ({min(times[k]):.2f} to {max(times[k]):.2f})') for k,n in (('memory', 'all in memory'), ('streamed', 'streamed'), ('read', 'reading alone'))),
            ('streamed / in memory', f'{m["streamed"]/m["memory"]:.3f}'), ('  in the pairs of runs', f'{min(p := [s/t for s,t in zip(times["streamed"], times["memory"])]):.3f} to {max(p):.3f}')]
    print('\n'.join(f'| {k:<24} | {v:>26} |' for k,v in rows))

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('folder', nargs='?', type=Path, help='a checkpoint; left out, the inflated teacher in a temporary folder')
p.add_argument('--times', type=int, default=8, help='copies of each expert of the embedded teacher'); p.add_argument('--text', default='demo', help='as --calibration of moe-fuse run')
p.add_argument('--tokens', type=int, default=32768); p.add_argument('--repeats', type=int, default=5); p.add_argument('--device', default='cpu')
a = p.parse_args()

if a.folder: bench(a.folder, a)
else:
    with tempfile.TemporaryDirectory() as d: bench(inflate(Path(d), a.times), a)
