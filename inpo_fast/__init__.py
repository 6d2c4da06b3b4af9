"""inpo-fast: DDIM-InPO preference alignment of diffusion models, exact and fast."""

import logging
import os

# Both probe for optional packages at import and complain about each that is missing.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
