"""README.md beside the weights: what they are, how they were made, what is known of them. For people and for the hub.

    python -m inpo_fast.model_card runs/sd15      writes it again, e.g. after another evaluation

Everything in it is read from the run's folder. It claims what evaluation.json says of this very model, no more.
"""

from pathlib import Path

from inpo_fast.runtime.errors import UserError, command_line, run_command
from inpo_fast.runtime.outputs import check_folder


def main() -> None:
    parser = command_line("python -m inpo_fast.model_card", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    own = parser.parse_args()
    if not own.run.is_dir():
        raise UserError(f"{own.run}: no such folder; name the folder of a finished run")
    check_folder("the run", own.run)
    from inpo_fast.handover.model_card import write_cards

    for path in write_cards(own.run):
        print(path)


if __name__ == "__main__":
    run_command("python -m inpo_fast.model_card", main)
