"""What does a forward pass over calibration text cost more when the layers come from the disk one by one, and what do the statistics of its experts?

    python bench/streaming.py                    # the embedded teacher with 8 times as many experts, 50 MB of FP8
    python bench/streaming.py FOLDER             # any checkpoint that fits into memory in float32
    python bench/streaming.py --tokens 65536 --repeats 5 --device cuda

The same layers, batches and states are gone through twice, in turns: with every layer read, unpacked and let go again, and with all layers held in memory.
Prints the ratio of the medians; the aim is 1.15 at most. It falls with the number of tokens, for a layer is read once, however many tokens pass through it.
Beside it stand `transformers`' own forward pass of the same model, held in memory, over the same batches (without the head), and the calibration pass, which is the streamed one with the statistics of every expert.
With --long no sequence is shorter than the others, and `transformers` has no padding to compute, which ours keeps out of the experts.
"""
import argparse, json, shutil, statistics, tempfile, time
from pathlib import Path

import torch
from safetensors.torch import save_file

from measure import add_json, ceilings, give, row
from moe_fuse.awq_loading import *
from moe_fuse.calibration import *
from moe_fuse.calibration_pass import layer_statistics
from moe_fuse.headers import *
from moe_fuse.heal import whole_model
from moe_fuse.planning import run_sizes, teacher_stage

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

@torch.no_grad()
def stock(model, tokens, device): # -> seconds
    "The layers of `transformers`, in memory, batch by batch"
    if device=='cuda': torch.cuda.synchronize()
    start = time.perf_counter()
    for a,b,lengths in tokens.batches(): model.model(input_ids=pad(tokens.ids[a:b], lengths).to(device), use_cache=False).last_hidden_state
    if device=='cuda': torch.cuda.synchronize()
    return time.perf_counter()-start

def long(docs, tokens): # one document a domain, long enough
    texts = {}
    for d in docs: texts.setdefault(d['domain'], []).append(d['text'] if 'text' in d else '\n'.join(m['content'] for m in d['messages']))
    return [dict(domain=k, text='\n'.join(t)[:8*tokens]) for k,t in texts.items()]

def bench(folder, a):
    ck = Checkpoint(folder)
    tokens = sample_tokens(long(read_docs(a.text), a.tokens) if a.long else read_docs(a.text), load_tokenizer(folder), a.tokens, min(512, ck.config['max_position_embeddings']))
    held, model = empty_model(ck), empty_model(ck)
    states, rotary = States(len(tokens), ck.config['hidden_size']), model.model.rotary_emb
    held.config._attn_implementation = 'padded_sdpa'
    layers = [(i, load_module(ck, l, f'model.layers.{i}', device=a.device)) for i,l in enumerate(held.model.layers)]
    times, last, theirs = dict(memory=[], streamed=[], read=[], stock=[], statistics=[]), {}, whole_model(ck, device=a.device)
    theirs.config._attn_implementation = 'sdpa'
    for r in range(a.repeats+1):                                               # the first one warms up and is not counted
        for k,source in (('memory', layers), ('streamed', stream_layers(ck, model, device=a.device)), ('read', None)):
            embed_tokens(ck, tokens.ids, states)
            start = time.perf_counter()
            if k=='read': [None for _ in stream_layers(ck, model, device=a.device)]
            t = time.perf_counter()-start if k=='read' else forward(source, states, tokens, rotary, a.device)
            if r: times[k].append(t)
            if k!='read': last[k] = states.read(0, len(tokens))
        t = stock(theirs, tokens, a.device)
        start = time.perf_counter(); layer_statistics(ck, tokens, device=a.device)
        if r: times['stock'].append(t); times['statistics'].append(time.perf_counter()-start)
    assert torch.equal(last['memory'], last['streamed']), 'the two passes differ'
    m = {k: statistics.median(v) for k,v in times.items()}
    size = sum(p.numel()*p.element_size() for _,l in layers for p in l.parameters())
    rows = [('checkpoint', f'{ck.nbytes/1e6:.1f} MB'), ('layers in float32', f'{size/1e6:.1f} MB'), ('tokens', f'{len(tokens):,}'), ('device, threads', f'{a.device}, {torch.get_num_threads()}'),
            *((f'seconds, {n}', f'{m[k]:.2f} ({min(times[k]):.2f} to {max(times[k]):.2f})') for k,n in (('memory', 'all in memory'), ('streamed', 'streamed'), ('read', 'reading alone'), ('stock', "transformers' own"), ('statistics', 'with statistics'))),
            ('streamed / in memory', f'{m["streamed"]/m["memory"]:.3f}'), ('  in the pairs of runs', f'{min(p := [s/t for s,t in zip(times["streamed"], times["memory"])]):.3f} to {max(p):.3f}')]
    print('\n'.join(f'| {k:<26} | {v:>26} |' for k,v in rows))

    z = run_sizes(ck.config, card=a.device=='cuda', tokens=max(2048, len(tokens)), eval_tokens=2048); flops = teacher_stage(z).flops/z.tokens*len(tokens)
    active, facts = inspect(ck)['active'], dict(tokens=len(tokens), flops=flops, bytes=ck.nbytes)
    name, peer = {'streamed': 'forward pass, layers streamed from packed files', 'statistics': 'calibration pass, streamed, with the statistics of all experts'}, "transformers' forward, held in memory"
    give(a, [row(v, m[k], peer, m['stock'], 'FLOPs', active=active, **facts) for k,v in name.items()] + [row(name['streamed'], m['streamed'], 'the same layers held in memory', m['memory'], 'FLOPs, then reading', active=active, **facts)]
            + [row(name['statistics'], m['statistics'], 'a matrix product of as many FLOPs', flops/ceilings(a.device)[0], 'FLOPs in small products', ceiling=True, active=active, **facts)])

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('folder', nargs='?', type=Path, help='a checkpoint; left out, the inflated teacher in a temporary folder')
p.add_argument('--long', action='store_true', help='documents of a domain are laid end to end')
p.add_argument('--times', type=int, default=8, help='copies of each expert of the embedded teacher'); p.add_argument('--text', default='demo', help='as --calibration of moe-fuse run')
p.add_argument('--tokens', type=int, default=32768); p.add_argument('--repeats', type=int, default=5); p.add_argument('--device', default='cpu'); add_json(p)
a = p.parse_args()

if a.folder: bench(a.folder, a)
else:
    with tempfile.TemporaryDirectory() as d: bench(inflate(Path(d), a.times), a)
