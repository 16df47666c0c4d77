"""KL of a student rounded to 4 bits, with and without AWQ's scales, on held-out text of the demo.

    python bench/awq_scales.py                     # a student of the embedded teacher at keep 0.5, groups of 32 and whole rows
    python bench/awq_scales.py FOLDER 128 32       # a checkpoint, groups of 128 and 32; -1 for whole rows

`to itself` is KL to the checkpoint before rounding, `to the teacher` to the embedded teacher. Moments come from 8,192 calibration tokens, KL from 8,192 held-out ones.
128 divides none of the embedded teacher's matrices (hidden size 192); a whole row is one group of 192 weights, or fewer.
"""
import sys, tempfile
from pathlib import Path
from moe_fuse.calibration import *
from moe_fuse.evaluation import compare, logits_of
from moe_fuse.headers import *
from moe_fuse.pipeline import compress
from moe_fuse.planning import aligned
from moe_fuse.quantized_checkpoint import *

with tempfile.TemporaryDirectory() as d:
    d = Path(d)
    src, groups = (sys.argv[1], [int(g) for g in sys.argv[2:]]) if len(sys.argv)>1 else (d/'student', [32, -1])
    if len(sys.argv)==1: compress('demo', src, keep=.5, tokens=32768, eval_tokens=2048, baselines=(), quiet=True)
    ck, teacher = Checkpoint(resolve_source(src)), Checkpoint(resolve_source('demo'))
    tok = load_tokenizer(ck.folder)
    cal, held = sample_tokens(read_docs('demo'), tok, 8192), sample_tokens(read_docs('demo', 'valid'), tok, 8192)
    norms, downs, before, wanted = norm_moments(ck, cal), hidden_moments(ck, cal), logits_of(ck, held), logits_of(teacher, held)
    kl = lambda a, b: f"{compare(held, a, b)['mean']['kl']:.4f}"
    rows = [['not rounded', '', '0', kl(wanted, before)]]
    for g in groups:
        for name,m in dict(nearest=None, downs=downs, norms=norms, both=norms | downs).items():
            after = logits_of(quantize_checkpoint(ck.folder, d/f'{name}{g}', 'awq', g, m), held)
            rows.append([name, str(g) if g>0 else 'row', kl(before, after), kl(wanted, after)])
            print(rows[-1], file=sys.stderr)
    print(aligned(['scales', 'group', 'to itself', 'to the teacher'], rows))
