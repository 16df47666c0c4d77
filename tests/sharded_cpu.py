"`moe-fuse` with accelerate's FSDP on a CPU, which it otherwise starts on accelerators alone: python -m torch.distributed.run --nproc_per_node 2 tests/sharded_cpu.py heal ..."
import os, sys

import accelerate.state as state

start = state.PartialState.__init__
def init(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if self.distributed_type==state.DistributedType.MULTI_CPU: self.distributed_type = state.DistributedType.MULTI_GPU
state.PartialState.__init__ = init
os.environ |= dict(ACCELERATE_USE_FSDP='true', ACCELERATE_USE_CPU='true', FSDP_VERSION='2', FSDP_AUTO_WRAP_POLICY='TRANSFORMER_BASED_WRAP', FSDP_STATE_DICT_TYPE='SHARDED_STATE_DICT', FSDP_RESHARD_AFTER_FORWARD='true')

from moe_fuse.cli import main
from moe_fuse.heal import HealTrainer

train = HealTrainer.train
def sharded(self, *args, **kwargs):
    assert self.is_fsdp_enabled
    result = train(self, *args, **kwargs)
    assert all(hasattr(p, 'placements') for p in self.model.parameters() if p.requires_grad), 'nothing is sharded'
    return result
HealTrainer.train = sharded

if __name__=='__main__': sys.exit(main())
