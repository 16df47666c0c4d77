"Runs and teachers that several test files look at."
import pytest
from tiny_models import *

@pytest.fixture(scope='session')
def tiny_teacher(tmp_path_factory): return write(tmp_path_factory.mktemp('teachers')/'v3', *tiny(V3), shards=2)

@pytest.fixture(scope='session')
def texts(tmp_path_factory): return write_texts(tmp_path_factory.mktemp('texts'))

@pytest.fixture(scope='session')
def small(texts):
    "`compress` with little text"
    from moe_fuse.pipeline import compress
    def run(src, out, **kw): return compress(src, out, **dict(calibration=texts[0], eval_data=texts[1], tokens=2048, eval_tokens=2048, quiet=True) | kw)
    return run

@pytest.fixture(scope='session')
def demo_run(tmp_path_factory):
    "The main job on the embedded teacher, with few tokens: (Run, OUT)"
    from moe_fuse.pipeline import compress
    out = tmp_path_factory.mktemp('demo')/'out'
    return compress('demo', out, **DEMO, quiet=True), out
