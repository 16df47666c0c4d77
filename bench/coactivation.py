"""How long does it take to count which experts fire together, for 1,000,000 tokens of 256 experts, 8 a token?

    python bench/coactivation.py [--tokens 200000]

Prints the best of 5 for one thread and for all of them, the ratio to the numpy twin (one-hot product; best of 2), and the memory each added to the peak.
"""
import argparse, resource, sys, timeit

import numba, numpy as np

from measure import add_json, give, row
from moe_fuse.expert_analysis import coactivation, coactivation_numpy

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter); add_json(p)
p.add_argument('--tokens', type=int, default=1_000_000); a = p.parse_args()
T, N, K = a.tokens, 256, 8
rng = np.random.default_rng(0)
idx = np.empty((T, K), np.int64)
for s in range(0, T, 50_000): idx[s:s+50_000] = (rng.gumbel(size=(min(50_000, T-s), N)) + np.linspace(0, 2, N)).argpartition(-K, 1)[:,-K:]   # the busiest expert is chosen about 7 times as often as the idlest

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform=='darwin' else 1024)
def bench(f, repeat=5):
    f(idx[:100]); before = peak()                                             # compiled, and its buffers warm
    t, c = min(timeit.repeat(lambda: f(idx), number=1, repeat=repeat)), f(idx)
    return t, peak()-before, c

rows = {'one thread': bench(lambda i: coactivation(i, N, alone=T*K)), f'{numba.get_num_threads()} threads': bench(lambda i: coactivation(i, N, alone=0)), 'numpy': bench(lambda i: coactivation_numpy(i, N), 2)}
twin, mem, want = rows['numpy']
for k,(t,m,c) in rows.items():
    assert (c==want).all(), k
    print(f'{k:<12} {t:8.4f} s {twin/t:8.1f} x numpy {m/1e6:9.1f} MB')
if a.json: give(a, [row(f'co-activation of {N} experts, {k}', t, 'numpy, one-hot product', twin, 'bytes', tokens=T) for k,(t,_,_) in rows.items() if k!='numpy'])
