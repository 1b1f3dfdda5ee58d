"""lm-evaluation-harness on a backend: an adapter of its `LM` class, and the paper's tasks as a preset.

The harness (extra `eval`) brings tasks, prompts and metrics; `Backend` brings log-likelihoods. Contexts and
continuations are tokenised together and cut where the context ends, as the harness's own Hugging Face model does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mor.evaluate.backends import Backend

MISSING = "tasks of lm-evaluation-harness need the library lm_eval: pip install 'mor[eval]'"
# arXiv 2507.10524: the metric of each task. ARC is the mean of both; MMLU is in its continuation form.
PAPER_TASKS: Mapping[str, str] = {
    "lambada_openai": "acc,none",
    "hellaswag": "acc_norm,none",
    "piqa": "acc_norm,none",
    "winogrande": "acc,none",
    "arc_easy": "acc_norm,none",
    "arc_challenge": "acc_norm,none",
    "mmlu_continuation": "acc,none",
}


def expand_tasks(names: Sequence[str]) -> list[str]:
    """`paper` written out as its tasks; other names as they are."""
    return [task for name in names for task in (PAPER_TASKS if name == "paper" else (name,))]


def run_harness(
    backend: Backend,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_folder: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of each task by name, as the harness writes them (`acc,none`, `acc_stderr,none`, ...).

    `task_folder`: task files (YAML) of one's own. `limit`: items per task. `num_fewshot`: instead of the tasks' own.

    Raises:
        ImportError: lm_eval is not installed.
        ValueError: an unknown task, or one whose data are neither here nor to be had.
    """
    try:
        from lm_eval import evaluator
    except ImportError as error:
        raise ImportError(MISSING) from error
    manager = _find_tasks(tasks, task_folder)
    try:
        found = evaluator.simple_evaluate(
            adapter(backend, tokenizer),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (OSError, ConnectionError) as error:
        raise ValueError(
            f"the data of {', '.join(tasks)} are not on this machine and cannot be downloaded ({error}); "
            "download them once with a network, or give task files with local data by --task-folder"
        ) from error
    results: Any = found["results"] if found is not None and "results" in found else {}
    return {name: _numbers(metrics) for name, metrics in results.items()}


def _find_tasks(tasks: Sequence[str], folder: str | Path | None) -> Any:
    """The harness's task manager: of the folder alone where that has all tasks, since reading its own takes long."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    if folder is not None and not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(folder))
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise ValueError(f"unknown tasks {', '.join(unknown)}; give their files with --task-folder")
    return manager


def paper_average(results: Mapping[str, Mapping[str, float]]) -> float | None:
    """The paper's average: each task once by its metric, ARC as the mean of both; None unless all are there."""
    if not set(PAPER_TASKS) <= set(results):
        return None
    values = {name: results[name][metric] for name, metric in PAPER_TASKS.items()}
    arc = (values.pop("arc_easy") + values.pop("arc_challenge")) / 2
    return (sum(values.values()) + arc) / (len(values) + 1)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if isinstance(value, float) and "," in key}


def adapter(backend: Backend, tokenizer: Any) -> Any:
    """`backend` as a model of the harness. Raises ImportError when lm_eval is not installed."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ImportError(MISSING) from error
    encode: Callable[[str], list[int]] = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    end = [tokenizer.eos_token_id]

    class HarnessModel(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            pairs = [request.args for request in requests]
            return backend.loglikelihoods([split_pair(before, after, encode, end) for before, after in pairs])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            texts = [encode(request.args[0]) for request in requests]
            return [sum(log for log, _ in backend.loglikelihoods(windows(text, end, backend))) for text in texts]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [self._write(*request.args) for request in requests]

        def _write(self, context: str, options: Mapping[str, Any]) -> str:
            if options.get("do_sample") and options.get("temperature", 0.0) > 0:
                raise ValueError("only greedy generation is offered; the task asks for do_sample")
            longest = min(int(options.get("max_gen_toks", 256)), backend.max_length - 1)
            text = tokenizer.decode(backend.write(encode(context) or end, longest))
            until = options.get("until", [])
            for stop in [until] if isinstance(until, str) else until:
                text = text.partition(stop)[0] if stop else text
            return text

    return HarnessModel()


def split_pair(
    context: str, continuation: str, encode: Callable[[str], list[int]], end: list[int]
) -> tuple[list[int], list[int]]:
    """Both as tokens of the whole text; spaces at the end of the context move to the continuation."""
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    if not kept:
        return end, encode(continuation)
    whole, before = encode(kept + continuation), encode(kept)
    return whole[: len(before)], whole[len(before) :]


def windows(text: list[int], end: list[int], backend: Backend) -> list[tuple[list[int], list[int]]]:
    """The text in runs that fit, each predicted from as many tokens before it as fit beside it; an end-of-text token
    comes first."""
    whole, size = [*end, *text], backend.max_length - 1
    starts = range(1, len(whole), size)
    return [(whole[max(0, min(s, len(whole) - size) - 1) : s], whole[s : s + size]) for s in starts]
