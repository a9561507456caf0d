"""The lock of a journal: one writer at a time, and none that waits for the dead."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from lightrail_sweeps.journal_lock import JournalLock

WRITER = """
import sys, time
from pathlib import Path
from lightrail_sweeps.journal_lock import JournalLock
journal = Path(sys.argv[1])
lock = JournalLock(journal)
for _ in range(200):
    lock.acquire()
    with open(journal, "r+") as file:
        count = int(file.read().split()[-1])
        file.seek(0)
        file.write(f"{count + 1}\\n")
    lock.release()
"""


def test_one_writes_at_a_time(tmp_path):
    journal = tmp_path / "journal"
    journal.write_text("0\n")
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(journal)]) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert journal.read_text() == "600\n"


def test_a_holder_that_was_killed_is_not_waited_for(tmp_path):
    journal = tmp_path / "journal"
    program = f"from pathlib import Path; import os, signal\nfrom lightrail_sweeps.journal_lock import JournalLock\n" \
        f"JournalLock(Path({str(journal)!r})).acquire(); os.kill(os.getpid(), signal.SIGKILL)"  # fmt: skip
    subprocess.run([sys.executable, "-c", program], check=False)
    link = tmp_path / "journal.link"
    assert link.is_symlink()
    # With this patience the test would never end.
    assert JournalLock(journal, patience=1e9).acquire()
    assert os.readlink(link).split(":")[1] == str(os.getpid())


def test_another_machines_lock_is_respected_for_a_while(tmp_path):
    link = tmp_path / "journal.link"
    link.symlink_to("elsewhere:12:0")
    began = time.monotonic()
    lock = JournalLock(tmp_path / "journal", patience=0.5)
    lock.acquire()
    assert time.monotonic() - began > 0.5
    lock.release()
    assert not link.is_symlink()
