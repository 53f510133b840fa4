"""A tiny BERT, made from transformers' config: attacks on its embeddings are literal ones through ``inputs_embeds``."""

import copy
import runpy

import pytest
import torch
from torch import nn

import conadv_lab as cl
from conadv_lab.integrations.huggingface import TrainerMethod
from tests.docs.pages import ROOT

transformers = pytest.importorskip("transformers", reason="the extra [adapters] is not installed")
pytest.importorskip("accelerate", reason="the extra [adapters] is not installed")

EXAMPLE = ROOT / "docs" / "examples" / "embeddings.py"
CRITERION, LR, EPSILON, STEPS = nn.CrossEntropyLoss(), 0.1, 0.5, 5


def bert() -> nn.Module:
    """Without dropout, which the attack does not see."""
    config = transformers.BertConfig(
        vocab_size=30, num_labels=3, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config).double()


def rows(count: int = 20) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 30, (count, 7), generator=draw)
    lengths = torch.randint(2, 8, (count, 1), generator=draw)
    mask = (torch.arange(7) < lengths).long()
    return [{"input_ids": i, "attention_mask": m, "labels": i[0] % 3} for i, m in zip(ids, mask, strict=True)]


def batches() -> list[dict[str, torch.Tensor]]:
    return list(torch.utils.data.DataLoader(rows(), batch_size=4))  # type: ignore[arg-type]


def loss_of(model: nn.Module, batch, delta=None) -> torch.Tensor:
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    moved = embeddings if delta is None else embeddings + delta
    outputs = model(inputs_embeds=moved, attention_mask=batch["attention_mask"])
    return CRITERION(outputs.logits, batch["labels"])


def ascent(model: nn.Module, batch) -> torch.Tensor:
    delta = torch.zeros(*batch["input_ids"].shape, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss_of(model, batch, delta), delta)
    return EPSILON * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1)


def literal(name: str) -> nn.Module:
    model, snapshots, moved = bert(), [], None
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    for number, batch in enumerate(batches()[:STEPS]):
        snapshots.append(copy.deepcopy(model))
        if name == "recycled":
            before, moved = moved, (batch, ascent(model, batch))
        else:
            stale = snapshots[max(0, number - 1)] if name == "conadv" else model
            before = batch, ascent(stale, batch)
        loss = loss_of(model, batch)
        if before is not None:
            loss = (loss + loss_of(model, *before)) / 2
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return model


def methods():
    attack = cl.PGDAttack(EPSILON, steps=1, norm="l2", bounds=None, random_start=False)
    return {
        "conadv": cl.ConAdv(attack, 1, (0.5, 0.5)),
        "disadv": cl.DisAdv(attack, (0.5, 0.5)),
        "recycled": cl.Recycled(EPSILON, weights=(0.5, 0.5), bounds=None, norm="l2"),
    }


def assert_literal(model: nn.Module, name: str) -> None:
    for (key, value), other in zip(model.named_parameters(), literal(name).parameters(), strict=True):
        assert torch.allclose(value, other, rtol=0, atol=1e-10), key


@pytest.mark.parametrize("name", ["conadv", "disadv", "recycled"])
def test_five_steps_equal_literal_ones(name):
    model, method = bert(), methods()[name]
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    layer = model.get_input_embeddings()
    for step in cl.lookahead(batches(), STEPS, method.lookahead, embeddings=layer):
        method.backward(model, step, CRITERION)
        sgd.step()
        sgd.zero_grad()
    assert_literal(model, name)


class InOrder(TrainerMethod, transformers.Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def test_five_steps_of_the_trainer_equal_literal_ones(tmp_path):
    model = bert()
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, use_cpu=True, report_to=[], max_grad_norm=0.0,
        disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = InOrder(
        method=methods()["conadv"], embeddings=model.get_input_embeddings(), model=model, args=arguments,
        train_dataset=rows(), optimizers=(sgd, torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1.0)),
    )  # fmt: skip
    trainer.train()
    assert_literal(model, "conadv")


def test_the_example_is_short_on_the_page_and_learns(capsys):
    text = EXAMPLE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 40
    assert text in (ROOT / "docs" / "loop.md").read_text(encoding="utf-8")
    runpy.run_path(str(EXAMPLE))
    first, *_, last = capsys.readouterr().out.splitlines()
    assert float(last.split()[1]) < float(first.split()[1])
