"""A text file of a gigabyte: read a line at a time, so that a random subset of it costs the memory of that subset."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from test_tools import write_config

ROOT = Path(__file__).parents[1]
ROWS, TEXT = 4_000_000, "a good film with a fresh plot and a very long story " * 5  # 263 bytes a row


@pytest.mark.slow
def test_training_on_a_subset_of_a_gigabyte(tmp_path, tiny_ernie, tiny_task):
    data = tmp_path / "data"
    data.mkdir()
    with open(data / "train.tsv", "w", encoding="utf-8") as file:
        file.write("sentence\tlabel\n")
        for start in range(0, ROWS, 1000):
            file.write("".join(f"{TEXT}\t{('negative', 'positive')[row % 2]}\n" for row in range(start, start + 1000)))
    assert (data / "train.tsv").stat().st_size > 1 << 30
    (data / "dev.tsv").write_text((tiny_task / "dev.tsv").read_text(encoding="utf-8"), encoding="utf-8")
    config = write_config(
        tmp_path / "c.yaml", tiny_ernie, tiny_task, tmp_path / "run", Data={"path": str(data), "train_rows": 64}
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/train.py"), "-c", str(config)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "64 train rows" in done.stdout
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    assert peak_mb < 1200, f"{peak_mb:.0f} MB: the file was held in memory"
