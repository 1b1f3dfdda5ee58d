"""Measure how well a model predicts held-out text: NLL, bits per byte, perplexity, depth and cost, by depth budget.

The suffix probe comes first: a model whose earlier predictions depend on later tokens is refused, unless top_k
decisions, which do look ahead, are asked for by name.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from mor.commands.common import add_device, depth_list
from mor.loading import load_model

if TYPE_CHECKING:
    import torch

    from mor.evaluate.causality import ProbeResult
    from mor.evaluate.perplexity import Quality

PROBE_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder, or folder of a run")
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="token shards, or text, JSON lines, parquet, or 'standard-library'",
    )
    parser.add_argument(
        "--mean-depth", type=depth_list, metavar="M,M,...", help="depth budgets (default: the model's own)"
    )
    parser.add_argument("--decision", choices=("causal", "top_k"), default="causal", help="top_k looks at later tokens")
    parser.add_argument("--max-tokens", type=int, default=262144, metavar="N", help="tokens to score (default 262144)")
    parser.add_argument(
        "--sequence-length", type=int, metavar="N", help="tokens per row (default: the model's longest)"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at a time (default 8)")
    parser.add_argument(
        "--document-masking", action="store_true", help="keep attention inside documents, as the run's option does"
    )
    parser.add_argument(
        "--probe-suffixes", type=int, default=64, metavar="N", help="suffixes to try first (default 64)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    from mor.evaluate.perplexity import measure_quality, token_byte_lengths
    from mor.evaluate.text import open_rows

    model, tokenizer = load_model(arguments.model, device=arguments.device)
    length = arguments.sequence_length or model.config.max_position_embeddings
    batches = open_rows(
        arguments.data,
        tokenizer,
        batch_size=arguments.batch_size,
        sequence_length=length,
        max_tokens=arguments.max_tokens,
    )
    rows = list(batches)
    budgets = arguments.mean_depth or [None]
    probes = [_probe(model, rows[0][0], arguments, budget) for budget in budgets]
    results = measure_quality(
        model,
        rows,
        token_bytes=token_byte_lengths(tokenizer),
        budgets=budgets,
        decision=arguments.decision,
        end_of_text=tokenizer.eos_token_id if arguments.document_masking else None,
    )
    if arguments.json:
        print(json.dumps(_as_json(arguments, probes, results), indent=2))
    else:
        _print_table(probes[0], results)


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


def _as_json(arguments: argparse.Namespace, probes: list[ProbeResult], results: list[Quality]) -> dict[str, Any]:
    return {
        "model": str(arguments.model),
        "data": str(arguments.data),
        "decision": arguments.decision,
        "document_masking": arguments.document_masking,
        "results": [
            {**dataclasses.asdict(quality), "perplexity": quality.perplexity, "probe": _probe_json(probe)}
            for probe, quality in zip(probes, results, strict=True)
        ],
    }


def _probe_json(probe: ProbeResult) -> dict[str, Any]:
    return {"causal": probe.causal, **dataclasses.asdict(probe)}


def _print_table(probe: ProbeResult, results: list[Quality]) -> None:
    from mor.show.tables import quality_table
    from mor.show.terminal import make_console

    console = make_console()
    looks_ahead = " (top_k looks at later tokens: these are not the numbers of a language model)"
    console.print(f"decision: {probe.decision}{looks_ahead if probe.decision == 'top_k' else ''}")
    console.print(f"suffix probe: {probe}")
    console.print(quality_table(results))
