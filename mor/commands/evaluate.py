"""Measure how well a model predicts held-out text: NLL, bits per byte, perplexity, depth and cost, by depth budget.

The suffix probe comes first: a model whose earlier predictions depend on later tokens is refused, unless top_k
decisions, which do look ahead, are asked for by name. Standard errors are over documents.

--tasks adds accuracies: cloze, next_sentence and agreement are made from --data; all other names, and `paper` for the
paper's tasks, go to lm-evaluation-harness (extra mor[eval]), with task files of your own in --task-folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from mor.commands.common import add_device, depth_list
from mor.loading import load_model

if TYPE_CHECKING:
    import torch

    from mor.evaluate.causality import ProbeResult
    from mor.evaluate.evaluation import Evaluation

PROBE_TOKENS = 128
SIMILARITY_ROWS = 16
PARTS = ("domain", "position", "depth")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder, or folder of a run")
    parser.add_argument("--json", action="store_true", help="print JSON, with all parts of the text")
    add_device(parser)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at a time (default 8)")
    parser.add_argument(
        "--mean-depth", type=depth_list, metavar="M,M,...", help="depth budgets (default: the model's own)"
    )
    parser.add_argument(
        "--probe-suffixes", type=int, default=64, metavar="N", help="suffixes to try first (default 64)"
    )
    _add_text_arguments(parser.add_argument_group("held-out text"))
    _add_task_arguments(parser.add_argument_group("tasks"))


def _add_text_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="token shards, or text, JSON lines, parquet, or 'standard-library'; several are domains",
    )
    group.add_argument("--domain-field", metavar="FIELD", help="field of JSON lines or parquet that names the domain")
    group.add_argument("--decision", choices=("causal", "top_k"), default="causal", help="top_k looks at later tokens")
    group.add_argument("--gap", action="store_true", help="also score under top_k, and tell what it seems to gain")
    group.add_argument("--by", type=_parts, default=[], metavar="PART,...", help=f"tables by {', '.join(PARTS)}")
    group.add_argument(
        "--page", metavar="FILE", help="also write a page: depth by kind of token and place, scores, ..."
    )
    group.add_argument("--max-tokens", type=int, default=262144, metavar="N", help="tokens to score (default 262144)")
    group.add_argument("--sequence-length", type=int, metavar="N", help="tokens per row (default: the model's longest)")
    group.add_argument(
        "--document-masking", action="store_true", help="keep attention inside documents, as the run's option does"
    )


def _add_task_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tasks", type=lambda text: text.split(","), default=[], metavar="T,T,...", help="see above")
    group.add_argument("--backend", choices=("model", "engine"), default="model", help="what answers (default model)")
    group.add_argument("--limit", type=int, metavar="N", help="items per task (default: built-in 500, others all)")
    group.add_argument("--task-folder", metavar="DIR", help="folder of further task files")


def run(arguments: argparse.Namespace) -> None:
    if not arguments.data and not arguments.tasks:
        raise ValueError("mor evaluate: required: --data PATH, or --tasks NAMES, or both")
    model, tokenizer = load_model(arguments.model, device=arguments.device)
    budgets: list[float | None] = arguments.mean_depth or [None]
    if arguments.tasks and len(budgets) > 1:
        raise ValueError(f"--tasks are scored at one budget; --mean-depth gives {len(budgets)}")
    found: dict[str, Any] = {"model": str(arguments.model), "device": str(model.device)}
    if arguments.data:
        found |= _evaluate(arguments, model, tokenizer, budgets)
    if arguments.tasks:
        found |= _run_tasks(arguments, model, tokenizer, budgets[0])
    if arguments.json:
        print(json.dumps(_finite(found), indent=2))


def _evaluate(arguments: argparse.Namespace, model: Any, tokenizer: Any, budgets: list[float | None]) -> dict[str, Any]:
    from mor.evaluate.evaluation import evaluate_text
    from mor.evaluate.perplexity import token_byte_lengths
    from mor.evaluate.text import open_held_out

    text = open_held_out(
        arguments.data,
        tokenizer,
        sequence_length=arguments.sequence_length or model.config.max_position_embeddings,
        max_tokens=arguments.max_tokens,
        domain_field=arguments.domain_field,
    )
    probes = [_probe(model, text.rows_NT[0], arguments, budget) for budget in budgets]
    evaluations = evaluate_text(
        model,
        text,
        token_bytes=token_byte_lengths(tokenizer),
        budgets=budgets,
        decision=arguments.decision,
        batch_size=arguments.batch_size,
        end_of_text=tokenizer.eos_token_id if arguments.document_masking else None,
        with_gap=arguments.gap,
    )
    if arguments.page:
        _write_page(arguments, model, tokenizer, text.rows_NT, budgets[0])
    if not arguments.json:
        _print_tables(probes[0], evaluations, _shown_parts(arguments, len(text.domains)))
    return _as_json(arguments, probes, evaluations)


def _write_page(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, rows_NT: torch.Tensor, budget: float | None
) -> None:
    from mor.evaluate.depth_profile import depth_profile
    from mor.evaluate.kv_similarity import kv_similarity
    from mor.evaluate.recursion_scaling import can_scale, recursion_scaling
    from mor.evaluate.routing_report import routing_report
    from mor.evaluate.token_kinds import KINDS, token_kinds
    from mor.show.profile_page import Profile, write_profile_page

    batches = rows_NT.split(arguments.batch_size)
    profile = Profile(
        model=str(arguments.model),
        data=", ".join(arguments.data),
        num_depths=model.config.num_recursions,
        depths=depth_profile(model, batches, token_kinds(tokenizer), KINDS, mean_depth=budget),
        routing=routing_report(model, batches, mean_depth=budget),
        similarity=kv_similarity(model, rows_NT[:SIMILARITY_ROWS]),
        scaling=tuple(recursion_scaling(model, batches)) if can_scale(model) else (),
    )
    write_profile_page(profile, arguments.page)


def _probe(model: Any, row: torch.Tensor, arguments: argparse.Namespace, budget: float | None) -> ProbeResult:
    """Probe the rule about to be measured. Raises ValueError when a rule that should be causal is not."""
    from mor.evaluate.causality import suffix_probe

    result = suffix_probe(
        model,
        row[:PROBE_TOKENS],
        decision=arguments.decision,
        mean_depth=budget,
        num_suffixes=arguments.probe_suffixes,
    )
    if arguments.decision == "causal" and not result.causal:
        raise ValueError(f"{arguments.model} is refused: under decision='causal' it is {result}")
    return result


def _run_tasks(arguments: argparse.Namespace, model: Any, tokenizer: Any, budget: float | None) -> dict[str, Any]:
    from mor.commands.tasks import as_json, make_backend, run_tasks

    backend = make_backend(
        arguments.backend,
        model,
        tokenizer,
        batch_size=arguments.batch_size,
        mean_depth=budget,
        end_of_text=tokenizer.eos_token_id,
    )
    scores, metrics = run_tasks(
        arguments.tasks,
        backend,
        tokenizer,
        data=arguments.data,
        task_folder=arguments.task_folder,
        limit=arguments.limit,
    )
    if not arguments.json:
        _print_tasks(scores, metrics)
    return {"backend": arguments.backend, "tasks": as_json(scores, metrics)}


def _as_json(arguments: argparse.Namespace, probes: list[ProbeResult], found: list[Evaluation]) -> dict[str, Any]:
    return {
        "data": arguments.data,
        "decision": arguments.decision,
        "document_masking": arguments.document_masking,
        "errors": "standard errors of ratio estimators, documents as clusters",
        "results": [
            {
                **dataclasses.asdict(evaluation.quality),
                "perplexity": evaluation.quality.perplexity,
                "perplexity_95": evaluation.total.perplexity_interval,
                "num_documents": evaluation.total.num_documents,
                "by": {name: [dataclasses.asdict(p) for p in parts] for name, parts in evaluation.parts.items()},
                "gap": None if evaluation.gap is None else dataclasses.asdict(evaluation.gap),
                "probe": {"causal": probe.causal, **dataclasses.asdict(probe)},
            }
            for probe, evaluation in zip(probes, found, strict=True)
        ],
    }


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_tables(probe: ProbeResult, found: list[Evaluation], parts: list[str]) -> None:
    from mor.show.evaluation_tables import evaluation_table, gap_line, parts_table
    from mor.show.terminal import make_console

    console = make_console()
    looks_ahead = " (top_k looks at later tokens: these are not the numbers of a language model)"
    console.print(f"decision: {probe.decision}{looks_ahead if probe.decision == 'top_k' else ''}")
    console.print(f"suffix probe: {probe}", soft_wrap=True)
    console.print(evaluation_table(found))
    for evaluation in found:
        if evaluation.gap is not None:
            console.print(gap_line(evaluation.quality.requested, evaluation.gap), soft_wrap=True)
    for part in parts:
        console.print(parts_table(found, part))


def _print_tasks(scores: list[Any], metrics: dict[str, dict[str, float]]) -> None:
    from mor.evaluate.harness import paper_average
    from mor.show.evaluation_tables import suite_table
    from mor.show.terminal import make_console

    console = make_console()
    if scores:
        console.print(suite_table(scores))
    for task, values in metrics.items():
        shown = [f"{key.partition(',')[0]} {value:.4f}" for key, value in values.items() if "stderr" not in key]
        console.print(f"{task}  {'  '.join(shown)}", soft_wrap=True)
    if (average := paper_average(metrics)) is not None:
        console.print(f"average as in the paper: {average:.4f}")


def _shown_parts(arguments: argparse.Namespace, num_domains: int) -> list[str]:
    return arguments.by or (["domain"] if num_domains > 1 else [])


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if wrong := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not one of {', '.join(PARTS)}")
    return parts
