"""TensorBoard's scalars of a run, where tensorboard is installed: tensorboard --logdir runs."""

import contextlib


@contextlib.contextmanager
def open_scalars(folder, start=0):
    """Yields a function that writes an entry of the history, its numbers by name. It does nothing where tensorboard isn't installed.

    start: the first epoch that is written; what an interrupted run has written of it and later ones is hidden.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield lambda entry: None
        return

    def write(entry):
        for name, value in entry.items():
            if name != "epoch":
                writer.add_scalar(name, value, entry["epoch"])
        writer.flush()

    with SummaryWriter(folder, purge_step=start) as writer:
        yield write
