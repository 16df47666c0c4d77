"A hub id works like a folder; a local stand-in answers the hub's HTTP API, so nothing leaves this machine."
import json, os, re, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest
from moe_fuse.headers import resolve_source

SHA, folder = '0'*39+'1', resolve_source('demo')

class Hub(BaseHTTPRequestHandler):
    sent = 0
    def log_message(self, *a): pass
    def reply(self, body, code=200, **headers):
        self.send_response(code)
        for k,v in (headers | {'Content-Length':str(len(body))}).items(): self.send_header(k.replace('_','-'), v)
        self.end_headers()
        if self.command=='GET': Hub.sent += len(body); self.wfile.write(body)
    def do_GET(self):
        if re.match(r'/api/models/org/tiny(/revision/\w+)?(\?|$)', self.path):
            return self.reply(json.dumps(dict(id='org/tiny', sha=SHA, siblings=[dict(rfilename=f.name) for f in sorted(folder.iterdir())])).encode(),
                              Content_Type='application/json')
        if re.match(r'/api/models/org/tiny/tree/', self.path):
            tree = [dict(type='file', path=f.name, size=f.stat().st_size, oid=SHA) for f in sorted(folder.iterdir())]
            return self.reply(json.dumps(tree).encode(), Content_Type='application/json')
        m = re.match(r'/org/tiny/resolve/\w+/([^/?]+)', self.path)
        if not m or not (folder/m[1]).exists(): return self.reply(b'', 404, X_Error_Code='EntryNotFound' if m else 'RepoNotFound')
        body = (folder/m[1]).read_bytes(); r = re.match(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        meta = dict(ETag=f'"{m[1]}"', X_Repo_Commit=SHA, Accept_Ranges='bytes')
        if not r: return self.reply(body, **meta)
        part = body[int(r[1]):int(r[2] or len(body)-1)+1]
        self.reply(part, 206, Content_Range=f'bytes {r[1]}-{int(r[1])+len(part)-1}/{len(body)}', **meta)
    do_HEAD = do_GET

@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    srv = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    yield dict(os.environ, HF_ENDPOINT=f'http://127.0.0.1:{srv.server_port}', HF_HOME=str(tmp_path_factory.mktemp('hf')), HF_HUB_DISABLE_XET='1',
               HF_HUB_DISABLE_TELEMETRY='1', NO_PROXY='127.0.0.1', no_proxy='127.0.0.1')
    srv.shutdown()

def call(env, *args): return subprocess.run([sys.executable, '-m', 'moe_fuse', *args], env=env, capture_output=True, text=True)

def test_inspect_reads_headers_and_not_weights(hub):
    Hub.sent = 0
    there, here = call(hub, 'inspect', 'org/tiny', '--json'), call(hub, 'inspect', 'demo', '--json')
    assert there.returncode==0, there.stderr
    assert json.loads(there.stdout)==json.loads(here.stdout)
    assert Hub.sent < 1_000_000                                               # of 9 MB

def test_a_hub_id_is_downloaded_and_evaluated(hub):
    r = call(hub, 'eval', 'org/tiny', '--against', 'demo', '--tokens', '2048', '--json')
    assert r.returncode==0, r.stderr
    assert abs(json.loads(r.stdout)['mean']['kl']) < 1e-9

def test_a_hub_id_that_is_not_there_is_named(hub):
    r = call(hub, 'inspect', 'org/nothing')
    assert r.returncode==2 and r.stdout=='' and 'org/nothing' in r.stderr and r.stderr.count('\n')==1
