"""What an optimizer says of its steps stands among the metrics of a run."""

from __future__ import annotations

import csv
from pathlib import Path

import lightrail


def test_figures_of_the_optimizer_and_of_its_transforms_become_columns(tmp_path: Path) -> None:
    run = lightrail.compose(
        [
            "optimizer=smb",
            "+transform=[clip_norm]",
            "model=mlp",
            "trainer.max_epochs=1",
            "trainer.accelerator=cpu",
            "trainer.log_every_n_steps=5",
            "logger=[csv]",
            f"run.root={tmp_path}",
        ]
    )
    result = run.execute()
    with open(result.folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {float(row["smb/model_step"]) for row in rows if row["smb/model_step"]} <= {0.0, 1.0}
    assert any(row["smb/model_step"] for row in rows)
    assert any(name.startswith("clip_norm/") for name in rows[0])
