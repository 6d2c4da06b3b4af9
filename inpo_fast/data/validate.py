"""`python -m inpo_fast.data.validate`, the command's old name: it is `python -m inpo_fast.validate`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("inpo_fast.validate", run_name="__main__")
