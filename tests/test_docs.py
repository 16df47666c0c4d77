"What is written about the library: spelling, every public name's documentation, and notebooks in a kernel of their own."
import inspect, json, re, subprocess, sys
from importlib import import_module
from pathlib import Path
import moe_fuse, pytest
from fastcore.docments import docments

root = Path(__file__).resolve().parents[1]
nbs = sorted((root/'nbs').glob('*.ipynb'))

# names of methods and variables that look like slips
WORDS = 'mone,ream,bu,te,wll,ot,nd,fo,hel,ser,tje'

def test_spelling():
    "Codespell's list of slips, over all that is written by hand; stored outputs are not"
    lines = [f'{p.name}: {l}' for p in nbs for c in json.loads(p.read_text(encoding='utf-8'))['cells'] for l in ''.join(c['source']).splitlines()]
    for p in [*root.glob('*.md'), *root.glob('tests/*.py'), *root.glob('tools/*'), *root.glob('bench/*.py'), root/'Makefile']:
        if p.is_file() and p!=Path(__file__): lines += [f'{p.name}: {l}' for l in p.read_text(encoding='utf-8').splitlines()]
    assert len(lines)>5000
    r = subprocess.run([sys.executable, '-m', 'codespell_lib', '-L', WORDS, '-'], input='\n'.join(lines), capture_output=True, text=True)
    assert r.returncode==0, r.stdout

def public():
    "Functions and classes that the modules export: (where, object)"
    for m in (*moe_fuse._modules, 'cli', 'tiny_teacher'):
        mod = import_module(f'moe_fuse.{m}')
        yield from ((f'{m}.{n}', getattr(mod, n)) for n in mod.__all__ if callable(getattr(mod, n)))

# mean the same everywhere: the glossary has them
COMMON = {'device', 'dtype', 'seed', 'quiet', 'resume', 'rotary', 'moe', 'stats', 'keep', 'x', 'hidden'}

def undocumented(o):
    "What of a public name has no words: its own line, or parameters"
    f = getattr(o, '_init_fn', o)                                              # of a custom operator
    if inspect.isclass(f):
        if not any(vars(b).get('__doc__') for b in f.__mro__ if b.__module__.startswith('moe_fuse')): return ['its own line']
        if 'def __init__' not in inspect.getsource(f): return []              # fields are said in the line
    elif not f.__doc__: return ['its own line']
    lines = inspect.getsource(f).splitlines()
    # a parameter may share the comment on its line, or be an object of this library, which is described there
    shares = lambda k: any(re.search(rf'\b{k}\b', l.partition('#')[0]) and '# ' in l for l in lines)
    ours = lambda p: getattr(p.anno, '__module__', '').startswith('moe_fuse')
    return [k for k,p in docments(f, full=True, returns=False).items() if k not in COMMON | {'self', 'args', 'kwargs', 'kw'} and not p.docment and not shares(k) and not ours(p)]

def test_every_public_name_is_documented():
    found = list(public())
    assert len(found)>300
    assert {n: u for n,o in found if (u := undocumented(o))}=={}

def test_an_undocumented_name_is_found():
    def bare(a, b=1): return a
    def silent(
        a, # [T]
        b=1,
    ): "Has a line."
    assert undocumented(bare)==['its own line'] and undocumented(silent)==['b']
    assert COMMON <= set(re.findall(r'`(\w+)`', (root/'nbs/33_glossary.ipynb').read_text(encoding='utf-8')))

# fast ones, of three kinds: plain torch, the whole command line, and prose that reads stored results
@pytest.mark.parametrize('name', ['00_headers', '01_mla', '31_which_method', '32_hardware'])
def test_runs_in_a_clean_kernel(name, tmp_path):
    "As in JupyterLab: a valid notebook, in a new process of its own, top to bottom, and no widget that a page could not show"
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(root/f'nbs/{name}.ipynb', as_version=4)
    nbformat.validate(nb)
    skip = {'slow', 'cuda', 'notest'}
    nb.cells = [c for c in nb.cells if c.cell_type!='code' or not skip & set(re.findall(r'^#\|\s*(\w+)', c.source, re.M)) and 'nbdev_export'+'(' not in c.source]
    NotebookClient(nb, timeout=300, kernel_name='python3', resources=dict(metadata=dict(path=str(root/'nbs')))).execute()
    outputs = [o for c in nb.cells if c.cell_type=='code' for o in c.outputs]
    assert [o for o in outputs if o.output_type=='error' or 'application/vnd.jupyter.widget-view+json' in o.get('data', {})]==[]
    assert sum(map(len, (json.dumps(o) for o in outputs))) < 300_000

@pytest.mark.parametrize('path', nbs, ids=lambda p: p.stem)
def test_opens_in_jupyter(path):
    "The format that Jupyter's server checks when it opens a file, and a kernel that every installation has"
    import nbformat
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    assert nb.metadata.kernelspec.name=='python3' and len({c.id for c in nb.cells})==len(nb.cells)
