"""Running a study: what is done is skipped, what was interrupted goes on, each finished run leaves a result.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor.config import to_dict
from mor.data.manifest import read_manifest
from mor.evaluate.evaluation import Evaluation, evaluate_text
from mor.evaluate.perplexity import token_byte_lengths
from mor.evaluate.text import open_held_out
from mor.files import write_json
from mor.loading import load_model
from mor.model.calibrate import can_calibrate
from mor.model.cost import TRAINING_FACTOR, complete_flops, count_parameters
from mor.study.grid import Study, StudyRun
from mor.study.provenance import data_fingerprint, provenance
from mor.train.journal import read_journal
from mor.train.loop import train
from mor.train.options import RunOptions
from mor.train.run_folder import check_same_options

RESULT = "result.json"
VERSION = 1
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class StudyOutcome:
    """How often what happened. `interrupted`: a signal ended the study; run it again to go on."""

    skipped: int = 0
    ran: int = 0
    interrupted: bool = False


def run_study(study: Study, out: Path, data: str, *, tell: Tell = print) -> StudyOutcome:
    """Run what is missing of `study` into folders of `out`.

    Raises:
        ValueError: a folder holds the result of other options or other data, or the data's vocabulary differs from the
            grid's.
    """
    outcome = StudyOutcome()
    vocabulary = read_manifest(data).vocabulary_size
    for number, run in enumerate(study.runs, start=1):
        options = _placed(run, out, data)
        if options.model["vocab_size"] != vocabulary:
            raise ValueError(f"run {run.name} is for {options.model['vocab_size']} tokens, {data} has {vocabulary}")
        if is_done(options):
            outcome = dataclasses.replace(outcome, skipped=outcome.skipped + 1)
            continue
        tell(f"run {number} of {len(study.runs)}: {run.name}, {options.training.steps} steps")
        started = (Path(options.output) / "options.json").exists()
        if train(options, resume=started).interrupted:
            return dataclasses.replace(outcome, interrupted=True)
        write_json(Path(options.output) / RESULT, measure_run(study, run, options))
        outcome = dataclasses.replace(outcome, ran=outcome.ran + 1)
    return outcome


def is_done(options: RunOptions) -> bool:
    """Whether the run's folder holds its result. Raises ValueError when it is of other options or other data."""
    path = Path(options.output) / RESULT
    if not path.is_file():
        return False
    result = json.loads(path.read_text(encoding="utf-8"))
    check_same_options(result["options"], options)
    found, now = result["provenance"]["data"], data_fingerprint(options.data.path)
    if found != now:
        raise ValueError(
            f"{path} is a result on other data (manifest {found[:12]}, now {now[:12]}); choose another --out"
        )
    return True


def measure_run(study: Study, run: StudyRun, options: RunOptions) -> dict[str, Any]:
    """Everything that is kept of a finished run: small enough to lie in a repository, and all that figures need."""
    folder = Path(options.output)
    model, tokenizer = load_model(folder, device=options.training.device)
    config, summary = model.config, json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    length = options.training.sequence_length
    text = open_held_out([options.data.path], tokenizer, sequence_length=length, max_tokens=study.evaluation_tokens)
    depths = study.mean_depths if can_calibrate(model) else ()
    evaluations = evaluate_text(
        model,
        text,
        token_bytes=token_byte_lengths(tokenizer),
        budgets=(None, *(depth for depth in depths if depth <= config.num_recursions)),
        with_gap=True,
    )
    parameters = count_parameters(config)
    return {
        "version": VERSION,
        "study": study.name,
        "arm": run.arm,
        "budget": run.budget,
        "seed": run.seed,
        "provenance": dataclasses.asdict(provenance(options.data.path, model.device)),
        "options": to_dict(options),
        "parameters": {"total": parameters.total, "non_embedding": parameters.unique_non_embedding},
        "training": {
            "tokens": summary["tokens"],
            "seconds": summary["seconds"],
            "flops": TRAINING_FACTOR * complete_flops(config, length) / length * summary["tokens"],
            "peak_memory_gib": (summary["training"] or {}).get("peak_memory_gib"),
        },
        "evaluations": [_evaluation(evaluation) for evaluation in evaluations],
        "curve": _curve(folder / "metrics.jsonl"),
    }


def _evaluation(found: Evaluation) -> dict[str, Any]:
    quality = {name: value if value == value else None for name, value in dataclasses.asdict(found.quality).items()}
    quality["nll_by_depth"] = [value if value == value else None for value in found.quality.nll_by_depth]
    gap = None if found.gap is None else dataclasses.asdict(found.gap)
    return {**quality, "num_documents": found.total.num_documents, "gap": gap}


def _curve(journal: Path) -> list[tuple[int, float]]:
    """Tokens and causal NLL of the evaluations while training."""
    return [
        (record["tokens"], record["decisions"]["causal"]["nll"])
        for record in read_journal(journal)
        if record["kind"] == "evaluation" and "causal" in record["decisions"]
    ]


def _placed(run: StudyRun, out: Path, data: str) -> RunOptions:
    where = dataclasses.replace(run.options.data, path=data)
    return dataclasses.replace(run.options, output=str(out / run.name), data=where)
