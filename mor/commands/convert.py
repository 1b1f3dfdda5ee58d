"""Convert checkpoints into models of this project.

mor convert --from llama SRC OUT --num-recursions R      a Hugging Face Llama-family checkpoint (folder or hub name)
mor convert --from official CONFIG.yaml WEIGHTS OUT      a checkpoint of the authors' training code
"""

from __future__ import annotations

import argparse

LLAMA_OPTIONS = ("num_recursions", "sharing", "initialization", "router", "kv_cache", "seed")
OFFICIAL_OPTIONS = ("untied", "tokenizer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="source", choices=("llama", "official"), required=True, help="kind of checkpoint"
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="SRC OUT, or CONFIG.yaml WEIGHTS OUT")
    llama = parser.add_argument_group("for --from llama")
    llama.add_argument("--num-recursions", type=int, metavar="R", help="1: vanilla (default)")
    llama.add_argument("--sharing", help="cycle, middle_cycle, sequence, middle_sequence (default middle_cycle)")
    llama.add_argument(
        "--initialization",
        choices=("stepwise", "average", "lower", "upper", "random"),
        help="which layers the shared block starts from (default stepwise)",
    )
    llama.add_argument(
        "--router", choices=("none", "expert_choice", "threshold_choice", "token_choice"), help="default none"
    )
    llama.add_argument("--kv-cache", choices=("recursion", "shared", "hybrid"), help="default recursion")
    llama.add_argument("--seed", type=int, help="of new router weights and of --initialization random (default 0)")
    official = parser.add_argument_group("for --from official")
    official.add_argument(
        "--untied", choices=("first", "average"), help="accept attention that is not shared, and take this of it"
    )
    official.add_argument("--tokenizer", metavar="DIR", help="tokenizer to copy along (default: beside the weights)")


def run(arguments: argparse.Namespace) -> None:
    is_llama = arguments.source == "llama"
    own, foreign = (LLAMA_OPTIONS, OFFICIAL_OPTIONS) if is_llama else (OFFICIAL_OPTIONS, LLAMA_OPTIONS)
    _refuse(arguments, foreign)
    expected = "SRC OUT" if is_llama else "CONFIG.yaml WEIGHTS OUT"
    if len(arguments.paths) != len(expected.split()):
        raise ValueError(f"--from {arguments.source} takes {expected}; got {len(arguments.paths)} paths")
    options = {name: value for name in own if (value := getattr(arguments, name)) is not None}
    if is_llama:
        from mor.convert.llama import convert_llama as convert
    else:
        from mor.convert.official import convert_official as convert
    from mor.quiet import without_progress_bars

    with without_progress_bars():
        model = convert(*arguments.paths, **options)
    print(_summary(model.config, arguments.paths[-1]))


def _refuse(arguments: argparse.Namespace, foreign: tuple[str, ...]) -> None:
    for name in foreign:
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} does not apply to --from {arguments.source}")


def _summary(config: object, out: str) -> str:
    from mor.model.configuration_mor import MorConfig
    from mor.model.cost import count_parameters
    from mor.show.numbers import count

    assert isinstance(config, MorConfig)
    plan, unique = config.depth_plan, count(count_parameters(config).total)
    shape = f"{config.num_hidden_layers} layers"
    if plan.num_recursions > 1:
        shape = f"{plan.num_unique_layers} unique layers applied as {plan.num_layers} ({config.sharing})"
    return f"wrote {out}: {shape}, {unique} unique parameters, router {config.router}, KV cache {config.kv_cache}"
