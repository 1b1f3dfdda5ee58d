"""Make token shards from text, train a tokenizer, or look into a folder of shards.

mor data build text.jsonl.zst shards --tokenizer tokenizer.json
mor data build 'hf://HuggingFaceTB/smollm-corpus:fineweb-edu-dedup?split=train&column=text' shards
mor data build prose=0.7 code=0.3 shards
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SOURCE_HELP = (
    "text, Markdown, JSON lines (.gz, .zst), parquet, a folder of them or one made by save_to_disk,\n"
    "hf://NAME[:CONFIG][?split=S&column=C&revision=R] for a data set of the Hugging Face hub,\n"
    "or 'standard-library'; several as SOURCE=WEIGHT are mixed"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="build|tokenizer|inspect")
    _add_build(actions.add_parser("build", help="text to token shards with a manifest", formatter_class=_Formatter))
    _add_tokenizer(actions.add_parser("tokenizer", help="train a byte-level BPE", formatter_class=_Formatter))
    _add_inspect(actions.add_parser("inspect", help="what a folder of shards holds"))


_Formatter = argparse.RawTextHelpFormatter


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument("--text-field", default="text", help="field or column that holds the text (text)")


def _add_build(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument(
        "--tokenizer", default="byte", metavar="T", help="byte (default), a folder, or a tokenizer.json"
    )
    parser.add_argument("--validation-fraction", type=float, default=0.01, metavar="F", help="of the documents (0.01)")
    parser.add_argument("--shard-tokens", type=int, metavar="N", help="tokens per shard")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that tokenise (one per core)")


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--vocab-size", type=int, default=8192, metavar="N", help="tokens (default 8192)")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--verify", action="store_true", help="read every file and compare it with its hash")
    parser.add_argument("--documents", type=int, default=2, metavar="N", help="beginnings of documents to show (2)")
    parser.add_argument("--speed", action="store_true", help="read batches of 16 x 2,048 as training does, and time it")


def run(arguments: argparse.Namespace) -> None:
    {"build": _build, "tokenizer": _tokenizer, "inspect": _inspect}[arguments.action](arguments)


def _build(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from mor.data.build_progress import BuildProgress
    from mor.data.shards import build_shards
    from mor.data.sources import open_mixture
    from mor.data.tokenizer import load_tokenizer

    options = {"shard_tokens": arguments.shard_tokens} if arguments.shard_tokens is not None else {}
    with BuildProgress(Console(stderr=True)) as progress:
        build_shards(
            open_mixture(arguments.source, text_field=arguments.text_field),
            load_tokenizer(arguments.tokenizer),
            arguments.out,
            validation_fraction=arguments.validation_fraction,
            workers=arguments.workers,
            progress=progress,
            **options,
        )
    _print_manifest(Path(arguments.out))
    if (summary := progress.summary()) is not None:
        print(summary, file=sys.stderr)


def _tokenizer(arguments: argparse.Namespace) -> None:
    from mor.data.sources import open_mixture
    from mor.data.tokenizer import save_tokenizer, train_bpe, vocabulary_size

    if Path(arguments.out).exists():
        raise ValueError(f"{arguments.out} already exists; choose another folder or remove it")
    source = open_mixture(arguments.source, text_field=arguments.text_field)
    tokenizer = train_bpe(source.documents(), arguments.vocab_size)
    save_tokenizer(tokenizer, arguments.out)
    print(f"wrote {arguments.out}: byte-level BPE of {vocabulary_size(tokenizer):,} tokens")


def _inspect(arguments: argparse.Namespace) -> None:
    from mor.data.manifest import read_manifest
    from mor.data.shards import TokenShards

    folder = Path(arguments.folder)
    manifest = read_manifest(folder)
    splits = [TokenShards(folder, split) for split in manifest.splits]
    if arguments.verify:
        for shards in splits:
            shards.verify()
    _print_manifest(folder)
    if arguments.verify:
        print("every file is as it was written")
    tokenizer = splits[0].tokenizer()
    for index in range(min(arguments.documents, len(splits[0]))):
        text = tokenizer.decode(splits[0].document(index, 0, 64))
        print(f"{splits[0].split} document {index}: {text[:160]!r}")
    if arguments.speed:
        print(f"loader: {_tokens_per_second(folder):,.0f} tokens/s")


def _tokens_per_second(folder: Path, *, seconds: float = 5.0) -> float:
    """How fast batches of the training split, document ids included, come out of the loader."""
    import time

    from mor.data.loader import PackedLoader
    from mor.data.shards import TokenShards

    loader = PackedLoader(TokenShards(folder, "train"), batch_size=16, sequence_length=2048, seed=0, document_ids=True)
    next(loader)
    tokens, start = 0, time.monotonic()
    while time.monotonic() - start < seconds:
        tokens += next(loader).input_ids.numel()
    return tokens / (time.monotonic() - start)


def _print_manifest(folder: Path) -> None:
    from mor.data.manifest import read_manifest
    from mor.show.tables import manifest_table
    from mor.show.terminal import make_console

    manifest = read_manifest(folder)
    console = make_console()
    console.print(manifest_table(manifest))
    console.print(
        f"{folder}: vocabulary {manifest.vocabulary_size:,}, {manifest.dtype}, "
        f"tokenizer sha256 {manifest.tokenizer_fingerprint[:16]}",
        style="dim",
    )
