"""One thread per test process: pytest runs a process per core, and more threads than cores slow each other down."""

import pytest
import torch
from tensorboard.summary.writer import event_file_writer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch):
    """TensorBoard reads the files of one second and process by a count in their names, as text: 10 would precede 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
