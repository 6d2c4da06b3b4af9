import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import train_in

STEPS = 6


@pytest.fixture(scope="session")
def whole(world):
    """An uninterrupted run of one process."""
    return train_in(world, "whole", f"--train.steps={STEPS}")


@pytest.fixture
def disk(tmp_path):
    """A disk of its own: `disk(options)` mounts one and gives its folder."""
    mounted = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(place)
        return place

    if sys.platform != "linux" or not shutil.which("mount"):
        pytest.skip("mounting a disk needs Linux")
    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)
