"On a trained teacher of 20 M parameters, from other people's text: slim loses far less than pruning at the same bytes."
import pytest, torch
from moe_fuse.headers import *
from moe_fuse.pipeline import compress
from tiny_models import *

teacher, data = root.parent/'shared'/'teachers'/'v3-20m-fp8', root.parent/'shared'/'data'
pytestmark = pytest.mark.skipif(not teacher.is_dir() or not data.is_dir(), reason='../shared/teachers/v3-20m-fp8 and ../shared/data are not there')

def files(split): return ','.join(str(f) for f in sorted(data.glob(f'*.{split}.jsonl.gz')))

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A quarter of the bytes, closed form only: an eighth of the calibration tokens that the acceptance has"
    out = tmp_path_factory.mktemp('v3')/'out'
    return compress(teacher, out, keep=.25, calibration=files('train'), tokens=32768, eval_data=files('valid'), eval_tokens=16384, baselines=['reap'], quiet=True), out

def test_slim_loses_at_most_two_thirds_of_what_pruning_loses(run):
    kl = {k: v['mean']['kl'] for k,v in run[0].report['evaluation'].items()}
    assert kl['slim'] <= .65*kl['reap'] and kl['slim'] <= 1.10, kl

def test_it_wins_in_every_domain(run):
    e = run[0].report['evaluation']
    assert set(e['slim'])=={'chat','code','math','other','prose','mean'}
    assert all(e['slim'][d]['loss_student']<e['reap'][d]['loss_student'] and e['slim'][d]['kl']<e['reap'][d]['kl'] for d in e['slim'])

def test_routed_bytes_are_a_quarter(run):
    a, b = inspect(Checkpoint(teacher)), inspect(Checkpoint(run[1]))
    assert b['parameters']['routed experts']*4==a['parameters']['routed experts']
    assert {k: v for k,v in a['parameters'].items() if k!='routed experts'}=={k: v for k,v in b['parameters'].items() if k!='routed experts'}

def test_out_is_stock_and_gives_the_logits(run):
    "Scales of this teacher are no powers of two, so its weights are rounded on the way"
    r, out = run
    n, k = len(r.held), r.held.lengths[-1]
    with torch.no_grad(): assert (stock(out)(r.held.ids[-k:][None]).logits[0]-r.logits['slim'](n-k, n)).abs().max() <= 1e-4
