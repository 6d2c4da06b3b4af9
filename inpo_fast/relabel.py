"""Preference labels by judges instead of people: any judge, or a vote of several, over any source of pairs.

    python -m inpo_fast.relabel --source PATH --judge pickscore --judge hps-v2.0 --output labels.parquet
    python -m inpo_fast.train --config configs/sd15.yaml --data.source=PATH --data.labels=labels.parquet

Writes a sidecar; the source stays as it is. A judge's label is Bradley-Terry's: an image that scores s better is the
better one with probability sigmoid(s / temperature). Several judges give the mean of their probabilities, or with
--vote majority the share of their votes (section 5.3 and supplement S8 of arXiv 2503.18454 relabel with single judges).
Interrupted, it goes on where it stopped; on several processes with torchrun.
"""

from pathlib import Path
from typing import get_args

from inpo_fast.data.config import DataConfig, Format
from inpo_fast.runtime.arguments import number, whole
from inpo_fast.runtime.errors import UserError, command_line, run_command
from inpo_fast.runtime.outputs import check_file, check_free


def main() -> None:
    from inpo_fast.judges.registry import NAMES

    parser = command_line("python -m inpo_fast.relabel", __doc__)
    parser.add_argument("--source", required=True, help="as data.source of the trainer")
    parser.add_argument("--format", choices=get_args(Format), default="auto", help="as data.format of the trainer")
    parser.add_argument("--images", help="as data.images of the trainer")
    parser.add_argument("--judge", action="append", required=True, help=f"one of {'; '.join(NAMES)}; may be repeated")
    parser.add_argument("--output", required=True, type=Path, help="the sidecar to write (.parquet)")
    parser.add_argument(
        "--temperature",
        action="append",
        type=number(above=0),
        help="one for all judges, or one for each in turn: points of score for odds of e to 1 (default 1)",
    )
    parser.add_argument("--vote", choices=("mean", "majority"), default="mean", help="of several judges (default mean)")
    parser.add_argument("--batch", type=whole(most=100_000), default=64, help="pictures at once (default 64)")
    parser.add_argument("--workers", type=whole(most=1024), default=DataConfig.workers, help="threads that decode")
    parser.add_argument("--overwrite", action="store_true", help="replace labels that are there")
    own = parser.parse_args()
    temperatures = own.temperature or [1.0]
    temperatures = temperatures * len(own.judge) if len(temperatures) == 1 else temperatures
    if len(temperatures) != len(own.judge):
        raise UserError(f"--temperature {own.temperature}: give one, or one for each of {len(own.judge)} judges")
    check_file("--output", own.output, (".parquet",))
    check_free(own.output, own.overwrite, {"--source": own.source})
    config = DataConfig(source=own.source, format=own.format, images=own.images, workers=own.workers)
    from inpo_fast.data.identity import identity_of
    from inpo_fast.data.relabelled import check_replaceable, pair_ids
    from inpo_fast.data.sources import open_source
    from inpo_fast.judges import judge_id
    from inpo_fast.judges.registry import make_judges
    from inpo_fast.judges.relabelling import finish, relabel, report
    from inpo_fast.models.loading import quiet_libraries
    from inpo_fast.runtime import distributed
    from inpo_fast.runtime.masking import masked

    quiet_libraries()
    check_replaceable(own.output, own.source)
    rank, _, device = distributed.start()
    try:
        source = open_source(config.source, config.format, images=config.images)
        pair_ids(source)
        judges = make_judges(own.judge, device, own.batch)
        own.output.parent.mkdir(parents=True, exist_ok=True)
        folder = relabel(source, judges, own.output, config)
        if rank == 0:
            about = {
                "source": masked(own.source),
                "source_identity": identity_of(source),
                "judges": {judge.name: judge_id(judge) for judge in judges},
                "temperatures": temperatures,
                "vote": own.vote,
            }
            report(finish(folder, own.output, judges, temperatures, own.vote, about), judges, own.output)
        distributed.barrier()
    finally:
        distributed.stop()


if __name__ == "__main__":
    run_command("python -m inpo_fast.relabel", main, "the same command goes on")
