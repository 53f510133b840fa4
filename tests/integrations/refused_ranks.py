"""One rank that tries each adapter in a world of two: ``python -m tests.integrations.refused_ranks FOLDER``."""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import conadv_lab as cl


def by_lightning(folder: str) -> None:
    import lightning.pytorch as lightning

    from conadv_lab.integrations.lightning import LightningMethod

    class Module(LightningMethod, lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__(cl.Vanilla(), nn.CrossEntropyLoss())
            self.network = nn.Linear(2, 2)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, module.look_ahead(loader()))


def by_trainer(folder: str) -> None:
    import transformers

    from conadv_lab.integrations.huggingface import TrainerMethod

    class Ours(TrainerMethod, transformers.Trainer):
        pass

    Ours(
        method=cl.Vanilla(),
        model=nn.Linear(2, 2),
        args=transformers.TrainingArguments(folder, use_cpu=True, report_to=[]),
    )


def by_accelerate(_folder: str) -> None:
    import accelerate

    from conadv_lab.integrations.accelerate import look_ahead

    look_ahead(accelerate.Accelerator(cpu=True), loader(), cl.Vanilla())


def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.rand(8, 2), torch.zeros(8).long()), batch_size=2)


def main() -> None:
    for trial in (by_accelerate, by_trainer, by_lightning):
        try:
            trial(sys.argv[1])
        except ValueError as error:
            print(f"{trial.__name__}: {error}", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
