"""`python -m bench.step`: our optimizer step against what others run (train_step.py)."""

from bench.step.train_step import main
from inpo_fast.runtime.errors import run_command

if __name__ == "__main__":
    run_command("bench.step", main)
