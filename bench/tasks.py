"""Questions with known answers, asked by EleutherAI's lm-evaluation-harness: where is the teacher above guessing, and what do students keep of it?

    pip install lm-eval
    python bench/tasks.py SETS results/tasks.json teacher=TEACHER slim:0=STUDENT slim:1=ANOTHER "slim, healed:0"=HEALED ...
    python bench/tasks.py SETS results/tasks.json teacher=TEACHER --generate --only gsm8k,svamp
    python bench/tasks.py SETS results/tasks.json "teacher, asked in chat=TEACHER" --chat

A model is NAME=FOLDER or NAME:SEED=FOLDER. SETS is a folder with NAME.jsonl.gz, an object a line: `query`, `choices` and `gold` (or `context_options`, `continuation` and `gold`). An
answer's score is its log-likelihood, per character where answers are phrases of different lengths; each text starts with the tokenizer's begin token. The answers are also scored after that token
alone, which tells what can be had without reading the question. With --generate gsm8k and svamp (`question` or `context`, `final` or `answer`) are answered freely: 160 tokens, greedy, the last number counts.
What each model picked is stored, a digit a question, after every set; sets that a model was asked already are left out.
"""
import argparse, gzip, json, time
from collections import Counter
from datetime import date
from pathlib import Path

import torch

from moe_fuse.calibration import load_tokenizer
from moe_fuse.checkpoint import write_atomic
from moe_fuse.headers import *

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument('sets', type=Path); p.add_argument('out', type=Path); p.add_argument('models', nargs='+', metavar='NAME[:SEED]=FOLDER')
p.add_argument('--only', help='names of sets, with commas; all that there are if left out'); p.add_argument('--generate', action='store_true'); p.add_argument('--chat', action='store_true', help='questions as a turn of the user, in the chat template')
p.add_argument('--limit', type=int, help='questions a set'); p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu'); p.add_argument('--batch', type=int, default=16, help='sequences at a time; on a CPU more than a few thousand tokens are slower')
a = p.parse_args()

files = {f.name.removesuffix('.jsonl.gz').removesuffix('_test'): f for f in sorted(a.sets.glob('*.jsonl.gz')) if '_dev' not in f.name}
docs = {k: [json.loads(l) for l in gzip.open(f, 'rt', encoding='utf-8')] for k,f in files.items()}
FREE = dict(gsm8k='Question: {{question}}\nAnswer:', svamp='Question: {{context}}\nAnswer:')
PLAIN, BY_TEXT = ('hellaswag', 'openbookqa'), ('boolq', 'commonsense_qa', 'winogrande') # asked without `Question:`; scored without dividing by the length. Both as the harness' own tasks do
kind = {k: 'choices' if 'choices' in d[0] else 'contexts' if 'context_options' in d[0] else 'free' if k in FREE else None for k,d in docs.items()}
wanted = [k for k in (a.only.split(',') if a.only else docs) if kind[k] and (kind[k]!='free' or a.generate) and (not a.chat or kind[k]=='choices' and k!='hellaswag')]
options = lambda d: d.get('choices') or d['context_options']

def text_of(k): # how a question is put
    return '{{query}}' if a.chat or k in PLAIN or docs[k][0]['query'].endswith('Answer:') else '{{query}}\nAnswer:' if k=='boolq' else 'Question: {{query}}\nAnswer:'

def config(k): # of lm-evaluation-harness
    c = dict(task=k, dataset_path='json', dataset_kwargs=dict(data_files=dict(test=str(files[k]))), test_split='test', output_type='multiple_choice', metric_list=[dict(metric=m) for m in ('acc', 'acc_norm', 'acc_mutual_info')])
    if kind[k]=='choices': return c | dict(doc_to_text=text_of(k), doc_to_choice='choices', doc_to_target='gold', target_delimiter='' if a.chat else ' ')
    if kind[k]=='contexts': return c | dict(doc_to_text='gold', doc_to_choice='context_options', doc_to_target='{{continuation}}', metric_list=[dict(metric='acc')])
    number = dict(name='last', filter=[dict(function='regex', regex_pattern=r'(-?\d[\d,]*(?:\.\d+)?)', group_select=-1), dict(function='take_first')])
    return c | dict(output_type='generate_until', doc_to_text=FREE[k], doc_to_target='final' if k=='gsm8k' else 'answer', filter_list=[number], generation_kwargs=dict(until=['\n\n', 'Question:'], do_sample=False, max_gen_toks=160),
                    metric_list=[dict(metric='exact_match', regexes_to_ignore=[',', r'\.0+$'])])

def begins(tok): # the tokenizer, which puts the begin token before a text as it was trained
    from tokenizers.processors import TemplateProcessing
    b = tok.bos_token
    if b and tok('a')['input_ids'][:1]!=[tok.bos_token_id]: tok.backend_tokenizer.post_processor = TemplateProcessing(single=f'{b} $A', special_tokens=[(b, tok.bos_token_id)])
    return tok

def ask(lm, k): # -> {picked, blind}, or {right} of a free answer: a digit a question
    import lm_eval
    from lm_eval.tasks import TaskManager
    r = lm_eval.simple_evaluate(lm, tasks=[config(k)], task_manager=TaskManager(include_defaults=False), limit=a.limit, apply_chat_template=a.chat, bootstrap_iters=0, random_seed=0, numpy_random_seed=0, torch_random_seed=0)
    found, r = sorted(r['samples'][k], key=lambda s: s['doc_id']), r['results'][k]
    if kind[k]=='free': return dict(right=''.join(f"{s['exact_match']:.0f}" for s in found))
    def best(scores, d): return max(range(len(scores)), key=lambda i: scores[i]/(1 if k in BY_TEXT else len(options(d)[i])))
    def digits(part): return ''.join(str(best([x[0] for x in part(s['filtered_resps'], len(options(d)))], d)) for s,d in zip(found, docs[k]))
    out = dict(picked=digits(lambda x, n: x[:n])) | (dict(blind=digits(lambda x, n: x[n:])) if kind[k]=='choices' else {})
    right = sum(int(c)==d['gold'] for c,d in zip(out['picked'], docs[k]))/len(found)
    if abs(right - r[f"{'acc' if k in BY_TEXT else 'acc_norm'},none"]) > 1e-9: raise ValueError(f'{k}: {right} right here, the harness says {r}')
    return out

found = json.loads(a.out.read_text()) if a.out.exists() else dict(sets={}, models=[])
for model,folder in (m.split('=', 1) for m in a.models):
    name, _, seed = model.partition(':')
    row = next((r for r in found['models'] if (r['model'], r['seed'])==(name, int(seed or 0))), None)
    todo = [k for k in wanted if not row or k not in row['answers']]
    if not todo: continue
    import lm_eval, transformers
    from lm_eval.models.huggingface import HFLM
    from moe_fuse.heal import whole_model
    ck = Checkpoint(resolve_source(folder))
    lm = HFLM(pretrained=whole_model(ck, torch.float32, a.device), tokenizer=begins(load_tokenizer(ck.folder)), batch_size=a.batch, device=a.device, max_length=ck.config['max_position_embeddings'])
    if not row: found['models'].append(row := dict(model=name, seed=int(seed or 0), answers={}, seconds={}, device=torch.cuda.get_device_name() if a.device=='cuda' else 'CPU', threads=torch.get_num_threads(),
                                                   versions=dict(lm_eval=lm_eval.__version__, torch=torch.__version__, transformers=transformers.__version__), date=str(date.today())))
    for k in todo:
        start = time.time()
        row['answers'][k] = ask(lm, k); row['seconds'][k] = round(time.time()-start, 1)
        golds = Counter(str(d['gold' if kind[k]!='free' else 'final' if k=='gsm8k' else 'answer']) for d in docs[k])
        found['sets'][k] = dict(commonest=max(golds.values())/len(docs[k])) if kind[k]=='free' else dict(choices=len(options(docs[k][0])), gold=''.join(str(d['gold']) for d in docs[k]), by_length=k not in BY_TEXT)
        a.out.parent.mkdir(exist_ok=True, parents=True); write_atomic(a.out, json.dumps(found, indent=1)+'\n')
        got = row['answers'][k]
        right = [c=='1' for c in got['right']] if 'right' in got else [int(c)==d['gold'] for c,d in zip(got['picked'], docs[k])]
        print(f"{model}: {k}, {sum(right)} of {len(right)} right, {row['seconds'][k]} s", flush=True)
