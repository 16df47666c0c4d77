"""Run notebooks by the rules of `nbdev_test` and store their outputs, so that a rerun leaves no diff.

    python tools/run_nbs.py                      # every notebook
    python tools/run_nbs.py 03 nbs/07_evaluation.ipynb --flags slow
"""
import argparse, multiprocessing, os, sys, time, traceback
from pathlib import Path
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.all import str2bool, working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

cfg = get_config()

def run_nb(fn, flags=()):
    "Refresh the outputs of `fn`. Cells that do not run keep the outputs they have; a notebook that fails is left as it was."
    os.environ['IN_TEST'] = '1'
    sys.path.insert(0, str(cfg.config_path))
    skip = set(cfg.tst_flags.split()) - set(flags)
    # directives decide what runs; the notebook that is written back comes from `read_nb`, because processing strips them
    proc = NBProcessor(fn, procs=FrontmatterProc, process=True).nb
    if str2bool(getattr(proc, 'frontmatter_', {}).get('skip_exec', False)): return
    nb,k = read_nb(fn),CaptureShell(fn)
    for cell,p in zip(nb.cells, proc.cells, strict=True):
        d = getattr(p, 'directives_', {}) or {}
        if cell.cell_type!='code' or 'nbdev_export'+'(' in cell.source or d.get('eval:', [''])[0].lower()=='false' or skip & d.keys(): continue
        cell.outputs = []
        with working_directory(fn.parent): k.cell(cell)
        if k.exc: raise RuntimeError(f'{fn.name}, cell {cell.idx_}-{cell.id}:\n{cell.source}\n' + ''.join(traceback.format_exception(k.exc)[-3:]))
    clean_nb(nb, clean_ids=cfg.clean_ids)
    write_nb(nb, fn)

def _run(args):
    fn,flags = args
    start = time.time()
    try: run_nb(fn, flags)
    except Exception as e: return fn, time.time()-start, e
    return fn, time.time()-start, None

def find(names):
    "Notebooks whose path or the beginning of whose name is in `names`; all without names"
    fns = sorted(cfg.nbs_path.glob('[!_.]*.ipynb'))
    if not names: return fns
    found = {n: [f for f in fns if f.name.startswith(Path(n).name)] for n in names}
    if missing := [n for n,fs in found.items() if not fs]: sys.exit(f'no such notebook: {" ".join(missing)}')
    return sorted({f for fs in found.values() for f in fs})

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*', help='notebooks: a path, or how the name begins')
    p.add_argument('--flags', default='', help='run cells with these flags too, e.g. "slow cuda"')
    p.add_argument('--n_workers', type=int, default=1)
    a = p.parse_args()
    failed = 0
    # a fresh process each, so that outputs do not depend on which notebooks ran before
    with multiprocessing.get_context('spawn').Pool(a.n_workers, maxtasksperchild=1) as pool:
        for fn,t,err in pool.imap_unordered(_run, [(f, a.flags.split()) for f in find(a.names)], chunksize=1):
            print(f'{fn.name}: {t:.1f} s' + (f', FAILED\n{err}' if err else ''), flush=True)
            failed += err is not None
    sys.exit(f'{failed} failed' if failed else 0)

if __name__=='__main__': main()
