"""The rest of the Hugging Face house: Trainer, PEFT, remote code."""

import subprocess
import sys

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.tiny import random_ids, tiny_model

ROWS = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in random_ids(8, 16)]


@pytest.mark.parametrize("router", ["none", "expert_choice", "threshold_choice", "token_choice"])
def test_trainer_trains_and_evaluates(router, tmp_path):
    model = tiny_model(router=router, sharing="middle_cycle")
    before = model.model.recursion.block[0].mlp.up_proj.weight.clone()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS)
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0
    assert not torch.equal(before, model.model.recursion.block[0].mlp.up_proj.weight)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks the old name
def test_peft_adapts_the_shared_block_and_generates():
    peft = pytest.importorskip("peft")
    model = tiny_model(router="expert_choice")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    ids = random_ids(1, 8)
    adapted.train()(input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert len(trained) == 2 * 2 * model.config.depth_plan.num_unique_layers and all("lora" in name for name in trained)
    assert adapted.eval().generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (1, 11)


def test_the_model_package_ships_as_remote_code(tmp_path):
    script = f"""
import torch
from tests.tiny import random_ids, tiny_model
from mor.model.configuration_mor import MorConfig
from mor.model.modeling_mor import MorForCausalLM
MorConfig.register_for_auto_class()
MorForCausalLM.register_for_auto_class("AutoModelForCausalLM")
model = tiny_model(router="expert_choice")
model.save_pretrained({str(tmp_path / "model")!r})
torch.save(model(random_ids(1, 9)).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    load = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True).eval()
assert not any(name == "mor" or name.startswith("mor.") for name in sys.modules)
ids = torch.randint(1, 64, (1, 9), generator=torch.Generator().manual_seed(0))
torch.testing.assert_close(model(ids).logits, torch.load({str(tmp_path / "logits.pt")!r}, weights_only=True))
"""
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", load], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
