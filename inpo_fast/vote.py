"""Vote blind on pairs of pictures in the browser; the votes become preference pairs that training reads.

    python -m inpo_fast.vote --pictures runs/compare --models base ours --output votes.parquet
    python -m inpo_fast.vote --source PATH --output votes.parquet

The first votes on pictures of an evaluation, the second on the pairs of a source anew. A small page on this machine
only (127.0.0.1); which side is whose is drawn and never sent to the page. Keys: left and right arrow, t for a tie, s to
skip, u to undo. Every vote is on disk before the next pair is shown; Ctrl-C ends, the same command goes on.

One --output gathers the votes of several calls: on other models, another source, fewer pairs (--limit), of other
voters (--user). Rows of pairs that are not shown stay. A voter is shown what this voter has not voted on, whatever
others said of it: each voter has a row of an own for a pair, with its number in the column user_id.
"""

import sys
from pathlib import Path

from inpo_fast.runtime.arguments import seed, whole
from inpo_fast.runtime.errors import UserError, command_line, run_command
from inpo_fast.runtime.outputs import check_file


def main() -> None:
    parser = command_line("python -m inpo_fast.vote", __doc__)
    parser.add_argument(
        "--pictures", type=Path, help="the --output of inpo_fast.evaluate with several models or judges"
    )
    parser.add_argument("--models", nargs=2, default=[], help="whose pictures; default: the first two")
    parser.add_argument("--source", help="instead of --pictures: pairs, as data.source of the trainer")
    parser.add_argument("--output", type=Path, required=True, help="the .parquet to write, or to add to")
    parser.add_argument("--limit", type=whole(), help="so many pairs; default: all")
    parser.add_argument("--seed", type=seed, default=0, help="of the order and the sides (default 0)")
    parser.add_argument("--user", type=whole(0), default=0, help="the voter's number (default 0)")
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: nobody else can open the page")
    parser.add_argument("--port", type=whole(0, 65_535), default=8765, help="default 8765")
    parser.add_argument("--pixelated", action="store_true", help="show small pictures as squares")
    own = parser.parse_args()
    if (own.pictures is None) == (own.source is None):
        raise UserError("give --pictures FOLDER or --source PATH, one of them")
    check_file("--output", own.output, (".parquet",))
    from inpo_fast.comparison.votes import Votes, cases_of_evaluation, cases_of_source
    from inpo_fast.comparison.voting_page import Server
    from inpo_fast.data.sources import open_source

    if own.pictures is not None:
        cases = cases_of_evaluation(own.pictures, own.models, own.seed)
    else:
        cases = cases_of_source(open_source(own.source), own.seed)
    votes = Votes(cases[: own.limit], own.output, own.user)
    try:
        server = Server((own.host, own.port), votes, own.pixelated)
    except (OSError, OverflowError) as problem:
        why = getattr(problem, "strerror", None) or "no port has this number"
        raise UserError(f"--host {own.host} --port {own.port}: {why}; take another port (0: any)") from problem
    if own.host not in ("127.0.0.1", "localhost", "::1"):
        print("warning: everybody who reaches this address can see the pictures and vote", file=sys.stderr)
    if votes.notice:
        print(votes.notice)
    said = f"{votes.done} of {len(votes.cases)} pairs have a vote."
    print(f"{said} Open http://{own.host}:{server.server_port}/ (Ctrl-C ends)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        look = f"python -m inpo_fast.validate --source {own.output}"
        rows = votes.save()
        print(f"\n{rows} pairs in {own.output}; look at them: {look}" if rows else "\nno votes, so no pairs")


if __name__ == "__main__":
    run_command("python -m inpo_fast.vote", main, "the same command goes on")
