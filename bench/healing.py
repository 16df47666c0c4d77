"""What end-to-end healing buys, on a trained teacher: KL and losses before and after, for several students at the same tokens.

    python bench/healing.py TEACHER DATA results/healing.json --only main        # repeat the command until it says that nothing is left
    python bench/healing.py TEACHER DATA results/healing.json --only speed
    python bench/healing.py results/healing.json                                 # the tables of what is there

TEACHER is a checkpoint, DATA a folder with DOMAIN.train.jsonl.gz and DOMAIN.valid.jsonl.gz. Studies (--only, divided by commas):

    main    slim, REAP, HC-SMoE and the seeds' recipe at a quarter, an eighth and a sixteenth of the routed weights, three seeds, 20 M tokens
    lr      the peak learning rate, for both kinds alike; 5 M tokens, seed 0
    settings  weight of the KL, learning rate, tokens a step, words of the teacher, what is trained, and whether layers were distilled before; slim at a quarter, 5 and 20 M tokens
    parts   slim at a quarter: layer by layer only, end to end only, both, each with 5 M tokens in all
    loss    cross-entropy only, KL only, both
    train   what is trained: experts, with norms, with routers, all
    speed   tokens a second and TFLOP/s beside a plain forward and backward pass of the stock model

Students are made once (WORK/students), the teacher is asked once (WORK/cache), a job that was cut off goes on from its checkpoint, and
no job starts after --minutes. --keeps, --methods and --seeds take a part of `main`, so that several commands share a card, each with an OUT
and a WORK of its own; given several OUT alone, the tables are of all. Other students: --student NAME=FOLDER, which take part in `main`.
"""
import argparse, json, sys, time
from pathlib import Path

import pandas as pd, torch

from moe_fuse.checkpoint import write_atomic
from moe_fuse.headers import *
from moe_fuse.heal import *
from moe_fuse.pipeline import compress

M = 10**6
def jobs(a):
    "(study, student, settings of `heal`, seed)"
    seeds = [int(s) for s in a.seeds.split(',')]
    base = dict(tokens=a.tokens, lr=a.lr, kd=a.kd, top_k=a.top_k, train=a.train, batch_tokens=a.batch_tokens) | (dict(live_teacher=True) if a.live_teacher else {})
    for keep in map(float, a.keeps.split(',')):
        for seed in seeds:
            for kind in a.methods.split(','): yield 'main', dict(method=kind, keep=keep), base, seed
            for name,folder in a.students.items(): yield 'main', dict(folder=folder, name=name), base, seed
    for lr in 1e-4, 2e-4, 5e-4, 1e-3, 2e-3:
        for kind in 'slim', 'reap': yield 'lr', dict(method=kind, keep=.25), base | dict(tokens=5*M, lr=lr), 0
    slim = dict(method='slim', keep=.25)
    live = dict(live_teacher=True)
    for tokens,kd,lr,batch,k,train,steps in [(5,.5,1e-3,16384,32,'experts,norms',0), (5,1.,1e-3,16384,32,'experts,norms',0), (5,1.,2e-3,16384,32,'experts,norms',0), (5,1.,4e-3,16384,32,'experts,norms',0),
            (5,1.,2e-3,8192,32,'experts,norms',0), (5,1.,1e-3,4096,32,'experts,norms',0), (5,1.,2e-3,16384,32,'all',0), (5,1.,2e-3,16384,256,'all',0), (5,1.,1e-3,8192,32,'all',0), (5,1.,2e-3,4096,32,'all',0),
            (5,1.,2e-3,16384,32,'experts,norms',400), (5,1.,2e-3,16384,32,'all',400), (20,1.,2e-3,16384,32,'all',0), (20,1.,4e-3,16384,32,'all',0), (20,1.,4e-3,16384,32,'all',400)]:
        yield 'settings', slim | (dict(distill_steps=steps) if steps else {}), dict(tokens=tokens*M, kd=kd, lr=lr, batch_tokens=batch, top_k=k, train=train, spike=20., **live), 0
    for seed in seeds:
        layers = torch.tensor(5*M//2048).item()                                # steps of 2,048 tokens: each layer sees 5 M
        yield 'parts', slim | dict(distill_steps=layers), None, seed
        yield 'parts', slim, base | dict(tokens=5*M), seed
        yield 'parts', slim | dict(distill_steps=layers//2), base | dict(tokens=5*M//2), seed
        for kd in 0., 1., .5: yield 'loss', slim, base | dict(tokens=5*M, kd=kd), seed
        for train in 'experts', 'experts,norms', 'experts,router,norms', 'all': yield 'train', slim, base | dict(tokens=5*M, train=train), seed

def student(a, spec, seed, cal):
    "The folder of a student, made if it is not there; None where it can't exist"
    if 'folder' in spec: return Path(spec['folder'])
    name = '-'.join(f'{v}' for v in spec.values()) + f'-{seed}'
    out = a.work/'students'/name
    if not out.exists():
        try: compress(a.teacher, out, calibration=cal[0], eval_data=cal[1], eval_tokens=a.eval_tokens, tokens=a.calibration_tokens, baselines=(), seed=seed, resume=True, quiet=True, **spec)
        except BadInput as e: print(f'{name}: {e}', flush=True); return None
    return out

def short(report): return {k: report[k] for k in ('recipe', 'steps', 'before', 'after', 'recovered', 'last_lr', 'estimate', 'train_seconds', 'seconds', 'log', 'device', 'versions', 'date')}

def study(a, rows, only):
    text = [','.join(str(f) for f in sorted(a.data.glob(f'*.{s}.jsonl.gz'))) for s in ('train', 'valid')]
    todo = [j for j in jobs(a) if j[0] in only and not any(r['job']==json.loads(json.dumps(j)) for r in rows)]
    for n,job in enumerate(todo):
        if time.time()-a.start > a.minutes*60: print(f'{len(todo)-n} jobs are left; repeat the command'); return
        _, spec, settings, seed = job
        s = student(a, spec, seed, text)
        row = dict(job=job)
        if s is None: row['impossible'] = True
        elif settings is None: row['after'] = json.loads((s/'report.json').read_text())['evaluation']['slim']
        else:
            out = a.work/'healed'
            if out.exists(): import shutil; shutil.rmtree(out)
            here = a.work/'job.json'; same = here.exists() and here.read_text()==json.dumps(job)
            if not same: import shutil; shutil.rmtree(a.work/'healed.partial', ignore_errors=True); write_atomic(here, json.dumps(job))
            row |= short(heal(s, out, a.teacher, text[0], eval_data=text[1], eval_tokens=a.eval_tokens, cache=a.work/'cache', seed=seed, device=a.device,
                              resume=same, quiet=not a.verbose, **settings).report)
        rows.append(row); a.out.parent.mkdir(exist_ok=True, parents=True); write_atomic(a.out, json.dumps(rows, indent=1)+'\n')
        print(job, {k: round(row[k]['mean']['kl'], 4) for k in ('before', 'after') if k in row}, f"{row.get('recovered') or 0:.1%}", f"{row.get('train_seconds', 0):.0f} s", flush=True)
    print('nothing is left')

def speed(a, rows):
    "Steps of the Trainer beside plain forward and backward passes of the same stock model on the same rows; medians of single steps, after a warm-up"
    text = [','.join(str(f) for f in sorted(a.data.glob(f'*.{s}.jsonl.gz'))) for s in ('train', 'valid')]
    ck = Checkpoint(student(a, dict(method='slim', keep=.25), 0, text))
    tok, steps = load_tokenizer(ck.folder), 60
    recipe = dict(tokens=10**9, train='experts,norms', adapter='none', rank=16, quantize_base='none', kd=.5, top_k=32, lr=1e-4, batch_tokens=a.batch_tokens, seq_len=512, spike=1e9, seed=0, save_every=10**6, eval_every=None)
    tokens = healing_tokens(read_docs(text[0]), tok, 2*M, 512)
    ex = Examples(tokens, 512, a.batch_tokens//512, teacher_topk(Checkpoint(resolve_source(a.teacher)), tokens, a.work/'speed', 32, a.device))
    args = healing_args(recipe, a.work/'speed-states', steps, a.device, False)
    args.save_strategy = 'no'
    trainer = HealTrainer(prepare_student(ck, recipe['train'], device=a.device), args, ex.collate, ex, kd=.5, spike=1e9)
    ends = []
    class Clock(TrainerCallback):
        def on_step_end(self, *x, **kw):
            if a.device=='cuda': torch.cuda.synchronize()
            ends.append(time.perf_counter())
    trainer.add_callback(Clock()); trainer.train()
    def median(times): return pd.Series(times).diff().iloc[10:].median()
    def plain(dtype, experts):
        "bfloat16 weights, or float32 weights under autocast; loss by the model itself"
        model = whole_model(ck, dtype, a.device).train().requires_grad_(True)
        model.set_experts_implementation(experts)
        batches = [{k: v.to(a.device) for k,v in ex.collate([ex[i*args.per_device_train_batch_size+j] for j in range(args.per_device_train_batch_size)]).items() if k in ('input_ids', 'position_ids', 'labels')} for i in range(4)]
        times, n = [], args.gradient_accumulation_steps
        for s in range(steps):
            for m in range(n):
                with torch.autocast(a.device, torch.bfloat16, enabled=dtype==torch.float32): loss = model(**batches[(s+m)%4]).loss
                (loss/n).backward()
            model.zero_grad()
            if a.device=='cuda': torch.cuda.synchronize()
            times.append(time.perf_counter())
        return median(times)
    active = inspect(ck)['active']
    found = dict(healing=median(ends), **{'plain, bfloat16': plain(torch.bfloat16, 'grouped_mm'), 'plain, autocast': plain(torch.float32, 'autocast_grouped_mm')})
    row = dict(job=['speed', args.per_device_train_batch_size, args.gradient_accumulation_steps], device=torch.cuda.get_device_name() if a.device=='cuda' else 'CPU', torch=torch.__version__, active=active, date=time.strftime('%Y-%m-%d'),
               **{k: dict(seconds_a_step=t, tokens_per_second=a.batch_tokens/t, tflops=6*active*a.batch_tokens/t/1e12) for k,t in found.items()})
    rows[:] = [r for r in rows if r['job'][0]!='speed'] + [row]
    a.out.parent.mkdir(exist_ok=True, parents=True); write_atomic(a.out, json.dumps(rows, indent=1)+'\n'); print(json.dumps(row, indent=1))

def tables(rows):
    "Mean and standard deviation over seeds"
    heads = [r for r in rows if r['job'][0] not in ('speed',) and 'after' in r]
    for name in dict.fromkeys(r['job'][0] for r in heads):
        df = pd.DataFrame([dict(student=r['job'][1].get('name') or ' '.join(map(str, r['job'][1].values())), settings=json.dumps(r['job'][2]), KL_before=r['before']['mean']['kl'] if 'before' in r else None,
                                KL_after=r['after']['mean']['kl'], gap_recovered=r.get('recovered')) for r in heads if r['job'][0]==name])
        g = df.groupby(['student', 'settings'], sort=False)
        print(f'\n{name}\n', (g.mean().round(3).astype(str) + ' ± ' + g.std().round(3).astype(str)).assign(seeds=g.size()).to_markdown() if 'tabulate' in sys.modules else pd.concat([g.mean().round(4), g.std().round(4).add_suffix(' ±'), g.size().rename('seeds')], axis=1).to_string())
    for r in rows:
        if r['job'][0]=='speed': print('\nspeed\n', pd.DataFrame({k: v for k,v in r.items() if isinstance(v, dict)}).T.to_string())

if __name__=='__main__':
    from moe_fuse.calibration import *
    from transformers import TrainerCallback
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('args', nargs='+', help='TEACHER DATA OUT, or OUTs alone'); p.add_argument('--only', default='main'); p.add_argument('--seeds', default='0,1,2')
    p.add_argument('--keeps', default='0.25,0.125,0.0625'); p.add_argument('--methods', default='slim,reap,hc_smoe,seeds')
    p.add_argument('--kd', type=float, default=1.); p.add_argument('--top-k', type=int, default=256); p.add_argument('--train', default='all')
    p.add_argument('--tokens', type=int, default=20*M); p.add_argument('--lr', type=float, default=1e-3); p.add_argument('--batch-tokens', type=int, default=8192)
    p.add_argument('--calibration-tokens', type=int, default=262144); p.add_argument('--eval-tokens', type=int, default=262144)
    p.add_argument('--minutes', type=float, default=5); p.add_argument('--work', type=Path, default=Path('healing_work')); p.add_argument('--student', action='append', default=[], metavar='NAME=FOLDER')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu'); p.add_argument('--verbose', action='store_true')
    p.add_argument('--live-teacher', action='store_true', help='hold the teacher in memory instead of a cache of its predictions, 130 bytes each')
    a = p.parse_args()
    a.out, a.start, a.students = Path(a.args[-1]), time.time(), dict(s.split('=', 1) for s in a.student)
    alone = all(x.endswith('.json') for x in a.args)
    rows = [r for x in (a.args if alone else a.args[-1:]) if Path(x).exists() for r in json.loads(Path(x).read_text())]
    if not alone:
        if len(a.args)!=3: p.error('TEACHER DATA OUT, or OUTs alone')
        a.teacher, a.data = a.args[0], Path(a.args[1]); a.work.mkdir(exist_ok=True, parents=True)
        only = set(a.only.split(','))
        if 'speed' in only: speed(a, rows)
        if only-{'speed'}: study(a, rows, only)
    tables(rows)
