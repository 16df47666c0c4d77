"What is written about the library: spelling, every public name's documentation, and notebooks in a real Jupyter server."
import asyncio, inspect, json, os, re, subprocess, sys, time
from importlib import import_module
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen
import moe_fuse, pytest
from fastcore.docments import docments
from tornado.httpclient import HTTPRequest
from tornado.websocket import websocket_connect

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

@pytest.fixture(scope='module')
def jupyter(tmp_path_factory):
    "The server below JupyterLab: a function that asks its API, one that gives an address there, and the folder that it shows"
    tmp, token = tmp_path_factory.mktemp('jupyter'), 'for-this-test'
    (tmp/'open').mkdir()
    (tmp/'open/nbs').symlink_to(root/'nbs')
    env = {k: v for k,v in os.environ.items() if k!='IN_TEST'} | dict(JUPYTER_RUNTIME_DIR=str(tmp), JUPYTER_CONFIG_DIR=str(tmp/'config'), JUPYTER_DATA_DIR=str(tmp/'data'))
    cmd = [sys.executable, '-m', 'jupyter_server', '--no-browser', '--allow-root', '--ServerApp.port=0', f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={tmp/"open"}']
    with open(tmp/'log', 'w') as log, subprocess.Popen(cmd, env=env, stdout=log, stderr=log) as server:
        def to(path, scheme='http'):
            port = re.search(r'http://127\.0\.0\.1:(\d+)/', (tmp/'log').read_text())[1]
            return f'{scheme}://127.0.0.1:{port}/api/{path}', dict(Authorization=f'token {token}')
        def ask(path, method='GET', data=None):
            url, headers = to(path)
            with urlopen(Request(url, method=method, data=json.dumps(data).encode() if data else None, headers=headers), timeout=60) as r: return json.loads(r.read() or 'null')
        try:
            for i in range(300):
                assert server.poll() is None, (tmp/'log').read_text()
                try: ask('status'); break
                except (TypeError, URLError): time.sleep(.2)
            else: raise AssertionError((tmp/'log').read_text())
            yield ask, to, tmp/'open'
        finally: server.terminate()

# fast ones, of three kinds: plain torch, the whole command line, and prose that reads stored results
@pytest.mark.parametrize('name', ['00_headers', '01_mla', '31_which_method', '32_hardware'])
def test_runs_in_jupyter(jupyter, name):
    "Top to bottom in a kernel of the real server: no error, no widget that a page could not show, no wall of output"
    ask, to, _ = jupyter
    session = ask('sessions', 'POST', dict(path=f'nbs/{name}.ipynb', name=name, type='notebook', kernel=dict(name='python3')))
    skip, outputs = {'slow', 'cuda', 'notest'}, []
    async def run(sources):
        url, headers = to(f"kernels/{session['kernel']['id']}/channels", 'ws')
        ws = await websocket_connect(HTTPRequest(url, headers=headers), max_message_size=2**26)
        for i,code in enumerate(sources):
            header = dict(msg_id=f'{name}-{i}', msg_type='execute_request', username='', session=name, version='5.3', date='')
            await ws.write_message(json.dumps(dict(channel='shell', header=header, parent_header={}, metadata={}, buffers=[], content=dict(code=code, silent=False, allow_stdin=False))))
            waits = {'reply', 'idle'}
            while waits:
                m = json.loads(await asyncio.wait_for(ws.read_message(), 300))
                if m['parent_header'].get('msg_id')!=header['msg_id']: continue
                if m['msg_type']=='execute_reply': waits -= {'reply'}
                elif m['msg_type']=='status': waits -= {m['content']['execution_state']}
                elif m['msg_type']!='execute_input': outputs.append(m['content'])
                assert m['msg_type']!='error', code + '\n' + '\n'.join(m['content']['traceback'])
        ws.close()
    cells = [c['source'] for c in ask(f'contents/nbs/{name}.ipynb')['content']['cells'] if c['cell_type']=='code']
    try: asyncio.run(run([s for s in cells if not skip & set(re.findall(r'^#\|\s*(\w+)', s, re.M)) and 'nbdev_export'+'(' not in s]))
    finally: ask(f"sessions/{session['id']}", 'DELETE')
    assert outputs and not [o for o in outputs if 'application/vnd.jupyter.widget-view+json' in o.get('data', {})]
    assert sum(len(json.dumps(o)) for o in outputs) < 300_000

@pytest.mark.parametrize('path', nbs, ids=lambda p: p.stem)
def test_opens_in_jupyter(jupyter, path):
    "The server says what it finds wrong with a file in `message`; and a kernel that every installation has"
    got = jupyter[0](f'contents/nbs/{path.name}')
    nb = got['content']
    assert got['type']=='notebook' and 'message' not in got
    assert nb['metadata']['kernelspec']['name']=='python3' and len({c['id'] for c in nb['cells']})==len(nb['cells'])

def test_a_damaged_notebook_is_told(jupyter):
    ask, _, folder = jupyter
    nb = json.loads(nbs[0].read_text(encoding='utf-8'))
    del nb['cells'][0]['source']
    (folder/'damaged.ipynb').write_text(json.dumps(nb), encoding='utf-8')
    assert 'source' in ask('contents/damaged.ipynb').get('message', '')

def test_results_name_no_folder_of_a_machine():
    assert [f'{f.name}: {m}' for f in sorted((root/'results').glob('*.json')) for m in re.findall(r'"(?:/|~|[A-Z]:)[\w.]*[/\\\\][^"]*"', f.read_text(encoding='utf-8'))]==[]

def test_links_to_elsewhere():
    "Their form, for a test asks no other host; those into this repository lead to a file"
    found = [(p.name, u.rstrip('.,;')) for p in nbs for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='markdown'
             for u in re.findall(r'\w+://[^\s)\]\'"`<>}]+', ''.join(c['source']))]
    own, papers = 'https://github.com/moe-fuse/moe_fuse/blob/main/', re.compile(r'https://arxiv\.org/abs/\d\d(0[1-9]|1[0-2])\.\d{5}')
    assert len(found)>10
    assert [(n, u) for n,u in found if not re.fullmatch(r'https://([\w-]+\.)+[a-z]{2,}(/[\w./@+#-]*)?', u) or 'example.' in u or u.startswith(own) and not (root/u.removeprefix(own)).exists()
            or 'arxiv.org' in u and not papers.fullmatch(u)]==[]
