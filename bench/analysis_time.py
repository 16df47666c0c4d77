"""What does `moe-fuse analyse` cost beyond the teacher's forward pass?

    python bench/analysis_time.py TEACHER DATA

TEACHER is a checkpoint or `demo`, DATA a folder with DOMAIN.train.jsonl.gz, or `demo`. Both are timed in one process, the forward pass over the same tokens
first; CPU seconds are those of all threads, and say more than wall seconds on a machine that others use. The last row is the ratio to the forward pass.
"""
import argparse, tempfile, time
from pathlib import Path

import torch

from measure import add_json, give, row
from moe_fuse.analysis import *
from moe_fuse.awq_loading import *
from moe_fuse.calibration import *
from moe_fuse.headers import *

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('teacher'); p.add_argument('data'); p.add_argument('--tokens', type=int, default=262144); p.add_argument('--device', default='cpu', choices=['cpu', 'cuda']); add_json(p)
a = p.parse_args()

text = 'demo' if a.data=='demo' else ','.join(str(f) for f in sorted(Path(a.data).glob('*.train.jsonl.gz')))
ck = Checkpoint(resolve_source(a.teacher))
docs = read_docs(text)
def now():
    if a.device=='cuda': torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()
start = now()
cal = sample_tokens(split_text(docs)[0], load_tokenizer(ck.folder), a.tokens)
read = now()
model = empty_model(ck)
states = States(len(cal), model.config.hidden_size)
for _ in range(2 if a.device=='cuda' else 1):                                  # a GPU's first pass is its warm-up
    embed_tokens(ck, cal.ids, states); begin = now()
    for _,layer in stream_layers(ck, model, device=a.device): pilot_layer(layer, layer.mlp, states, cal, model.model.rotary_emb, a.device)
forward = now()
with tempfile.TemporaryDirectory() as d: report = analyse(a.teacher, Path(d)/'out', text, tokens=a.tokens, quiet=True, device=a.device)
end = now()

span = lambda a, b: [y-x for x,y in zip(a, b)]
tokens, alone, whole = span(start, read), span(begin, forward), span(forward, end)
more = [w-f-t for w,f,t in zip(whole, alone, tokens)]
print(f'{len(cal):,} tokens, {len(report["layers"])} routed layers' + ' '*8 + 'wall s    CPU s')
for k,v in {'reading and tokenising the text':tokens, "the teacher's forward pass":alone, 'the analysis, both included':whole, 'beyond text and forward pass':more}.items(): print(f'{k:<34} {v[0]:8.1f} {v[1]:8.1f}')
print(f'{"ratio to the forward pass":<34} {more[0]/alone[0]:8.2f} {more[1]/alone[1]:8.2f}')
print('  '.join(f'{k} {v:.1f}' for k,v in report['seconds'].items()))
if a.json: give(a, [row(f'analyse {a.teacher}, text and forward pass included', whole[0], "the teacher's forward pass, layer by layer", alone[0], 'FLOPs', tokens=len(cal))])
