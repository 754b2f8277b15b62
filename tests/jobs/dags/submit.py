"""Stands in for spark-submit: notes the command line in $NOTES, then does what $NIGHT says.

NIGHT maps a job to {"exit": exit code, "sleep": seconds, "stubborn": whether SIGTERM does not end it}, each a list with
a value for each attempt, the last one for all that follow; and {"event": that it prints, "verdict": of the row of
scoring_runs that it writes}. A job that it does not name exits with 0.
"""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def write_run_row(run_id: str, verdict: str) -> None:
    import pyarrow as pa
    from deltalake import write_deltalake

    row = {
        "run_id": [run_id],
        "verdict": [verdict],
        "published_version": pa.array([8], pa.int64()),
        "finished_at": pa.array([datetime.now(UTC)], pa.timestamp("us", tz="UTC")),
    }
    write_deltalake(Path("tables", "scoring_runs"), pa.table(row), mode="overwrite")


job, arguments = Path(sys.argv[1]).stem, sys.argv[2:]
notes = Path(os.environ["NOTES"])
lines = notes.read_text().splitlines() if notes.exists() else []
num_earlier = sum(json.loads(line)[0] == job for line in lines)
plan: dict[str, Any] = json.loads(os.environ["NIGHT"]).get(job, {})
exit_code, seconds, stubborn = (
    values[min(num_earlier, len(values) - 1)]
    for values in (plan.get("exit", [0]), plan.get("sleep", [0]), plan.get("stubborn", [False]))
)
print(f"{job} says 안녕", flush=True)
if "event" in plan:
    print(json.dumps({"event": plan["event"], "version": 7}), flush=True)
if "verdict" in plan:
    (run_id,) = (word.removeprefix("--run-id=") for word in arguments if word.startswith("--run-id="))
    write_run_row(run_id, plan["verdict"])
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
pids = [os.getpid(), subprocess.Popen(["sleep", str(seconds)]).pid] if seconds else []
with notes.open("a") as file:
    file.write(json.dumps([job, arguments, pids]) + "\n")
time.sleep(seconds)
sys.exit(exit_code)
