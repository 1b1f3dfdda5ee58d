"""The demo: train a small MoR beside its twins on text of this Python, then show what it learned."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from mor.data.shards import TokenShards, write_shards
from mor.data.sources import STANDARD_LIBRARY, open_source
from mor.data.tokenizer import train_bpe
from mor.evaluate.causality import ProbeResult, suffix_probe
from mor.evaluate.perplexity import Quality, measure_quality, token_byte_lengths
from mor.evaluate.routing_report import RoutingReport, routing_report
from mor.evaluate.text import open_rows
from mor.files import remove_folder, write_text
from mor.model.configuration_mor import MorConfig
from mor.model.modeling_mor import MorForCausalLM
from mor.recipes import DEMO_KINDS, DEMO_LENGTH, DEMO_STEPS, DEMO_VOCABULARY, Kind, demo_run
from mor.show.arms import read_arm
from mor.show.comparison import Arm
from mor.show.machine import describe_machine
from mor.show.numbers import count, duration
from mor.show.picture import token_picture
from mor.show.progress import ArmBars
from mor.show.report import BudgetPoint, Report, write_report
from mor.show.stream import Sampling, stream_tokens
from mor.show.tables import comparison_table, quality_table
from mor.show.terminal import depth_histogram, print_stream, score_histograms
from mor.show.tokens import TokenView
from mor.train.loop import TrainResult, train
from mor.train.options import RunOptions

TITLES: dict[Kind, str] = {"mor": "MoR", "vanilla": "vanilla", "recursive": "recursive"}
PROMPT = "The with statement is used to"
CORPUS_BYTES = 4_000_000
PIECE_CHARACTERS = 900
TRAINING_SHARE = 0.6  # of the minutes; the rest is for the text, the measurements and the page
MAX_THREADS = 8  # more of them only wait for each other in models this small


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What `mor demo` may be told.

    `out`: folder of the demo. `minutes`: what all of it may take; slower machines train for fewer steps. `steps`: of
    the MoR arm, instead of a time. `data`: text to train on. `prompt`: what the generated text begins with.
    """

    out: str = "runs/demo"
    minutes: float = 5.0
    steps: int | None = None
    data: str = STANDARD_LIBRARY
    prompt: str = PROMPT
    max_new_tokens: int = 180
    vocab_size: int = DEMO_VOCABULARY
    evaluation_tokens: int = 24576
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"minutes={self.minutes} must be positive")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the trained MoR model did on held-out text: quality by budget, routing, and a text it wrote."""

    budgets: Sequence[Quality]
    routing: RoutingReport
    probe: ProbeResult
    tokens: Sequence[TokenView]


def run_demo(options: DemoOptions, console: Console) -> Path:
    """Run the whole demo and return the path of its page.

    Raises ValueError for a folder that holds something else, KeyboardInterrupt when stopped.
    """
    started, threads = time.monotonic(), torch.get_num_threads()
    try:
        if threads > 1:
            torch.set_num_threads(fastest_threads(min(threads, MAX_THREADS)))
        folder = _clear(Path(options.out))
        shards = _prepare_text(options, folder, console)
        runs = _plan(options, folder, console)
        _train(runs, console)
        arms = _measure_arms(options, runs, console)
        console.print(comparison_table(arms, baseline="vanilla"))
        findings = _study(options, runs["mor"], console)
        facts = _settings(options, runs, shards, findings)
        report = _report(arms, findings, facts, time.monotonic() - started)
        page = write_report(report, folder / "report.html")
        write_text(folder / "tokens.svg", token_picture(findings.tokens, report.num_depths))
    finally:
        torch.set_num_threads(threads)
    _print_end(page, folder, time.monotonic() - started, console)
    return page


def _clear(folder: Path) -> Path:
    """The folder of the demo without what an earlier one left. Raises ValueError if something else is in it."""
    ours = {*DEMO_KINDS, "data", "report.html", "tokens.svg"}
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in ours) if folder.is_dir() else []
    if others or folder.is_file():
        raise ValueError(
            f"{folder} holds {others[0] if others else 'a file'}, which is no demo's; choose another --out"
        )
    for kind in (*DEMO_KINDS, "data"):
        remove_folder(folder / kind)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _prepare_text(options: DemoOptions, folder: Path, console: Console) -> TokenShards:
    is_embedded = options.data == STANDARD_LIBRARY
    source = open_source(options.data, max_bytes=CORPUS_BYTES if is_embedded else None)
    with console.status("reading the text and training a tokenizer on it"):
        documents = list(cut(source.documents(), PIECE_CHARACTERS))
        tokenizer = train_bpe(documents, options.vocab_size)
        manifest = write_shards(documents, tokenizer, folder / "data", validation_fraction=0.04)
    total = {name: sum(getattr(s, name) for s in manifest.splits.values()) for name in ("utf8_bytes", "tokens")}
    origin = "documentation and sources of this Python" if is_embedded else options.data
    console.print(
        f"text  {total['utf8_bytes'] / 1e6:.1f} MB of {origin},\n"
        f"      {count(total['tokens'])} tokens of a {options.vocab_size}-token BPE trained on it"
    )
    return TokenShards(folder / "data", "train")


def cut(documents: Iterable[str], characters: int) -> Iterator[str]:
    """The documents cut at blank lines into pieces of at least `characters`, the last of each excepted.

    A row of a batch then holds several pieces of several documents, without which a batch as small as the demo's would
    speak of one subject at a time.
    """
    for document in documents:
        waiting = ""
        for paragraph in document.split("\n\n"):
            waiting = f"{waiting}\n\n{paragraph}" if waiting else paragraph
            if len(waiting) >= characters:
                yield waiting
                waiting = ""
        if waiting.strip():
            yield waiting


def _plan(options: DemoOptions, folder: Path, console: Console) -> dict[Kind, RunOptions]:
    """The arms' options: as many steps as fit the time, at equal FLOPs."""
    steps = options.steps
    if steps is None:
        with console.status("measuring the speed of this machine"):
            steps = steps_in(60 * options.minutes * TRAINING_SHARE, options.vocab_size)
    runs: dict[Kind, RunOptions] = {kind: _arm_options(options, kind, steps, folder) for kind in DEMO_KINDS}
    tokens = {kind: run.training.steps * run.training.tokens_per_step for kind, run in runs.items()}
    console.print(
        f"plan  equal training FLOPs: MoR reads {count(tokens['mor'])} tokens, its twins {count(tokens['vanilla'])}\n"
    )
    return runs


def _arm_options(options: DemoOptions, kind: Kind, steps: int, folder: Path) -> RunOptions:
    run = demo_run(kind, mor_steps=steps, vocab_size=options.vocab_size)
    return dataclasses.replace(
        run,
        output=str(folder / kind),
        data=dataclasses.replace(run.data, path=str(folder / "data")),
        training=dataclasses.replace(
            run.training,
            seed=options.seed,
            evaluation_tokens=min(run.training.evaluation_tokens, options.evaluation_tokens),
            calibration_tokens=min(run.training.calibration_tokens, options.evaluation_tokens),
        ),
    )


def steps_in(seconds: float, vocab_size: int, *, at_most: int = DEMO_STEPS) -> int:
    """How many MoR steps, with the twins' at equal FLOPs, this machine can take in `seconds`; from 20 to `at_most`."""
    reference = {kind: demo_run(kind, mor_steps=at_most, vocab_size=vocab_size) for kind in DEMO_KINDS}
    whole = sum(run.training.steps * _step_seconds(run) for run in reference.values())
    return max(20, min(at_most, int(at_most * seconds / whole)))


def fastest_threads(most: int) -> int:
    """1 or `most` threads: the number that trains the demo's model faster here and now. Where another process wants the
    cores, threads that wait for each other lose to a single one."""
    run, seconds = demo_run("mor"), {}
    for threads in sorted({1, most}):
        torch.set_num_threads(threads)
        seconds[threads] = _step_seconds(run)
    return min(seconds, key=lambda threads: seconds[threads])


def _step_seconds(run: RunOptions, *, tries: int = 5) -> float:
    """Median time of a training step on random tokens."""
    training = run.training
    model = MorForCausalLM(MorConfig(**run.model)).train()
    rows = torch.randint(model.config.vocab_size, (training.micro_batch_size, training.sequence_length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    times = []
    for _ in range(tries + 2):
        start = time.perf_counter()
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _train(runs: dict[Kind, RunOptions], console: Console) -> dict[Kind, TrainResult]:
    results = {}
    with ArmBars(console) as bars:
        reporters = {kind: bars.add(TITLES[kind], run.training.steps) for kind, run in runs.items()}
        for kind, run in runs.items():
            results[kind] = train(run, progress=reporters[kind])
            if results[kind].interrupted:
                raise KeyboardInterrupt
    return results


def _load(run: RunOptions) -> tuple[MorForCausalLM, Any]:
    from mor.loading import load_model

    return load_model(run.output, device="cpu")


def _rows(options: DemoOptions, run: RunOptions, tokenizer: Any) -> list[torch.Tensor]:
    length, most = run.training.sequence_length, options.evaluation_tokens
    return list(open_rows(run.data.path, tokenizer, batch_size=8, sequence_length=length, max_tokens=most))


def _measure_arms(options: DemoOptions, runs: dict[Kind, RunOptions], console: Console) -> list[Arm]:
    arms = []
    with console.status("measuring on held-out text"):
        for kind, run in runs.items():
            model, tokenizer = _load(run)
            rows = _rows(options, run, tokenizer)
            quality = measure_quality(model, rows, token_bytes=token_byte_lengths(tokenizer))[0]
            arms.append(
                read_arm(Path(run.output), name=kind, title=TITLES[kind], quality=quality, sequence_length=DEMO_LENGTH)
            )
    return arms


def _study(options: DemoOptions, run: RunOptions, console: Console) -> Findings:
    """Measure and show what the MoR model does: budgets, depths, scores, a text."""
    model, tokenizer = _load(run)
    rows = _rows(options, run, tokenizer)
    with console.status("trying other depth budgets"):
        probe = suffix_probe(model, rows[0][0, :128], num_suffixes=64)
        routing = routing_report(model, rows)
        reachable = model.model.recursion.router.calibration_mean_depth  # type: ignore[union-attr]
        asked = [depth for depth in (1.0, 1.5, 2.0, 2.5, 3.0) if reachable[0] <= depth <= reachable[-1]]
        budgets = measure_quality(model, rows, token_bytes=token_byte_lengths(tokenizer), budgets=asked)
    console.print(Text("The same weights at other budgets", "bold"))
    console.print(quality_table(budgets))
    console.print(f"suffix probe: {probe}\n")
    _print_routing(routing, console)
    console.print(Text("\nA text it wrote, every token coloured by its depth\n", "bold"))
    length = options.max_new_tokens
    sampling = Sampling(max_new_tokens=length, min_new_tokens=length, temperature=0.7, top_p=0.9, seed=options.seed)
    views = stream_tokens(model, tokenizer, options.prompt, sampling)
    tokens = print_stream(views, model.config.num_recursions, console=console, notes=console)
    return Findings(budgets=budgets, routing=routing, probe=probe, tokens=tokens)


def _print_routing(routing: RoutingReport, console: Console) -> None:
    console.print(Text("How deep held-out tokens go", "bold"))
    console.print(depth_histogram(routing.depth_counts))
    if routing.recursions:
        console.print(Text("\nRouter scores, and the threshold to go on", "bold"))
        console.print(score_histograms(routing.recursions))


def _report(
    arms: Sequence[Arm], findings: Findings, settings: Mapping[str, Mapping[str, object]], seconds: float
) -> Report:
    return Report(
        title="Mixture-of-Recursions demo",
        lead="A small language model that decides, token by token, how often to apply its own layers, trained from "
        f"scratch beside two twins in {duration(seconds)}.",
        num_depths=len(findings.routing.depth_counts) - 1,
        tokens=findings.tokens,
        text_note="The model was given the words in italics and wrote the rest.",
        arms=arms,
        subject="mor",
        baseline="vanilla",
        depth_counts=findings.routing.depth_counts,
        score_bins=[recursion.bins for recursion in findings.routing.recursions],
        thresholds=[recursion.threshold for recursion in findings.routing.recursions],
        budgets=[_budget_point(quality) for quality in findings.budgets],
        settings=settings,
        footer=f"Quality is causal: {findings.probe}.",
    )


def _budget_point(quality: Quality) -> BudgetPoint:
    return BudgetPoint(
        requested=quality.requested,
        mean_depth=quality.mean_depth,
        bits_per_byte=quality.bits_per_byte,
        kv_bytes_per_token=quality.kv_bytes_per_token,
        flops_per_token=quality.flops_per_token,
    )


def _settings(
    options: DemoOptions, runs: dict[Kind, RunOptions], shards: TokenShards, findings: Findings
) -> Mapping[str, Mapping[str, object]]:
    run = runs["mor"]
    plan = MorConfig(**run.model).depth_plan
    model = {
        "layers": f"{plan.num_layers} = 1 + {plan.num_recursions} x {plan.block_size} + 1 (middle-cycle sharing)",
        "hidden / feed-forward size": f"{run.model['hidden_size']} / {run.model['intermediate_size']}",
        "heads": f"{run.model['num_attention_heads']}, {run.model['num_key_value_heads']} for keys and values",
        "router": "expert-choice, linear, auxiliary loss; capacities 1, 2/3, 1/3",
        "keys and values": "recursion-wise",
    }
    training = {
        "steps": ", ".join(f"{TITLES[kind]} {run.training.steps}" for kind, run in runs.items()),
        "tokens per step": run.training.tokens_per_step,
        "sequence length": run.training.sequence_length,
        "learning rate": f"{run.optimizer.learning_rate:g}, trapezoid",
        "seed": options.seed,
    }
    data = {
        "text": options.data,
        "training tokens": f"{shards.num_tokens:,}",
        "bytes per token": f"{shards.bytes_per_token:.2f}",
        "vocabulary": shards.vocabulary_size,
        "held-out tokens scored": f"{findings.routing.num_tokens:,}",
    }
    return {"Model": model, "Training": training, "Text": data, "Hardware": describe_machine()}


def _print_end(page: Path, folder: Path, seconds: float, console: Console) -> None:
    console.print(
        Text(f"\ndone in {duration(seconds)}; the page with all of it: ", "bold").append(str(page), "underline")
    )
    console.print(f'next: mor generate {folder} "def read" --mean-depth 1.5', style="dim")
