"""Pixels on their way to a GPU: the same bits in whatever order they are asked for, and no buffer filled too early.

torch's streams and events are pretended, but for the last test, which wants a GPU.
"""

import threading
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch

from conadv_lab.data import transfer
from conadv_lab.data.transfer import BUFFERS, Sender
from tests.data.test_imagenet import seen, stream_for
from tests.data.trees import write_tree


@pytest.fixture
def events(monkeypatch) -> list[Mock]:
    """All events that were recorded, in order; the sender's tensors stay on the CPU."""
    recorded: list[Mock] = []

    def event() -> Mock:
        recorded.append(Mock())
        return recorded[-1]

    monkeypatch.setattr(torch.cuda, "Stream", Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.Tensor, "record_stream", Mock())
    return recorded


def test_a_buffer_is_filled_again_only_after_its_copy_has_arrived(events):
    sender = Sender(torch.device("cpu"))
    batches = [torch.full((2, 4, 4, 3), n, dtype=torch.uint8).permute(0, 3, 1, 2) for n in range(BUFFERS + 2)]
    sent = [sender.begin(lambda batch=batch: batch).taken() for batch in batches]
    assert all(map(torch.equal, sent, batches))
    assert sent[0].stride() == batches[0].stride()
    assert [event.synchronize.call_count for event in events] == [1, 1, 0, 0, 0]
    assert torch.cuda.current_stream().wait_event.call_count == len(batches)


def test_the_thread_that_trains_copies_nothing(events, monkeypatch):
    fillers = []
    filled = transfer._Buffer.filled

    def noted(*words, **more):
        fillers.append(threading.current_thread())
        return filled(*words, **more)

    monkeypatch.setattr(transfer._Buffer, "filled", noted)
    Sender(torch.device("cpu")).begin(lambda: torch.zeros(3)).taken()
    assert fillers
    assert threading.main_thread() not in fillers


def test_what_cannot_be_read_is_told_where_it_is_wanted(events):
    def broken() -> torch.Tensor:
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        Sender(torch.device("cpu")).begin(broken).taken()


def test_a_stream_of_photographs_sends_ahead_and_gives_the_same_images(events, tmp_path):
    """With a look-ahead and the step before, so that two readers alternate and slots are taken away and used again."""
    write_tree(tmp_path)
    words = {"workers": 1, "mixup": 0.2}
    plain = stream_for(tmp_path, steps=3, **words)
    ahead = stream_for(tmp_path, steps=3, **words)
    ahead._sender = Sender(torch.device("cpu"))
    try:
        assert seen(ahead) == seen(plain)
        asked = sum(len(ahead.own_spans(n)) for n in (1, 2, 0, 1, 2, 0, 1))
        assert len(events) >= asked, "nothing was sent by the sender"
        sendings = [held.sending for held in ahead._held.values()]
        assert sum(sending is not None for sending in sendings) <= 2, (
            "more is on the GPU than two readers want next"
        )
    finally:
        for stream in (plain, ahead):
            stream.images.readers.close()


@pytest.mark.gpu
def test_on_a_gpu_every_batch_arrives_as_it_was():
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 256, (64, 64, 64, 3), generator=draw, dtype=torch.uint8) for _ in range(8)]
    sender = Sender(torch.device("cuda"))
    sendings = [sender.begin(lambda batch=batch: batch.permute(0, 3, 1, 2)) for batch in batches]
    for sending, batch in zip(sendings, batches, strict=True):
        assert torch.equal(sending.taken().cpu(), batch.permute(0, 3, 1, 2))
