"`python -m moe_fuse` is `moe-fuse`."
import sys
from moe_fuse.cli import main

sys.exit(main())
