"""Did the model get better? Paired win-rate of an aligned model against its base, with guards and a control.

    python -m inpo_fast.evaluate --model runs/pocket/model --base <folder or hub id> --output runs/pocket \
        --config configs/pocket.yaml

Both models draw the same prompts from the same initial noise. A judge compares the two pictures; a win-rate
is wins plus half the ties, its 95 % interval a bootstrap over prompts (all pictures of a prompt together).

Several models, or several judges, are compared in a table (comparison.md, .json and .html), which goes on where it was
interrupted, also on several processes (torchrun):

    python -m inpo_fast.evaluate --base BASE --model ours=runs/sd15/model --model lora=runs/sd15-lora/lora \
        --output runs/compare --evaluate.prompts=PartiPrompts.tsv --evaluate.judges='[pickscore, hps-v2.0, clip-h]'
"""

import argparse
import json
from pathlib import Path

from inpo_fast.config import parse
from inpo_fast.config.run import RunConfig
from inpo_fast.runtime.errors import UserError, run_command


def compare_models(own: argparse.Namespace, config: RunConfig, folder: Path) -> None:
    """Several models or judges: comparison.json, .md and .html."""
    from inpo_fast.comparison import compare
    from inpo_fast.comparison.prompts import read_prompt_set
    from inpo_fast.judges.registry import make_judges
    from inpo_fast.models.models import DTYPES
    from inpo_fast.report.comparison import write_comparison
    from inpo_fast.runtime import distributed

    how = config.evaluate
    models = compare.named_models(own.base or config.models.base, own.model)
    prompts = read_prompt_set(how.prompts, own.limit)
    rank, _, device = distributed.start()
    judges = make_judges(how.judges or [name for name in (how.judge, how.outside_judge) if name], device)
    if not any(judge.name.startswith("scores:") for judge in judges):  # those know only pictures that are drawn
        for judge in judges:
            judge.check(prompts.prompts)
    pipeline = open_base(own, config, DTYPES[config.models.precision]).to(device)
    contest = compare.Contest(prompts, how.seeds, models, judges)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    compare.draw_all(contest, pipeline, how, folder)
    if rank == 0:
        compare.write_pictures_list(contest, folder)
    compare.judge_all(contest, folder, print)
    if rank == 0:
        page = write_comparison(folder, compare.summarise(contest, how), contest)
        print((folder / "comparison.md").read_text(encoding="utf-8"))
        print(f"Report: {page}")
    distributed.barrier()


def open_base(own: argparse.Namespace, config: RunConfig, dtype):
    """The pipeline that all models are compared in."""
    from inpo_fast.models.loading import load_pipeline, load_vae

    key, base = ("--base", own.base) if own.base else ("models.base", config.models.base)
    pipeline = load_pipeline(base, dtype, own.single_file_config or config.models.single_file_config, key=key)
    if config.models.vae:
        pipeline.vae = load_vae(config.models.vae, pipeline).to(dtype)
    return pipeline


def main() -> None:
    from inpo_fast.report.write import write_report

    parser = argparse.ArgumentParser(
        prog="python -m inpo_fast.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        help="a diffusers folder or hub id, a UNet's folder, a .safetensors file, or a LoRA (file or folder); "
        "NAME=PLACE names it; may be given again",
    )
    parser.add_argument("--base", help="what they are compared with; default: models.base of the configuration")
    parser.add_argument(
        "--single-file-config", help="for a --base in one file: a diffusers folder with its configuration and tokenizer"
    )
    parser.add_argument(
        "--output", required=True, help="where everything goes; what is there already is not made again"
    )
    parser.add_argument("--limit", type=int, help="so many prompts, spread evenly over the set; default: all")
    own, rest = parser.parse_known_args()
    config = parse("python -m inpo_fast.evaluate", rest)
    if config.evaluate.prompts is None:
        raise UserError("evaluate.prompts is empty; give a text file with one prompt a line")
    if own.limit is not None and own.limit < 1:
        raise UserError(f"--limit {own.limit}: must be at least 1")
    import torch

    from inpo_fast.comparison.evaluation import evaluate, verdict
    from inpo_fast.models.loading import open_network, quiet_libraries
    from inpo_fast.runtime import distributed
    from inpo_fast.runtime.files import write_text

    quiet_libraries()
    folder = Path(own.output)
    try:
        if len(own.model) > 1 or config.evaluate.judges or own.limit:
            compare_models(own, config, folder)
            return
        rank, _, device = distributed.start()
        base = open_base(own, config, torch.float32).to(device)
        place = own.model[0].partition("=")[2] or own.model[0]
        unet = open_network("--model", place, base)
        evaluation = evaluate(base, unet, config.evaluate, variant=place)
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "evaluation.json", json.dumps(evaluation.result, indent=1))
            report = write_report(folder, evaluation)
            print(verdict(evaluation.result))
            print(f"Report: {report}")
    finally:
        distributed.stop()


if __name__ == "__main__":
    run_command("python -m inpo_fast.evaluate", main)
