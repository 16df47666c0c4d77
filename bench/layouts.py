"""A teacher's students in every layout and dtype: written, loaded by `transformers` in a process without moe_fuse, compared, set to write.

    python bench/layouts.py                        # the embedded teacher
    python bench/layouts.py TEACHER DATA           # a checkpoint and a folder of NAME.train.jsonl.gz and NAME.valid.jsonl.gz

`difference` is the largest one of a logit to the student in memory, in the process that knows no moe_fuse (unfolded: to the fused student, so the sums rounded to bfloat16 are in it);
`KL` is of the rounded student to the one before. What `transformers` can't read on a CPU has no difference and writes nothing.
"""
import subprocess, sys, tempfile
from pathlib import Path
import numpy as np, torch
from moe_fuse.headers import *
from moe_fuse.layouts import export
from moe_fuse.pipeline import compress

ELSEWHERE = '''
import sys; sys.modules['moe_fuse'] = sys.modules['fastcore'] = None
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids = sys.argv[1], torch.from_numpy(np.load(sys.argv[2]))[None]
model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad(): np.save(sys.argv[3], model(ids).logits[0].numpy())
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1]:]
print(repr(AutoTokenizer.from_pretrained(folder).decode(out)))
'''

src, data = sys.argv[1:] if len(sys.argv)==3 else ('demo', None)
text = {k: ','.join(map(str, sorted(Path(data).glob(f'*.{k}.jsonl.gz')))) if data else 'demo' for k in ('train', 'valid')}
with tempfile.TemporaryDirectory() as d:
    d, rows = Path(d), []
    for layout,method in dict(slim='slim', pruned='reap', fused='fused').items():
        run = compress(src, d/layout, keep=.25, method=method, calibration=text['train'], tokens=16384, eval_data=text['valid'], eval_tokens=8192, baselines=(), quiet=True)
        ids = run.held.ids[:run.held.lengths[0]][:64]; np.save(d/'ids.npy', ids.numpy())
        with torch.no_grad(): want = run.logits[method](0, len(ids))
        for to in (layout, 'unfolded') if layout=='fused' else (layout,):
            for dtype in ('bf16',) if to=='fused' else ('bf16', 'fp8', 'awq'):
                out = d/f'{to}-{dtype}'
                e, far, words = export(run.out, out, to, dtype, group_size=16, n_tokens=8192)['export'], '', ''
                if dtype=='bf16':
                    r = subprocess.run([sys.executable, '-c', ELSEWHERE, str(out), str(d/'ids.npy'), str(d/'got.npy')], capture_output=True, text=True)
                    assert r.returncode==0, r.stderr[-2000:]
                    far, words = f"{np.abs(np.load(d/'got.npy')-want.numpy()).max():.1e}", r.stdout.strip().splitlines()[-1].replace('|', '\\|')
                rows.append([to, dtype, f"{e['bytes']/1e6:.2f}", f"{e['evaluation']['mean']['kl']:.4f}" if 'evaluation' in e else '', far, words[:60]])
                print(rows[-1], file=sys.stderr)
    print(aligned(['layout', 'dtype', 'MB', 'KL', 'difference', 'what it writes'], rows))
