"The wheel and the sdist hold what they should, declare what the library imports, and the installed command starts."
import ast, os, re, shutil, subprocess, sys, tarfile, time, zipfile
from configparser import ConfigParser
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

def run(*cmd, **kw):
    r = subprocess.run([str(c) for c in cmd], capture_output=True, text=True, **kw)
    assert r.returncode==0, r.stdout + r.stderr
    return r.stdout

def canon(name): return re.sub(r'[-_.]+', '-', name).lower()
def name_of(req): return canon(re.match(r'[\w.-]+', req)[0])

@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "sdist and wheel, built offline; the wheel is built out of the unpacked sdist, which proves that the sdist is complete"
    tmp = tmp_path_factory.mktemp('dist')
    src = tmp/'src'
    for p in 'moe_fuse', 'nbs', 'tests': shutil.copytree(root/p, src/p, symlinks=True, ignore=shutil.ignore_patterns('__pycache__'))
    for p in root.iterdir():
        if p.is_file(): shutil.copy(p, src)
    run(sys.executable, '-m', 'build', '--no-isolation', '--sdist', '--outdir', tmp, src)
    sdist, = tmp.glob('*.tar.gz')
    with tarfile.open(sdist) as t: t.extractall(tmp/'unpacked', filter='data')
    unpacked, = (tmp/'unpacked').iterdir()
    run(sys.executable, '-m', 'build', '--no-isolation', '--wheel', '--outdir', tmp, unpacked)
    wheel, = tmp.glob('*.whl')
    return sdist, wheel

@pytest.fixture(scope='module')
def meta(dist):
    with zipfile.ZipFile(dist[1]) as z:
        name, = [n for n in z.namelist() if n.endswith('.dist-info/METADATA')]
        return Parser().parsestr(z.read(name).decode())

def library(): return {p.relative_to(root).as_posix() for p in (root/'moe_fuse').rglob('*') if p.is_file() and '__pycache__' not in p.parts}

def test_wheel_holds_the_library_and_nothing_else(dist):
    with zipfile.ZipFile(dist[1]) as z: names = {n for n in z.namelist() if '.dist-info/' not in n}
    assert names==library()

def test_wheel_carries_the_licence(dist):
    with zipfile.ZipFile(dist[1]) as z:
        name, = [n for n in z.namelist() if n.endswith('LICENSE')]
        assert z.read(name)==(root/'LICENSE').read_bytes()

def test_sdist_holds_what_setup_reads(dist):
    with tarfile.open(dist[0]) as t: names = {n.partition('/')[2] for n in t.getnames()}
    assert names >= library() | {'settings.ini', 'setup.py', 'pyproject.toml', 'LICENSE'}

def test_metadata(meta):
    assert (meta['Name'], meta['Version'], meta['Summary']) == (cfg['lib_name'], cfg['version'], cfg['description'])
    assert meta['Requires-Python']==f">={cfg['min_python']}"
    reqs = meta.get_all('Requires-Dist')
    assert sorted(name_of(r) for r in reqs if 'extra ==' not in r)==sorted(map(name_of, cfg['requirements'].split()))
    for extra in 'awq', 'data', 'gguf', 'completion', 'dev':
        assert sorted(name_of(r) for r in reqs if re.search(rf"""extra == ['"]{extra}['"]""", r))==sorted(map(name_of, cfg[f'{extra}_requirements'].split())), extra
        assert extra in meta.get_all('Provides-Extra')

def test_every_import_is_declared():
    "Imports at the top of a module are requirements; those inside a function may also be an extra, and Triton comes with torch's CUDA builds"
    dists = packages_distributions()
    def declared(*keys): return {name_of(r) for k in keys for r in cfg[k].split()}
    always, extra = declared('requirements'), declared('awq_requirements', 'data_requirements', 'gguf_requirements', 'completion_requirements')
    extra_modules = {'awq': 'autoawq', 'llama_cpp': 'llama-cpp-python'}
    missing = set()
    for f in (root/'moe_fuse').rglob('*.py'):
        tree = ast.parse(f.read_text(encoding='utf-8'))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import): mods = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level: mods = [node.module]
            else: continue
            for m in {m.split('.')[0] for m in mods} - set(sys.stdlib_module_names) - {'moe_fuse'}:
                names = {canon(d) for d in dists.get(m, [extra_modules.get(m, m)])}
                if not names & (always if node in tree.body else always | extra | {'triton'}): missing.add(f'{f.name}: {m}')
    assert not missing

def test_installed_wheel_runs(dist, tmp_path):
    "The wheel alone, away from the checkout, with this environment's own packages"
    run(sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--target', tmp_path/'lib', dist[1])
    env = {**os.environ, 'PYTHONPATH': str(tmp_path/'lib')}
    where = run(sys.executable, '-c', 'import moe_fuse; print(moe_fuse.__version__, moe_fuse.__file__)', cwd=tmp_path, env=env)
    assert where.split()==[cfg['version'], str(tmp_path/'lib/moe_fuse/__init__.py')]
    assert run(tmp_path/'lib/bin/moe-fuse', '--version', cwd=tmp_path, env=env).strip()==f"moe-fuse {cfg['version']}"
    took = []
    for _ in range(3):
        t = time.perf_counter(); said = run(tmp_path/'lib/bin/moe-fuse', '--help', cwd=tmp_path, env=env); took.append(time.perf_counter()-t)
        assert said.startswith('usage: moe-fuse') and 'exit codes' in said
    assert min(took)<1.5, took

def test_no_notebook_tools_at_run_time(dist, tmp_path):
    "The installed library imports neither nbdev nor Jupyter nor pytest"
    run(sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--target', tmp_path/'lib', dist[1])
    code = """import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in DENIED: raise ModuleNotFoundError(f'no {name} here', name=name)
sys.meta_path.insert(0, Refuse())
DENIED = {'nbdev', 'execnb', 'ghapi', 'fastgit', 'ipykernel', 'jupyter_server', 'pytest'}
import importlib, moe_fuse
for m in (*moe_fuse._modules, 'cli'): importlib.import_module(f'moe_fuse.{m}')
"""
    run(sys.executable, '-c', code, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path/'lib')})
