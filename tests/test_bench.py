"The gathering of benchmarks: parts by name, one that fails beside one that doesn't, a file that is whole. Nothing here looks at a time."
import json, os, shutil, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]

def run(*args, bench=root/'bench'):
    return subprocess.run([sys.executable, str(bench/'all.py'), *args], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(root)))

def test_what_is_not_there_is_refused(tmp_path):
    for args,said in ((('--only', 'speed'), "'speed' is none of machine, reading"), (('--out', str(tmp_path/'no'/'o.json')), 'no such folder'), (('--device', 'tpu'), "invalid choice: 'tpu'")):
        r = run(*args)
        assert r.returncode==2 and said in r.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir())==[]

def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path):
    shutil.copytree(root/'bench', tmp_path/'bench', ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path/'bench'/'measure.py').write_text('raise ValueError("no clock")\n')
    (tmp_path/'bench'/'merging.py').write_text('print(1); print(\'{"rows": [{"what": "x", "seconds": 1.0}], "growth": []}\')\n')
    (tmp_path/'bench'/'decode.py').write_text('print("nothing to read")\n')
    r = run('--only', 'machine,merging,decode', '--out', str(tmp_path/'o.json'), bench=tmp_path/'bench')
    found = json.loads((tmp_path/'o.json').read_text())
    assert r.returncode==1 and found['failed']==dict(machine='ValueError: no clock', decode='its last line is no JSON')
    assert found['rows']==[dict(part='merging', what='x', seconds=1.)] and found['threads']>=1 and 'torch' in found['versions']
    assert sorted(f.name for f in tmp_path.iterdir())==['bench', 'o.json']

def test_a_part_by_itself():
    "The slope of a power is its exponent, and a real part's last line is what the gathering reads"
    sys.path.insert(0, str(root/'bench'))
    try: from measure import growth
    finally: sys.path.pop(0)
    g = growth('x', 'tokens', [(n, 3*n**1.5) for n in (2, 4, 10)])
    assert abs(g['exponent']-1.5)<1e-9 and abs(g['last']-1.5)<1e-9
    r = subprocess.run([sys.executable, str(root/'bench'/'merging.py'), '--members', '3', '--rows', '20', '--columns', '8', '--repeats', '1', '--device', 'cpu', '--json'], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(root)))
    assert r.returncode==0, r.stderr
    rows = json.loads(r.stdout.splitlines()[-1])['rows']
    assert rows and all('not_run' in r or (r['ratio']>0 and r['beside'].startswith('mergekit, ')) for r in rows)
