"""What a forked process finds imported. Garbage is not looked for while this is done, nor among these modules later."""

import gc

gc.disable()

import tiny_runs  # noqa: E402, F401

from inpo_fast.comparison import run_evaluation  # noqa: E402, F401
from inpo_fast.cost import plan  # noqa: E402, F401
from inpo_fast.training import loop, set_up  # noqa: E402, F401

gc.freeze()
gc.enable()
