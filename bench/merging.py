"""How long do the merge operators take beside mergekit's, on the same tensors?

    python bench/merging.py                                  # 8 members of [704, 512] in float32
    python bench/merging.py --members 8 --rows 2816 --columns 2048 --device cuda

Without mergekit (`make set-up` installs it) there is nothing to compare, and the row says so. Before the clock starts, ours must give mergekit's numbers in float64 (in float32 its Multi-SLERP of 5.8 M numbers is off by 1e-4 on a CPU); SCE and TIES select entries by size, where two that are
equal to the last bits may change places, so one entry in 10,000 may differ.
"""
import torch

from measure import *
from moe_fuse.merging import merge

a = arguments(__doc__, members=8, rows=704, columns=512, repeats=5).parse_args()
torch.set_grad_enabled(False)

# ours: (operator, options); mergekit's: (operator, options); pairs only
WAYS = dict(mean=({}, 'linear', dict(weight=1.), False), multislerp=({}, 'multislerp', dict(weight=1.), False), slerp=({}, 'slerp', dict(t=.5), True), karcher=({}, 'karcher', {}, False),
            sce=(dict(p=.5, base=0), 'sce', dict(select_topk=.5), False), ties=(dict(p=.5, base=0), 'ties', dict(weight=1., density=.5), False))

def bench(theirs):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(1, a.rows, a.columns, generator=g) + .5*torch.randn(a.members, a.rows, a.columns, generator=g)   # experts that have something in common
    w = w.to(a.device)
    for how,(kw,name,more,pair) in WAYS.items():
        v = w[:2] if pair else w
        based = 0 if kw.get('base')==0 or pair else None                       # slerp too wants to know from which end t counts
        ours, peer = (lambda: merge(v, how, **kw)), (lambda: theirs([*v], name, base_index=based, parameters=more))
        x, y = ours(), theirs([*v.double()], name, base_index=based, parameters=more).float()
        differ = ((x-y).abs() > 1e-4*y.abs().max()).float().mean().item()
        assert differ<1e-4, f'{how}: {differ:.1%} of the entries are not mergekit\'s'
        t = in_turns(dict(ours=ours, theirs=peer), a.repeats, a.device)
        yield row(f'merge {len(v)} experts, {how}', t['ours'], f'mergekit, {name}', t['theirs'], 'bytes' if how in ('mean', 'multislerp', 'slerp', 'karcher') else 'sorting', bytes=v.nbytes+x.nbytes)

try: from mergekit.merge_methods import merge_tensors
except ImportError: rows = [not_run('merge operators', 'mergekit is not installed')]
else: rows = list(bench(merge_tensors))
give(a, rows)
