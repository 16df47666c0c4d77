"Documents come from files, folders and sets of the hub as one line names them, and chats become tokens that know who wrote them."
import gzip, json, os, subprocess, sys
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import given, settings, strategies as st
from moe_fuse.cli import main
from moe_fuse.headers import *
from moe_fuse.calibration import sample_tokens
from moe_fuse.sources import *
from tiny_models import root

TEXTS = ['so much depends', 'upon\u2028a red wheel', 'barrow "glazed"\nwith rain', 'ß ☃ 車']
CHAT = [dict(role='user', content='What does `len` do?'), dict(role='assistant', content='It counts.'), dict(role='user', content='Thanks.'), dict(role='assistant', content='Gladly.')]

@pytest.fixture(scope='module')
def tok(): return load_tokenizer(resolve_source('demo'))

def with_template(template):
    t = load_tokenizer(resolve_source('demo'))
    t.chat_template = template
    return t

def lines(rows): return ''.join(json.dumps(r, ensure_ascii=False)+'\n' for r in rows)
def parquet(path, rows): path.parent.mkdir(parents=True, exist_ok=True); pq.write_table(pa.Table.from_pylist(rows), path); return path

# files

def test_the_same_documents_from_every_kind_of_file(tmp_path):
    "A line separator inside a string ends no line"
    rows = [dict(text=t) for t in TEXTS]
    (tmp_path/'a.jsonl').write_text(lines(rows), encoding='utf-8')
    with gzip.open(tmp_path/'a.train.jsonl.gz', 'wt', encoding='utf-8') as f: f.write(lines(rows))
    parquet(tmp_path/'a.parquet', rows)
    for f in 'a.jsonl', 'a.train.jsonl.gz', 'a.parquet':
        docs = read_docs(tmp_path/f)
        assert [d['text'] for d in docs]==TEXTS and {d['domain'] for d in docs}=={'a'} and {d['origin'] for d in docs}=={str(tmp_path/f)}
    (tmp_path/'b.txt').write_text('\n'.join(TEXTS), encoding='utf-8')
    with gzip.open(tmp_path/'b.txt.gz', 'wt', encoding='utf-8') as f: f.write('\n'.join(TEXTS))
    assert [d['text'] for f in ('b.txt', 'b.txt.gz') for d in read_docs(tmp_path/f)]==['\n'.join(TEXTS)]*2
    parquet(tmp_path/'c.parquet', [dict(messages=CHAT, id=3)])
    assert read_docs(tmp_path/'c.parquet')[0]['messages']==CHAT

@pytest.mark.parametrize('name, content, say', [
    ('a.jsonl', b'{"text": "a"}\n{"text": 3}\n', 'line 2 has neither'), ('a.jsonl', b'{"messages": []}\n', 'line 1 has messages'), ('a.jsonl', b'\n \n', 'no documents'),
    ('a.jsonl', b'{"messages": [{"role": "user", "content": null}]}', 'line 1 has messages'), ('a.jsonl', b'['*100000, 'line 1 is not JSON'), ('a.txt', b'\xff\xfe', 'a.txt'),
    ('a.jsonl.gz', gzip.compress(b'{"text": "a"}\n'*99, mtime=0)[:-20]+b'\0'*40, 'a.jsonl.gz'), ('a.txt.gz', b'\x1f\x8b\x08\0\0\0\0\0\0\xff'+b'\xff'*40, 'a.txt.gz'), ('a.parquet', b'PAR1 no more', 'a.parquet'),
    ('a.parquet', [dict(text='x'), dict(text=None)], 'row 1 has neither'), ('a.parquet', [dict(title='x')], 'row 0 has neither')])
def test_what_is_wrong_with_a_file_is_said_in_one_line(name, content, say, tmp_path):
    if isinstance(content, bytes): (tmp_path/name).write_bytes(content)
    else: parquet(tmp_path/name, content)
    with pytest.raises(BadInput) as e: read_docs(tmp_path/name)
    assert say in str(e.value) and name in str(e.value) and '\n' not in str(e.value)

# mixtures

def test_a_mixture_draws_as_many_documents_as_it_says(tmp_path):
    for f in 'ab': (tmp_path/f'{f}.jsonl').write_text(lines(dict(text=f'{f} {i}') for i in range(100)))
    mix = f'{tmp_path}/a.jsonl:30, {tmp_path}/b.jsonl:7'
    one, two = read_docs(mix), read_docs(mix, seed=1)
    assert [sum(d['domain']==x for d in one) for x in 'ab']==[30, 7] and one==read_docs(mix) and one!=two
    assert len({d['text'] for d in one})==37 and len(read_docs(f'{tmp_path}/a.jsonl:100'))==100
    for bad,say in (':101', 'holds 100'), (':0', '0 were asked for'), (f',{tmp_path}/c.jsonl', 'No such file'), (':-3', 'No such file'), (',', 'a source is missing'), (', ,limo', 'a source is missing'):
        with pytest.raises(BadInput, match=say): read_docs(f'{tmp_path}/a.jsonl{bad}')

def test_a_text_counts_once_and_the_report_says_what_was_dropped(tmp_path, tok):
    rows = [dict(text=f'line {i} '*40) for i in range(60)]
    (tmp_path/'a.jsonl').write_text(lines(rows + rows[:9] + [dict(text=' \n')]*3))
    (tmp_path/'b.jsonl').write_text(lines([dict(messages=[dict(role='user', content=f'{i} '*600)]) for i in range(20)] + rows[:5]))
    t = sample_tokens(read_docs(f'{tmp_path}/a.jsonl,{tmp_path}/b.jsonl'), tok, seq_len=256)
    r = t.report
    assert (r['duplicates'], r['empty'])==(14, 3) and sum(r['documents'].values())==80 and r['cut']==20
    assert r['origins']==[f'{tmp_path}/a.jsonl', f'{tmp_path}/b.jsonl'] and max(t.lengths)==256
    with pytest.raises(BadInput, match='c: every document'): (tmp_path/'c.jsonl').write_text(lines(rows)); sample_tokens(read_docs(f'{tmp_path}/a.jsonl')+[d|dict(domain='c') for d in read_docs(f'{tmp_path}/a.jsonl:3')], tok)

# sets of documents: `datasets` reads a folder the way it reads a set of the hub

def card(folder, text): (folder/'README.md').write_text(f'---\nconfigs:\n{text}---\n')

def test_sets_with_short_names_are_read_as_they_lie_on_the_hub(tmp_path):
    "Their files, splits and columns, in a folder"
    u, l, r = (tmp_path/x for x in ('u', 'l', 'r'))
    for split in 'train_sft', 'test_sft', 'train_gen': parquet(u/f'data/{split}-00000-of-00001.parquet', [dict(prompt='?', prompt_id=f'{i}', messages=CHAT+[dict(role='user', content=f'{split} {i}')]) for i in range(9)])
    card(u, '- config_name: default\n  data_files:\n' + ''.join(f'  - split: {s}\n    path: data/{s}-*\n' for s in ('train_sft', 'test_sft', 'train_gen')))
    for split,s in ('train', 'train_sft'), ('valid', 'test_sft'):
        docs = read_hub(HUB['ultrachat']._replace(id=str(u), revision=None), 'ultrachat', split, 4)
        assert [d['messages'][:4] for d in docs]==[CHAT]*4 and all(d['messages'][4]['content'].startswith(s) for d in docs) and {d['domain'] for d in docs}=={'ultrachat'}
    l.mkdir(); (l/'limo.jsonl').write_text(lines(dict(question=f'{i}+{i}?', solution=f'so {2*i}', answer=str(2*i)) for i in range(817)))
    docs = read_hub(HUB['limo']._replace(id=str(l), revision=None), 'limo', 'train')
    named = read_hub(HUB['limo']._replace(id=str(l), revision=None), 'limo@0123abc', 'train', 3)
    assert {d['domain'] for d in named}=={'limo'}                              # counted under the same name whatever the revision
    assert len(docs)==817 and docs[3]['messages']==[dict(role='user', content='3+3?'), dict(role='assistant', content='so 6')] and docs[3]['where'].endswith('row 3')
    r.mkdir()
    for c in 'nonreasoning', 'reasoning-deepseek': (r/f'dolphin-r1-{c}.jsonl').write_text(lines([dict(messages=CHAT[:1], reasoning='Hm.', answer='It counts.', model='x')]))
    card(r, ''.join(f'- config_name: {c}\n  data_files:\n  - split: train\n    path: dolphin-r1-{c}.jsonl\n' for c in ('nonreasoning', 'reasoning-deepseek')))
    d, = read_hub(HUB['dolphin-r1']._replace(id=str(r), revision=None), 'dolphin-r1', 'train')
    assert [m['content'] for m in d['messages']]==[CHAT[0]['content'], '<think>\nHm.\n</think>\n\nIt counts.']
    with pytest.raises(BadInput, match="has no column 'question'"): read_hub(HUB['limo']._replace(id=str(u), revision=None, train='train_sft'), 'limo', 'train')

def test_a_folder_is_a_set(tmp_path):
    parquet(tmp_path/'tales/train.parquet', [dict(text=f'Tale {i}.') for i in range(20)])
    assert [d['domain'] for d in read_docs(f'{tmp_path}/tales:3')]==['tales']*3
    (tmp_path/'none').mkdir()
    with pytest.raises(BadInput, match='none: can\'t be loaded'): read_docs(tmp_path/'none')

@pytest.mark.parametrize('src, want', [('a/b@main', ('a/b', 'main', None, 'train', 'train')), ('a/b@c0ffee#test', ('a/b', 'c0ffee', None, 'test', 'test')), ('a/b@refs/pr/3#en/dev', ('a/b', 'refs/pr/3', 'en', 'dev', 'dev')),
                                       ('a/b.jsonl', None), ('x.jsonl', None), ('/a/b/c', None)])
def test_names_of_sets(src, want): assert (s := hub_set(src)) is want or s[:5]==want

def test_without_the_hub_one_line_and_exit_code_2(tmp_path):
    "In a process that may not go out; nothing is left behind"
    for text,say in ('limo:5', 'limo'), ('a/b@main', 'a/b@main'), ('allenai/c4', 'needs a revision'):
        r = subprocess.run([sys.executable, '-m', 'moe_fuse', 'run', 'demo', str(tmp_path/'out'), '--calibration', text], capture_output=True, text=True, cwd=root,
                           env=os.environ | dict(HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path/'hf')))
        assert r.returncode==2 and r.stdout=='' and len(r.stderr.splitlines())==1 and say in r.stderr, r.stderr
        assert not list(tmp_path.glob('out*'))

def test_without_the_extra_its_name_is_said(monkeypatch, tmp_path):
    for m in 'datasets', 'pyarrow': monkeypatch.setitem(sys.modules, m, None)
    for src in 'limo', str(tmp_path), str(tmp_path/'a.parquet'):
        with pytest.raises(BadInput, match=r"pip install 'moe_fuse\[data\]'"): read_docs(src)

# who wrote which token

TAGS = "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
V2 = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}"
      "{% elif m.role == 'system' %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
R1 = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>{{ m.content.split('</think>')|last }}<|end|>{% endif %}{% endfor %}"
      "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}")
chats = st.builds(lambda first, turns: first + [dict(role=r, content=c) for u,a in turns for r,c in (('user', u), ('assistant', a))],
                  st.just([]) | st.text(max_size=9).map(lambda c: [dict(role='system', content=c)]), st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=4))

@settings(max_examples=60, deadline=None)
@given(chats)
def test_turns_and_tags_find_the_same_tokens(messages):
    "Whatever is said"
    plain, tagged = _tok('demo'), _tok('tags')
    d = dict(messages=messages, domain='x')
    assert encode(d, plain)==encode(d, tagged)
    assert assistant_mask(d, plain)==assistant_mask(d, tagged) and len(assistant_mask(d, plain))==len(encode(d, plain))

_toks = {}
def _tok(name):
    if name not in _toks: _toks[name] = load_tokenizer(resolve_source('demo')) if name=='demo' else with_template(dict(tags=TAGS, v2=V2, r1=R1)[name])
    return _toks[name]

@pytest.mark.parametrize('name, want', [('demo', 'It counts.<|end|>Gladly.<|end|>'), ('tags', 'It counts.<|end|>Gladly.<|end|>'), ('v2', ' It counts.<|end|> Gladly.<|end|>'), ('r1', 'It counts.<|end|>Gladly.<|end|>')])
def test_the_answers_of_real_templates(name, want):
    "DeepSeek-V2's words and R1's way of asking with `<think>`, in the embedded teacher's special tokens"
    t, d = _tok(name), dict(messages=CHAT, domain='x')
    assert t.decode([i for i,m in zip(encode(d, t), assistant_mask(d, t)) if m])==want
    d = dict(messages=CHAT[:3], domain='x')
    assert t.decode([i for i,m in zip(encode(d, t), assistant_mask(d, t)) if m])==want.split('<|end|>')[0]+'<|end|>', 'the end token behind a question is nobody\'s answer'

def test_a_template_that_forgets_is_refused_by_name():
    t = with_template("{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'user' or loop.last %}{{ m.content }}{% else %}...{% endif %}{% endfor %}")
    d = dict(messages=CHAT, domain='x', where='chats.jsonl: line 7')
    with pytest.raises(BadInput, match='changes earlier turns.*line 7') as e: assistant_mask(d, t)
    assert t.name_or_path in str(e.value)

def test_a_chat_without_a_template_is_named(tmp_path, capfd):
    t = with_template(None)
    with pytest.raises(BadInput, match='chats.jsonl: line 7: .*chat template'): encode(dict(messages=CHAT, domain='x', where='chats.jsonl: line 7'), t)
    assert encode(dict(text='plain', domain='x'), t)

def test_answers_asked_of_text_that_has_none(tok):
    docs = [dict(messages=[dict(role='user', content=f'{i} '*50), dict(role='assistant', content=f'{-i} '*50)], domain='chat') for i in range(60)] + [dict(messages=CHAT[:1], domain='chat')]
    t = sample_tokens(docs, tok, assistant=True)
    assert t.report['no_assistant']==1 and .4<t.assistant.float().mean()<.6
    a = 0
    for n in t.lengths: assert not t.assistant[a]; a += n
    with pytest.raises(BadInput, match='prose: every document.*assistant turn'): sample_tokens(docs + [dict(text='a b c', domain='prose')], tok, assistant=True)
    assert sample_tokens(docs, tok).assistant is None
