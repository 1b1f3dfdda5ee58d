"""Log-likelihoods from the model and from the engine, against its own probabilities; and the harness on both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mor.commands.tasks import EngineBackend, make_backend
from mor.data.tokenizer import byte_tokenizer
from mor.engine import Engine
from mor.evaluate.backends import Backend, ModelBackend, fit
from mor.evaluate.harness import PAPER_TASKS, adapter, expand_tasks, paper_average, run_harness, split_pair, windows
from mor.model.modeling_mor import MorForCausalLM
from tests.evaluate.models import calibrated, model

BYTES = {"vocab_size": 257, "eos_token_id": 256, "max_position_embeddings": 48}
PAIRS = [([5, 6, 7], [8, 9]), ([1], [2]), ([3, 4, 5, 6, 7, 8], [1, 2, 3]), ([9, 9], [4, 4, 4, 4])]


def both(router: str = "expert_choice", mean_depth: float | None = None) -> list[Backend]:
    built = model(router, **BYTES) if mean_depth is None else calibrated(router, **BYTES)
    options: dict[str, Any] = {"batch_size": 2, "mean_depth": mean_depth, "end_of_text": 256}
    return [make_backend(name, built, byte_tokenizer(), **options) for name in ("model", "engine")]


@pytest.mark.parametrize("router", ["vanilla", "expert_choice", "threshold_choice", "token_choice"])
def test_log_likelihoods_are_the_models(router: str) -> None:
    built = model(router, **BYTES)
    found = ModelBackend(built, end_of_text=256, batch_size=3).loglikelihoods(PAIRS)
    for (context, continuation), (log, greedy) in zip(PAIRS, found, strict=True):
        with torch.no_grad():
            logits = built(torch.tensor([context + continuation]), use_cache=False).logits[0]
        log_TV = logits.log_softmax(-1)[len(context) - 1 : -1]
        assert log == pytest.approx(sum(float(row[t]) for row, t in zip(log_TV, continuation, strict=True)), abs=1e-4)
        assert greedy == (log_TV.argmax(-1).tolist() == continuation)


@pytest.mark.parametrize(("router", "depth"), [("vanilla", None), ("expert_choice", None), ("expert_choice", 1.6)])
def test_engine_and_model_agree(router: str, depth: float | None) -> None:
    ours, engine = both(router, depth)
    for (a, greedy_a), (b, greedy_b) in zip(ours.loglikelihoods(PAIRS), engine.loglikelihoods(PAIRS), strict=True):
        assert a == pytest.approx(b, abs=1e-3)
        assert greedy_a == greedy_b
    assert ours.write([7, 8, 9], 6) == engine.write([7, 8, 9], 6)


def test_a_greedy_continuation_is_called_so() -> None:
    for backend in both():
        best = backend.write([7, 8, 9], 3)
        ((_, greedy),) = backend.loglikelihoods([([7, 8, 9], best)])
        ((_, other),) = backend.loglikelihoods([([7, 8, 9], [*best[:-1], (best[-1] + 1) % 256])])
        assert greedy
        assert not other


def test_long_contexts_are_cut_from_the_left() -> None:
    assert fit(([1, 2, 3, 4], [5, 6]), 4) == ([3, 4, 5, 6], 2)
    with pytest.raises(ValueError, match="at least one token each"):
        fit(([], [1]), 4)
    with pytest.raises(ValueError, match="4 tokens is too long for max_length=4"):
        fit(([1], [2, 3, 4, 5]), 4)
    ours, engine = both()
    long = (list(range(100)), [1, 2])
    short = (list(range(100))[-46:], [1, 2])
    assert ours.loglikelihoods([long]) == ours.loglikelihoods([short])
    assert engine.loglikelihoods([long])[0][0] == pytest.approx(ours.loglikelihoods([long])[0][0], abs=1e-3)


def test_rows_that_cannot_be_scored_are_an_error() -> None:
    built = model(**BYTES)
    with torch.no_grad():
        built.model.norm.weight.fill_(float("nan"))
    backend = make_backend("engine", built, byte_tokenizer(), batch_size=1, mean_depth=None, end_of_text=256)
    with pytest.raises(RuntimeError, match="a row of 5 tokens could not be scored: the logits of the prompt hold NaN"):
        backend.loglikelihoods(PAIRS)


# The harness


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_spaces_belong_to_what_follows() -> None:
    assert split_pair("ab ", "cd", encode, [256]) == (encode("ab"), encode(" cd"))
    assert split_pair("", "cd", encode, [256]) == ([256], encode("cd"))
    assert split_pair(" ", "cd", encode, [256]) == ([256], encode(" cd"))


@pytest.mark.parametrize("length", [1, 46, 47, 48, 100, 141])
def test_windows_predict_every_token_once(length: int) -> None:
    (backend, _), text = both(), list(range(length))
    parts = windows(text, [256], backend)
    assert [token for _, continuation in parts for token in continuation] == text
    assert parts[0][0] == [256]
    assert all(len(context) + len(continuation) <= 48 for context, continuation in parts)
    assert all(context[-1] == continuation[0] - 1 for context, continuation in parts[1:])


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


def test_the_adapter_passes_on_what_the_harness_asks() -> None:
    pytest.importorskip("lm_eval")
    ours, engine = both()
    found = [adapter(backend, byte_tokenizer()) for backend in (ours, engine)]
    requests = [Request("The cat", " sat"), Request("", "on the mat")]
    for a, b in zip(*(lm.loglikelihood(requests) for lm in found), strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-3)
    expected = ours.loglikelihoods([(encode("The cat"), encode(" sat"))])[0]
    assert found[0].loglikelihood(requests)[0] == expected
    rolling = found[0].loglikelihood_rolling([Request("on the mat")])
    assert rolling[0] == pytest.approx(found[0].loglikelihood(requests)[1][0])
    options = {"until": ["\n"], "max_gen_toks": 5}
    assert len({lm.generate_until([Request("The", options)])[0] for lm in found}) == 1
    with pytest.raises(ValueError, match="only greedy"):
        found[0].generate_until([Request("The", {"do_sample": True, "temperature": 1.0})])


def task_folder(folder: Path) -> Path:
    """A task of one's own with local data: which letter follows?"""
    lines = [
        f'{{"question": "{chr(97 + n)}", "choices": ["{chr(98 + n)}", "{chr(104 + n)}zz"], "answer": {n % 2}}}'
        for n in range(12)
    ]
    (folder / "items.jsonl").write_text("\n".join(lines))
    (folder / "letters.yaml").write_text(
        "task: letters\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / 'items.jsonl'}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        "doc_to_choice: choices\n"
        "doc_to_target: answer\n"
        'target_delimiter: ""\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    return folder


@pytest.mark.filterwarnings("ignore")
def test_scores_of_a_local_task_are_equal_from_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    place = task_folder(tmp_path)
    ours, engine = (
        run_harness(backend, byte_tokenizer(), ["letters"], task_folder=place)["letters"] for backend in both()
    )
    assert ours == engine
    assert set(ours) >= {"acc,none", "acc_norm,none"}
    right = 0
    backend = both()[0]
    for n in range(12):
        choices = [chr(98 + n), chr(104 + n) + "zz"]
        logs = [log for log, _ in backend.loglikelihoods([(encode(chr(97 + n)), encode(c)) for c in choices])]
        right += (logs[1] > logs[0]) == bool(n % 2)
    assert ours["acc,none"] == pytest.approx(right / 12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_unknown_tasks_and_missing_data_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    backend, _ = both()
    with pytest.raises(ValueError, match="unknown tasks nothing"):
        run_harness(backend, byte_tokenizer(), ["nothing"])
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(ValueError, match="the data of piqa are not on this machine"):
        run_harness(backend, byte_tokenizer(), ["piqa"])


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"mor\[eval\]"):
        adapter(both()[0], byte_tokenizer())
    with pytest.raises(ImportError, match=r"mor\[eval\]"):
        run_harness(both()[0], byte_tokenizer(), ["letters"])


def test_the_papers_tasks_and_their_average() -> None:
    assert expand_tasks(["cloze", "paper"]) == ["cloze", *PAPER_TASKS]
    results = {name: {metric: 0.5} for name, metric in PAPER_TASKS.items()}
    results["arc_easy"], results["arc_challenge"] = {"acc_norm,none": 0.8}, {"acc_norm,none": 0.4}
    assert paper_average(results) == pytest.approx((5 * 0.5 + 0.6) / 6)
    del results["piqa"]
    assert paper_average(results) is None


def test_the_engine_backend_takes_an_engine() -> None:
    built: MorForCausalLM = model(**BYTES)
    backend = EngineBackend(Engine(built, byte_tokenizer()), built.config, end_of_text=256)
    assert backend.max_length == 48
