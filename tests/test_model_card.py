"The card says what is in the report and on the disk, and nothing of where it was made."
import json, re
import pytest, yaml
from moe_fuse.headers import *
from moe_fuse.model_card import *
from moe_fuse.pipeline import table
from tiny_models import *

@pytest.fixture(scope='module')
def cards(small, tmp_path_factory):
    d = tmp_path_factory.mktemp('cards')
    src = write(d/'Tiny-V3-FP8', *tiny(V3, moe_intermediate_size=64))
    (src/'README.md').write_text('---\r\nlicense: other\r\nlicense_name: deepseek\r\nlicense_link: https://example.org/license\r\nlanguage: en\r\n---\r\nlicense: not this\r\n')
    runs = {m: small(src, d/m, method=m, keep=.5, baselines=b) for m,b in dict(slim=('reap', 'mean'), reap=('slim',), fused=('slim', 'mean'), cores=()).items()}
    return src, {m: (r, (r.out/'README.md').read_text()) for m,r in runs.items()}

NAMES = dict(slim='Tiny-V3-Slim-r32-', reap='Tiny-V3-Pruned-8E-', fused='Tiny-V3-Fused-4E-', cores='Tiny-V3-Fused-8E-')

@pytest.mark.parametrize('method', NAMES)
def test_card(method, cards):
    src, all_ = cards; run, card = all_[method]; r = run.report; s, info = r['student'], inspect(Checkpoint(run.out))
    head = yaml.safe_load(card.split('---\n')[1])
    assert head['license']=='other' and head['license_name']=='deepseek' and head['library_name']=='transformers' and 'base_model' not in head and 'language' not in head
    assert f'# {NAMES[method]}' in card and f"| parameters | {info['total']:,}, of them {info['active']:,} active" in card and f"| bytes | {info['bytes']:,} " in card
    assert f"at most {inspect(Checkpoint(src))['active']/info['active']:.2f} times as fast" in card
    for k in 'calibration', 'held_out': assert r[k]['sha256'] in card
    assert table(r) in card and f"keep {r['recipe']['keep']}" in card
    assert str(src.parent) not in card and 'code.train.jsonl,chat.train.jsonl' in card
    assert ('trust_remote_code=True' in card)==(method in ('fused', 'cores')) and ('--dtype gguf' in card)==(method in ('slim', 'reap'))

def test_who_did_better_is_named(cards):
    for run,card in cards[1].values():
        e = run.report['evaluation']; kind = run.report['kinds'][0]
        for k in run.report['kinds'][1:]:
            wins = [d for d in e[k] if e[k][d]['loss_student']<e[kind][d]['loss_student']]
            assert (f"{k} ({', '.join(wins)})" in card)==bool(wins), (kind, k)
    assert any('A lower loss than' in card for _,card in cards[1].values())

def test_hub_names_are_links_and_a_missing_license_is_said(cards):
    run,_ = cards[1]['slim']; r = json.loads(json.dumps(run.report)); r['source']['name'] = 'deepseek-ai/DeepSeek-V2-Lite'
    card = model_card(r, read_json(run.out/'config.json'), table(r))
    assert yaml.safe_load(card.split('---\n')[1])['base_model']=='deepseek-ai/DeepSeek-V2-Lite' and 'names no license' in card

def test_a_healed_card_has_healed_losses(cards):
    run,_ = cards[1]['slim']; r = json.loads(json.dumps(run.report)); e = r['evaluation']
    r['healing'] = dict(after={d: v | dict(loss_student=0.) for d,v in e['slim'].items()})
    card = model_card(r, read_json(run.out/'config.json'), table(r))
    assert 'A lower loss' not in card and 'Nothing was trained' not in card

@pytest.mark.parametrize('path', ['/home/me/a.jsonl', '~/x/a.jsonl', './x/a.jsonl', '../a.jsonl', 'C:\\x\\a.jsonl'])
def test_folders_are_left_out(path):
    from moe_fuse.model_card import _plain
    assert _plain(f'{path}:5,owner/set@main,{path}')=='a.jsonl:5,owner/set@main,a.jsonl'

@pytest.mark.parametrize('text', ['', 'no head\n', '---\ntitle: x\n', '---\nlicense:\n---\n'])
def test_cards_without_a_license(text, tmp_path):
    (tmp_path/'README.md').write_text(text); assert license_lines(tmp_path)==[]
