"""What a run says about itself in its workdir: `run.json` (facts) and `samples.jsonl` (texts).

Keys of `run.json`, all optional, so that a report can be made of whatever is there:

    title             what the run is
    command           the command line that started it
    state             "running", "finished", "preempted", or "failed: <why>"
    total_steps       the step it ends at
    config            the resolved configuration, nested
    versions          package to version
    model, data, compute, mesh, saved     label to value, as in the banner
    data.unigram_entropy   nats per token of the evaluation data under its own token frequencies,
                           a number or evaluation set to number
    data.bytes_per_token   of the evaluation data, a number or evaluation set to number
    stages            [{"name": ..., "first_step": ...}, ...]
    final             metric to value at the end
    warnings          sentences: skipped records, skipped updates, fall-backs
"""

import json
from pathlib import Path
from typing import Any

from tokjax.files import AppendFile, set_aside, write_atomically

RUN_FILE = "run.json"
SAMPLES_FILE = "samples.jsonl"


def read_run(workdir: Path) -> dict[str, Any]:
    """Returns the facts of `workdir/run.json`; empty where it is missing or cannot be read."""
    try:
        facts = json.loads((Path(workdir) / RUN_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def update_run(workdir: Path, **facts: Any) -> None:
    """Sets top-level keys of `workdir/run.json`, keeps the others, and replaces it atomically.

    A file that cannot be read is kept as `run.damaged-1.json`.
    What JSON lacks (paths, types) is written as its string. For one process of a run only.

    Raises:
        StorageError: the file cannot be written; the old one is untouched.
    """
    path, known = Path(workdir) / RUN_FILE, read_run(workdir)
    if not known and path.exists():
        set_aside(path, "damaged")  # whatever it is, it is not ours to overwrite
    write_atomically(path, json.dumps(known | facts, indent=1, default=str) + "\n")


def add_sample(workdir: Path, step: int, prompt: str, text: str) -> None:
    """Appends a generated text to `workdir/samples.jsonl`. For one process of a run only.

    Raises:
        StorageError: the file cannot be written.
    """
    path = Path(workdir) / SAMPLES_FILE
    # A line break before the record too: one that a power loss cut off stays apart from it.
    record = "\n" + json.dumps({"step": int(step), "prompt": prompt, "text": text}) + "\n"
    file = AppendFile(path)
    try:
        file.append(record.encode())
    finally:
        file.close()


def read_samples(workdir: Path) -> list[dict[str, Any]]:
    """Returns the samples by step: {"step", "prompt", "text"}; of a repeated step the last one.

    Lines that are cut off or malformed are left out, empty ones too.
    """
    path = Path(workdir) / SAMPLES_FILE
    samples: dict[tuple[int, str], dict[str, Any]] = {}
    try:
        lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    except OSError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
            step, prompt, text = int(record["step"]), str(record["prompt"]), str(record["text"])
        except (ValueError, KeyError, TypeError):
            continue
        # A run that was killed and resumed samples the same step again: the later one counts.
        samples[step, prompt] = {"step": step, "prompt": prompt, "text": text}
    return sorted(samples.values(), key=lambda sample: sample["step"])
