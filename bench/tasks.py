"""Questions with known answers, asked by EleutherAI's lm-evaluation-harness: where is the teacher above guessing, and what do students keep of it?

    pip install lm-eval
    python bench/tasks.py SETS results/tasks.json teacher=TEACHER slim=STUDENT ...
    python bench/tasks.py SETS results/tasks.json --table                    # what is there

SETS is a folder with NAME.jsonl.gz, an object a line: `query`, `choices` and `gold` (or `context_options`, `continuation` and `gold`). An answer's score is its likelihood, per
byte for acc_norm. Guessing is the better of 1/choices and naming the commonest answer each time; a set counts as above it if fewer than one guesser in a thousand does as well
(binomial test of the first model's accuracy). With --generate gsm8k and svamp are answered freely: 160 tokens, greedy, the last number counts.
Rows that are in the results already are not made again.
"""
import argparse, gzip, json
from collections import Counter
from datetime import date
from pathlib import Path

import torch
from scipy.stats import binomtest

from moe_fuse.calibration import load_tokenizer
from moe_fuse.checkpoint import write_atomic
from moe_fuse.headers import *

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('sets', type=Path); p.add_argument('out', type=Path); p.add_argument('models', nargs='*', metavar='NAME=FOLDER')
p.add_argument('--only', help='names of sets, with commas; all that there are if left out'); p.add_argument('--generate', action='store_true')
p.add_argument('--limit', type=int, help='questions a set'); p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu'); p.add_argument('--batch', type=int, default=64)
p.add_argument('--table', action='store_true', help='ask nothing, print what there is')
a = p.parse_args()

files = {f.name.removesuffix('.jsonl.gz').removesuffix('_test'): f for f in sorted(a.sets.glob('*.jsonl.gz'))}
docs = {k: [json.loads(l) for l in gzip.open(f, 'rt', encoding='utf-8')] for k,f in files.items()}
FREE = dict(gsm8k='Question: {{question}}\nAnswer:', svamp='Question: {{context}}\nAnswer:')
kind = {k: 'choices' if 'choices' in d[0] else 'contexts' if 'context_options' in d[0] else 'free' if k in FREE else None for k,d in docs.items()}
wanted = [k for k in (a.only.split(',') if a.only else docs) if kind[k] and (kind[k]!='free' or a.generate) and 'dev' not in k]

def text_of(k): # how a question is put
    q = docs[k][0].get('query', '')
    return '{{query}}' if k in ('hellaswag', 'piqa') or q.endswith('Answer:') else 'Question: {{query}}\nAnswer:' if k!='boolq' else '{{query}}\nAnswer:'

def config(k): # of lm-evaluation-harness
    c = dict(task=k, dataset_path='json', dataset_kwargs=dict(data_files=dict(test=str(files[k]))), test_split='test', metric_list=[dict(metric='acc'), dict(metric='acc_norm')], output_type='multiple_choice')
    if kind[k]=='choices': return c | dict(doc_to_text=text_of(k), doc_to_choice='choices', doc_to_target='gold')
    if kind[k]=='contexts': return c | dict(doc_to_text='gold', doc_to_choice='context_options', doc_to_target='{{continuation}}', metric_list=[dict(metric='acc')])
    number = dict(name='last', filter=[dict(function='regex', regex_pattern=r'(-?\d[\d,]*(?:\.\d+)?)', group_select=-1), dict(function='take_first')])
    return c | dict(output_type='generate_until', doc_to_text=FREE[k], doc_to_target='final' if k=='gsm8k' else 'answer', filter_list=[number], generation_kwargs=dict(until=['\n\n', 'Question:'], do_sample=False, max_gen_toks=160),
                    metric_list=[dict(metric='exact_match', regexes_to_ignore=[',', r'\.0+$'])])

def ask(folder): # -> ({set: {metric: value}}, versions)
    import lm_eval, transformers
    from lm_eval.models.huggingface import HFLM
    from moe_fuse.heal import whole_model
    ck = Checkpoint(resolve_source(folder))
    model = whole_model(ck, torch.float32, a.device)
    lm = HFLM(pretrained=model, tokenizer=load_tokenizer(ck.folder), batch_size=a.batch, device=a.device, max_length=ck.config['max_position_embeddings'])
    r = lm_eval.simple_evaluate(lm, tasks=[config(k) for k in wanted], limit=a.limit, bootstrap_iters=0, random_seed=0, numpy_random_seed=0, torch_random_seed=0)
    out = {k: {m.split(',')[0]: v for m,v in r['results'][k].items() if isinstance(v, float) and 'stderr' not in m} | dict(n=r['n-samples'][k]['effective']) for k in wanted}
    return out, dict(lm_eval=lm_eval.__version__, torch=torch.__version__, transformers=transformers.__version__)

rows = json.loads(a.out.read_text()) if a.out.exists() else []
for name,folder in (m.split('=', 1) for m in ([] if a.table else a.models)):
    wanted = [k for k in wanted if not any(r['model']==name and k in r['scores'] for r in rows)]
    if not wanted: continue
    scores, versions = ask(folder)
    rows.append(dict(model=name, limit=a.limit, scores=scores, device=torch.cuda.get_device_name() if a.device=='cuda' else 'CPU', versions=versions, date=str(date.today())))
    a.out.parent.mkdir(exist_ok=True, parents=True); write_atomic(a.out, json.dumps(rows, indent=1)+'\n')

def guess(k, n): # share that a guesser gets right
    d = docs[k][:n]
    return 0 if kind[k]=='free' else max(max(Counter(x['gold'] for x in d).values())/len(d), sum(1/len(x.get('choices') or x['context_options']) for x in d)/len(d))
models = list(dict.fromkeys(r['model'] for r in rows))
if models:
    got = {(r['model'], k): s for r in rows for k,s in r['scores'].items()}
    print('| set | questions | guessing | ' + ' | '.join(models) + ' | above guessing |\n|---|--:|--:|' + '--:|'*len(models) + '---|')
    for k in sorted({k for _,k in got}):
        n, m = got[models[0], k]['n'], next(m for m in ('acc_norm', 'acc', 'exact_match') if m in got[models[0], k])
        sure = binomtest(round(got[models[0], k][m]*n), n, max(guess(k, n), 1e-9), 'greater').pvalue<1e-3
        print(f'| {k}, {m} | {n} | {guess(k, n):.1%} | ' + ' | '.join(f'{got[x, k][m]:.1%}' if (x, k) in got else '' for x in models) + f' | {"yes" if sure else "no"} |')
