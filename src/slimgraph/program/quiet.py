"""Keep PyTorch's account of a failure off the terminal, where our own message says what matters of it."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO

# Loggers of torch.export that print a page before it raises.
_TALKATIVE = ("torch.export._trace", "torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")


@contextmanager
def quiet_export() -> Iterator[None]:
    """While torch.export runs: nothing of its graphs and logs is printed if it fails, and what others print if not."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    disabled = [logger.disabled for logger in loggers]
    printed = StringIO()
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings(), redirect_stderr(printed):
            # Recurrent modules keep a second list of their weights, which torch.export replaces and puts back.
            warnings.filterwarnings("ignore", r"The tensor attributes? \S+\._flat_weights\[", UserWarning)
            yield
        sys.stderr.write(printed.getvalue())
    finally:
        for logger, was in zip(loggers, disabled, strict=True):
            logger.disabled = was
