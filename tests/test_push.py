"A student goes to a stand-in of the hub's API, byte for byte, the index last; what is wrong is said in one line. Nothing leaves this machine."
import base64, hashlib, json, os, re, shutil, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest, yaml
from moe_fuse.headers import *
from tiny_models import *

class Hub(BaseHTTPRequestHandler):
    "Create, preupload, LFS batch, upload, verify and commit, as huggingface_hub calls them"
    repos, blobs, calls, refuse, lock = {}, {}, [], None, threading.Lock()
    def log_message(self, *a): pass
    def reply(self, body='', code=200, **headers):
        body = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(code)
        for k,v in ({'Content-Type': 'application/json', 'Content-Length': str(len(body))} | headers).items(): self.send_header(k, v)
        self.end_headers()
        if self.command!='HEAD': self.wfile.write(body)
    def body(self):
        if 'chunked' not in self.headers.get('Transfer-Encoding', ''): return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        out = b''
        while n := int(self.rfile.readline(), 16): out += self.rfile.read(n); self.rfile.readline()
        self.rfile.readline(); return out
    def any(self):
        raw, path = self.body(), self.path.split('?')[0]
        with Hub.lock: Hub.calls.append(f'{self.command} {path}')
        if Hub.refuse and re.search(Hub.refuse[0], path): return self.reply(dict(error=Hub.refuse[2]), Hub.refuse[1], **{'X-Error-Message': Hub.refuse[2]})
        if path.startswith('/blob/'):                                          # signed, so without the token
            assert hashlib.sha256(raw).hexdigest()==path.split('/')[2]
            Hub.blobs[path.split('/')[2]] = raw; return self.reply()
        if self.headers.get('Authorization')!='Bearer hf_right': return self.reply(dict(error='Invalid credentials'), 401, **{'X-Error-Message': 'Invalid credentials in Authorization header'})
        here = f'http://{self.headers["Host"]}'
        if path=='/api/repos/create':
            d = json.loads(raw); name = f"{d.get('organization') or 'me'}/{d['name']}"
            if name in Hub.repos: return self.reply(dict(error='You already created this model repo', url=f'{here}/{name}'), 409)
            Hub.repos[name] = dict(visibility=d.get('visibility', 'private' if d.get('private') else 'public'), files={}, commits=[])
            return self.reply(dict(url=f'{here}/{name}', name=name, id='0'))
        if path=='/api/validate-yaml':
            yaml.safe_load(re.match(r'---\n(.*?)\n---', json.loads(raw)['content'], re.S)[1]); return self.reply(dict(errors=[], warnings=[]))
        m = re.match(r'/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?/(preupload/main|info/lfs/objects/batch|verify|commit/main|revision/main|tree/main)$', path) or re.match(r'/api/models/([\w.-]+/[\w.-]+)()$', path)
        if not m or m[1] not in Hub.repos: return self.reply(dict(error='Repository not found'), 404, **{'X-Error-Code': 'RepoNotFound'})
        repo, what = Hub.repos[m[1]], m[2]
        if what=='preupload/main': return self.reply(dict(files=[dict(path=f['path'], uploadMode='lfs' if f['path'].endswith('.safetensors') else 'regular', shouldIgnore=False, oid=None) for f in json.loads(raw)['files']]))
        if what=='info/lfs/objects/batch':
            url = lambda o: dict(upload=dict(href=f"{here}/blob/{o['oid']}"), verify=dict(href=f'{here}/{m[1]}.git/verify'))
            return self.reply(dict(transfer='basic', objects=[o if o['oid'] in Hub.blobs else o | dict(actions=url(o)) for o in json.loads(raw)['objects']]))
        if what=='verify':
            o = json.loads(raw); return self.reply('', 200 if len(Hub.blobs.get(o['oid'], b''))==o['size'] else 422)
        if what=='commit/main':
            new = {}
            for row in map(json.loads, raw.splitlines()):
                v = row['value']
                if row['key']=='file': new[v['path']] = base64.b64decode(v['content'])
                if row['key']=='lfsFile': new[v['path']] = Hub.blobs[v['oid']]; assert len(new[v['path']])==v['size']
            repo['files'] |= new; repo['commits'].append(sorted(new))
            return self.reply(dict(commitUrl=f'{here}/{m[1]}/commit/{len(repo["commits"]):040}', commitOid=f'{len(repo["commits"]):040}', pullRequestUrl=None))
        return self.reply([] if what=='tree/main' else dict(id=m[1], sha='0'*40, siblings=[]))
    do_GET = do_HEAD = do_POST = do_PUT = any

@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    srv = ThreadingHTTPServer(('127.0.0.1', 0), Hub); srv.daemon_threads = True
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    env = {k: v for k,v in os.environ.items() if k not in ('HF_TOKEN', 'HF_HUB_OFFLINE', 'HUGGING_FACE_HUB_TOKEN')}
    yield env | dict(HF_ENDPOINT=f'http://127.0.0.1:{srv.server_port}', HF_HOME=str(tmp_path_factory.mktemp('hf')), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1', HF_HUB_DISABLE_PROGRESS_BARS='1', NO_PROXY='127.0.0.1', no_proxy='127.0.0.1')
    srv.shutdown()

@pytest.fixture(autouse=True)
def fresh(): Hub.repos.clear(); Hub.blobs.clear(); Hub.calls.clear(); Hub.refuse = None

@pytest.fixture
def student(tmp_path):
    s = write(tmp_path/'student', *tiny(V3, num_hidden_layers=2), shards=2)
    (s/'README.md').write_text('---\nlicense: mit\n---\n# x\n'); (s/'report.json').write_text('{}'); (s/'model-9.tmp').write_text('x'); (s/'.hidden').write_text('x')
    return s

def push(env, *args, token='hf_right'): return subprocess.run([sys.executable, '-m', 'moe_fuse', 'push', *map(str, args)], env=env | (dict(HF_TOKEN=token) if token else {}), capture_output=True, text=True, cwd=root)
def refused(r, *say):
    assert r.returncode==2 and r.stdout=='' and r.stderr.count('\n')==1 and r.stderr.startswith('moe-fuse: '), r.stderr
    for s in say: assert s in r.stderr, r.stderr

def test_every_byte_arrives_and_the_index_last(hub, student):
    r = push(hub, student, 'me/mine', '--json')
    assert r.returncode==0, r.stderr
    repo = Hub.repos['me/mine']
    assert repo['visibility']=='private' and repo['commits'][-1]==['config.json', 'model.safetensors.index.json'] and len(repo['commits'])==2
    assert repo['files']=={f.name: f.read_bytes() for f in student.iterdir() if f.suffix!='.tmp' and f.name!='.hidden'}
    assert json.loads(r.stdout)['commit'].endswith(f'/me/mine/commit/{2:040}') and sum(c.startswith('PUT /blob/') for c in Hub.calls)==2

def test_public_and_again(hub, student):
    "A second push makes no second repository and sends no weight again"
    assert push(hub, student, 'org/mine', '--public').returncode==0 and Hub.repos['org/mine']['visibility']=='public'
    Hub.calls.clear(); r = push(hub, student, 'org/mine')
    assert r.returncode==0 and not [c for c in Hub.calls if '/blob/' in c] and Hub.repos['org/mine']['visibility']=='public', r.stderr

def test_refusals_of_the_hub_are_one_line(hub, student):
    refused(push(hub, student, 'me/mine', token=None), 'wants a token')
    refused(push(hub, student, 'me/mine', token='hf_wrong'), 'me/mine', '401', 'Invalid credentials')
    for where,code,why in ('/create', 403, 'no rights in this namespace'), ('/preupload/', 403, 'storage limit'), ('/commit/', 400, 'bad card'), ('/batch', 403, 'no LFS for you'):
        Hub.refuse = where, code, why; refused(push(hub, student, 'me/mine'), 'me/mine', str(code), why)
        assert not any('config.json' in r['files'] for r in Hub.repos.values())
    Hub.refuse = None; refused(push(hub, student, 'not/a/name'), 'not/a/name')
    refused(push(hub | dict(HF_ENDPOINT='http://127.0.0.1:9'), student, 'me/mine'), 'me/mine', 'failed')

def test_what_is_not_finished_stays_here(hub, student, tmp_path):
    (student/'model.safetensors.index.json').rename(tmp_path/'kept')
    refused(push(hub, student, 'me/mine'), 'has no model.safetensors.index.json')
    shutil.move(tmp_path/'kept', student/'model.safetensors.index.json')
    shutil.copytree(student, tmp_path/'s.partial'); refused(push(hub, tmp_path/'s.partial', 'me/mine'), 'interrupted run')
    f = student/'model-00002-of-00002.safetensors'; f.write_bytes(f.read_bytes()[:-10]); refused(push(hub, student, 'me/mine'), f.name, 'truncated')
    f.unlink(); refused(push(hub, student, 'me/mine'), 'missing shard')
    refused(push(hub, tmp_path/'nothing', 'me/mine'), 'no such folder')
    refused(push(hub, student/'config.json', 'me/mine'), 'is a file; push takes the folder')
    c = student/'config.json'; c.write_text(json.dumps(json.loads(c.read_text()) | dict(auto_map=dict(AutoConfig='modeling_x.X', AutoModelForCausalLM='modeling_x.Y')))); shutil.copy(student/'model-00001-of-00002.safetensors', f)
    w = json.loads((student/'model.safetensors.index.json').read_text()); w['weight_map'] = {k: 'model-00001-of-00002.safetensors' for k,v in w['weight_map'].items() if v!=f.name}; (student/'model.safetensors.index.json').write_text(json.dumps(w))
    refused(push(hub, student, 'me/mine'), 'wants modeling_x.py beside the weights')
    assert Hub.calls==[]
