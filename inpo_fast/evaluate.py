"""Did the model get better? Paired win-rate of an aligned model against its base, with sanity checks.

    python -m inpo_fast.evaluate --model runs/pocket/model --base <folder or hub id> --output runs/pocket \\
        --config configs/pocket.yaml

Both models draw the same prompts from the same initial noise. A judge compares the two pictures; a win-rate
is wins plus half the ties, its 95 % interval over prompts (all pictures of a prompt together; six at least).

Several models, or several judges, are compared in a table (comparison.md, .json and .html), which goes on where it was
interrupted, also on several processes (torchrun):

    python -m inpo_fast.evaluate --base BASE --model ours=runs/sd15/model --model lora=runs/sd15-lora/lora \\
        --output runs/compare --evaluate.prompts=PartiPrompts.tsv --evaluate.judges='[pickscore, hps-v2.0, clip-h]'
"""

from pathlib import Path

from inpo_fast.runtime.arguments import whole
from inpo_fast.runtime.errors import UserError, command_line, run_command
from inpo_fast.runtime.files import json_or_none
from inpo_fast.runtime.outputs import check_folder

WRITTEN = ("evaluation.json", "samples.png", "report.html", *(f"comparison.{end}" for end in ("json", "md", "html")))


def main() -> None:
    from inpo_fast.config import parse

    parser = command_line("python -m inpo_fast.evaluate", __doc__)
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
    parser.add_argument("--limit", type=whole(), help="so many prompts, spread evenly over the set; default: all")
    own, rest = parser.parse_known_args()
    check_folder("--output", Path(own.output))
    config = parse("python -m inpo_fast.evaluate", rest)
    if config.evaluate.prompts is None:
        raise UserError("evaluate.prompts is empty; give a text file with one prompt a line")
    check_unlike_ours(Path(own.output))
    import torch

    from inpo_fast.comparison.drawing import open_base
    from inpo_fast.comparison.run_comparison import compare, named_models, open_comparison, split_name
    from inpo_fast.comparison.run_evaluation import evaluate, forget
    from inpo_fast.models.loading import open_network, quiet_libraries
    from inpo_fast.models.models import DTYPES
    from inpo_fast.report.comparison import write_comparison
    from inpo_fast.report.results import verdict
    from inpo_fast.report.write import write_report
    from inpo_fast.runtime import distributed
    from inpo_fast.runtime.masking import keep_secrets_of, masked

    quiet_libraries()
    folder, how, models = Path(own.output), config.evaluate, config.models
    key, place = ("--base", own.base) if own.base else ("models.base", models.base)
    single_file_config = own.single_file_config or models.single_file_config
    for text in (place, *(split_name(text)[1] for text in own.model)):
        keep_secrets_of(text or "")
    try:
        rank, _, device = distributed.start(config.train.patience_minutes)
        if len(own.model) > 1 or how.judges or own.limit:
            comparison = open_comparison(named_models(place, own.model), how, own.limit, device)
            base = open_base(key, place, DTYPES[models.precision], single_file_config, "models.vae", models.vae)
            result = compare(comparison, base.to(device), how, folder)
            if rank == 0:
                page = write_comparison(folder, result, comparison)
                print((folder / "comparison.md").read_text(encoding="utf-8"))
                print(f"Report: {page}")
            distributed.barrier()
        else:
            base = open_base(key, place, torch.float32, single_file_config, "models.vae", models.vae).to(device)
            model = split_name(own.model[0])[1]
            evaluation = evaluate(base, open_network("--model", model, base), how, masked(model), folder)
            if rank == 0:
                evaluation.write(folder)
                report = write_report(folder, evaluation)
                print(verdict(evaluation.result))
                print(f"Report: {report}")
            distributed.barrier("report")
            forget(folder)
    finally:
        distributed.stop()


def check_unlike_ours(folder: Path) -> None:
    """UserError where something of the names that are written lies in a folder that no run and no evaluation wrote."""
    known = {"manifest.json": "config_sha256", "evaluation.json": "win_rate", "comparison.json": "sampler"}
    if any(key in (json_or_none(folder / name) or {}) for name, key in known.items()):
        return
    there = [name for name in WRITTEN if (folder / name).exists()]
    if there:
        raise UserError(
            f"--output {folder} holds {', '.join(there)}, which neither a run nor an evaluation left there; move it "
            "away, or name another folder"
        )


if __name__ == "__main__":
    run_command("python -m inpo_fast.evaluate", main, "the same command goes on")
