"""A trained model or LoRA as the single file that ComfyUI, A1111 and diffusers' `from_single_file` read.

    python -m inpo_fast.export --model runs/sd15/model --output aligned.safetensors [--dtype fp16]
    python -m inpo_fast.export --lora runs/sd15-lora/lora --output aligned-lora.safetensors [--format kohya]

A model's file holds UNet, VAE and text encoders under the names of the original checkpoints (original_keys.py). A LoRA
in any program's names is written in kohya's or diffusers', alpha / rank inside, for readers that know no alpha.
"""

from pathlib import Path

from inpo_fast.runtime.errors import UserError, command_line, run_command
from inpo_fast.runtime.outputs import check_file, check_free

FORMATS = ("kohya", "kohya-diffusers", "diffusers")
FORMAT_HELP = (
    "names of a LoRA: kohya (default; ComfyUI, A1111, Forge, InvokeAI, sd-scripts, OneTrainer); kohya-diffusers, the "
    "same with diffusers' layers (ai-toolkit; InvokeAI and OneTrainer for an XL with other blocks); diffusers"
)


def main() -> None:
    parser = command_line("python -m inpo_fast.export", __doc__)
    parser.add_argument("--model", type=Path, help="a diffusers folder; with --lora the one that it belongs to")
    parser.add_argument("--lora", type=Path, help="a LoRA: its folder or file, in the names of any program")
    parser.add_argument("--output", type=Path, required=True, help="FILE.safetensors")
    parser.add_argument("--format", choices=FORMATS, default="kohya", help=FORMAT_HELP)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: fp16 for a model, fp32 for a LoRA")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    own = parser.parse_args()
    if own.model is None and own.lora is None:
        raise UserError("nothing to export; name a diffusers folder with --model or a LoRA with --lora")
    check_file("--output", own.output, (".safetensors",))
    check_free(own.output, own.overwrite, {"--model": own.model, "--lora": own.lora})
    from inpo_fast.handover.single_file_export import export_lora, export_model
    from inpo_fast.models.loading import quiet_libraries
    from inpo_fast.models.models import DTYPES

    quiet_libraries()
    dtype = DTYPES[own.dtype or ("fp16" if own.lora is None else "fp32")]
    if own.lora is not None:
        count = export_lora(own.lora, own.output, dtype, own.format, own.model)
    else:
        count = export_model(own.model, own.output, dtype)
    print(f"{own.output}: {count} tensors, {dtype}, {own.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command("python -m inpo_fast.export", main)
