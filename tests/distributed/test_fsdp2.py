"""Split states against FSDP2 (torch's fully_shard) and against plain sums, on three processes: rows do not divide."""

from distributed import fsdp2_oracle
from tiny_runs import Forked, free_port
from tiny_world import save_pairs


def test_split_states_equal_fsdp2(tmp_path):
    pairs = save_pairs(tmp_path / "pairs.parquet")
    meeting = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [Forked(tmp_path / f"{rank}", fsdp2_oracle.main, pairs, RANK=f"{rank}", **meeting) for rank in range(3)]
    ends = [process.wait() for process in processes]
    assert ends == [0, 0, 0], [process.complaints.read_text() for process in processes]
    assert processes[0].said.read_text().strip().splitlines()[-1] == "equal"
