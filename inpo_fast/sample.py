"""The base's pictures beside the aligned model's: a contact sheet, same prompts and same initial noise.

python -m inpo_fast.sample --base MODEL --model ALIGNED --prompts prompts.txt --output sheet.png
"""

from pathlib import Path

from inpo_fast.data.text import unusable
from inpo_fast.runtime.arguments import number, seed, whole
from inpo_fast.runtime.errors import UserError, command_line, run_command
from inpo_fast.runtime.files import read_text
from inpo_fast.runtime.outputs import check_file, check_free


def main() -> None:
    parser = command_line("python -m inpo_fast.sample", __doc__)
    parser.add_argument("--base", required=True, help="a diffusers folder, .safetensors file or hub id")
    parser.add_argument("--model", required=True, help="aligned model: the same, or a LoRA (file or folder)")
    parser.add_argument(
        "--single-file-config", help="for a --base in one file: a diffusers folder with its configuration and tokenizer"
    )
    parser.add_argument("--vae", help="another VAE for both: a folder, .safetensors file or hub id")
    parser.add_argument("--prompts", help="text file, one prompt a line")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given again")
    parser.add_argument("--output", required=True, help="the PNG to write")
    parser.add_argument("--overwrite", action="store_true", help="replace another file than an earlier sheet")
    parser.add_argument("--seeds", type=whole(most=10_000), default=1, help="pictures per prompt (default 1)")
    parser.add_argument("--steps", type=whole(most=999), default=50, help="DDIM steps (default 50)")
    parser.add_argument("--guidance", type=number(least=0, most=1000), default=7.5, help="7.5 SD1.5 (default), 5 SDXL")
    parser.add_argument("--batch", type=whole(most=100_000), default=8, help="pictures at once (default 8)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default fp32")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise (default 0)")
    own = parser.parse_args()
    check_file("--output", Path(own.output), (".png",))
    prompts = list(own.prompt)
    if own.prompts:
        try:
            lines = read_text(own.prompts).splitlines()
        except OSError as problem:
            raise UserError(f"--prompts {own.prompts}: {problem.strerror}") from problem
        except UnicodeDecodeError as problem:
            raise UserError(f"--prompts {own.prompts}: not text in UTF-8, one prompt a line") from problem
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError("no prompts: give --prompts FILE or --prompt TEXT")
    for prompt in prompts:
        if wrong := unusable(prompt):
            raise UserError(f"--prompt {prompt!r}: {wrong}")
    from inpo_fast.comparison.drawing import draw_both, open_base
    from inpo_fast.models.loading import open_network, quiet_libraries
    from inpo_fast.models.models import DTYPES
    from inpo_fast.report.pictures import Comparison, contact_sheet, is_sheet
    from inpo_fast.runtime import distributed
    from inpo_fast.runtime.files import write_bytes

    inputs = {"--prompts": own.prompts, "--base": own.base, "--model": own.model, "--vae": own.vae}
    check_free(Path(own.output), own.overwrite, inputs, is_sheet)
    quiet_libraries()
    _, _, device = distributed.start()
    pipeline = open_base("--base", own.base, DTYPES[own.precision], own.single_file_config, "--vae", own.vae).to(device)
    unet = open_network("--model", own.model, pipeline)  # before anything is drawn
    captions = [prompt for prompt in prompts for _ in range(own.seeds)]
    keys = [("sample", own.seed, i, seed) for i in range(len(prompts)) for seed in range(own.seeds)]
    how = {"steps": own.steps, "guidance": own.guidance, "batch": own.batch}
    before, after = draw_both(pipeline, unet, captions, keys, **how)
    sheet = contact_sheet([Comparison(*row) for row in zip(captions, before, after, strict=True)])
    Path(own.output).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(Path(own.output), sheet)
    print(f"{len(captions)} comparisons: {own.output}")


if __name__ == "__main__":
    run_command("python -m inpo_fast.sample", main)
