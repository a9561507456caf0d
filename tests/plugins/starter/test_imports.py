"""What costs seconds to import is imported when it is needed, not before."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from lightrail_starter.data.digits import Digits
from lightrail_starter.data import docs, hub, image_folder, table, text_files
from lightrail_starter.loggers.wandb import Wandb
from lightrail_starter.tasks import classification, language_modeling, regression

Digits().setup("fit")
logger = Wandb(folder="nowhere")
logger.log_hyperparams({"a": 1})
logger.state_dict()
logger.finalize("success")
print(*[name for name in ("sklearn", "wandb", "datasets", "tensorboard") if name in sys.modules])
"""


def test_digits_tasks_and_loggers_import_nothing_heavy():
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
