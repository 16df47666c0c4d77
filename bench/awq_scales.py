"""KL of a student rounded to 4 bits, with and without AWQ's scales, on held-out text of the demo.

    python bench/awq_scales.py                     # a student of the embedded teacher at keep 0.5, groups of 32 and whole rows
    python bench/awq_scales.py FOLDER 128 32       # a checkpoint, groups of 128 and 32

`to itself` is KL to the checkpoint before rounding, `to the teacher` to the embedded teacher. Moments come from 16,384 calibration tokens, KL from 16,384 held-out ones.
128 divides none of the embedded teacher's matrices (hidden size 192); a whole row is one group of 192, 64 or 32 weights.
"""
import sys, tempfile
from pathlib import Path
import pandas as pd
from moe_fuse.calibration import *
from moe_fuse.evaluation import evaluate
from moe_fuse.headers import *
from moe_fuse.pipeline import compress
from moe_fuse.quantized_checkpoint import *

with tempfile.TemporaryDirectory() as d:
    d = Path(d)
    src, groups = (sys.argv[1], [int(g) for g in sys.argv[2:]]) if len(sys.argv)>1 else (d/'student', [32, -1])
    if len(sys.argv)==1: compress('demo', src, keep=.5, tokens=32768, eval_tokens=2048, baselines=(), quiet=True)
    ck = Checkpoint(resolve_source(src))
    cal = sample_tokens(read_docs('demo'), load_tokenizer(ck.folder), 16384)
    norms, downs = norm_moments(ck, cal), hidden_moments(ck, cal)
    rows = [{'': 'not rounded', 'group': '', 'to itself': 0, 'to the teacher': evaluate(ck.folder, 'demo', n_tokens=16384)['mean']['kl']}]
    for g in groups:
        for name,m in dict(nearest=None, downs=downs, norms=norms, both=norms | downs).items():
            q = quantize_checkpoint(ck.folder, d/f'{name}{g}', 'awq', g, m)
            kl = [evaluate(q.folder, x, n_tokens=16384)['mean']['kl'] for x in (ck.folder, 'demo')]
            rows.append({'': name, 'group': g if g>0 else 'row', 'to itself': kl[0], 'to the teacher': kl[1]})
    print(pd.DataFrame(rows).round(4).to_string(index=False))
