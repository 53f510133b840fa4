"""A trainer that ends itself by SIGKILL: ``python -m tests.integrations.killed lightning|trainer FOLDER STEP``."""

import os
import signal
import sys
from pathlib import Path

import torch


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    torch.set_num_threads(1)  # as the tests: other threads, other bits
    library, folder, stop = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if library == "lightning":
        from tests.integrations.test_lightning import fitted, lightning

        class Killed(lightning.Callback):
            def on_train_batch_start(self, trainer, *_):
                if trainer.global_step == stop:
                    kill()

        fitted("conadv", folder, 7, callbacks=[Killed()])
    else:
        from tests.integrations.test_huggingface import trainer_of, transformers

        class KilledToo(transformers.TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                if state.global_step == stop:
                    kill()

        trainer = trainer_of("conadv", folder, 7)
        trainer.add_callback(KilledToo())
        trainer.train()


if __name__ == "__main__":
    main()
