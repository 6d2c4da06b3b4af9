"""`python -m bench.study`: a grid of settings on the pocket world (run.py)."""

from bench.study.run import main
from inpo_fast.runtime.errors import run_command

if __name__ == "__main__":
    run_command("python -m bench.study", main)
