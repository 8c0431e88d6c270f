"""A prepared model in transformers' own Trainer."""

import math

import pytest
import torch
from train_command import VOCABULARY, prepared, transformers

import potqat
from potqat.flows import sources


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_three_steps_in_transformers_trainer(tmp_path):
    model = prepared()
    ids = torch.randint(VOCABULARY, (12, 16))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=[{"input_ids": i, "labels": i} for i in ids]
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    assert all(math.isfinite(loss) for loss in logged)
    assert all((before[name] != p).any() for name, p in model.named_parameters())
    model.eval()
    with torch.no_grad():
        fake = model(input_ids=ids).logits
        potqat.convert_(model)
        packed = model(input_ids=ids).logits
    assert (packed - fake).abs().max() < 0.05 * fake.abs().max()  # int8 activations
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(sources.load(sources.find(str(tmp_path / "packed")))(input_ids=ids).logits, packed)
