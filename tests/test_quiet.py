"""What PyTorch prints about its own failures does not reach the terminal; what others print does."""

import sys
import warnings

import pytest
import torch

from slimgraph.program.quiet import quiet_export


class Decides(torch.nn.Module):
    def forward(self, x):
        return x + 1 if x.sum().item() > 0 else x


def test_a_failing_export_prints_nothing(capfd):
    with pytest.raises(RuntimeError, match="data-dependent"), quiet_export():
        torch.export.export(Decides(), (torch.ones(3),), strict=False)
    assert capfd.readouterr() == ("", "")


def test_what_the_module_itself_prints_is_printed(capfd):
    with quiet_export():
        print("note", file=sys.stderr)
    assert capfd.readouterr().err == "note\n"


def test_other_warnings_are_given():
    with pytest.warns(UserWarning, match="mine"), quiet_export():
        warnings.warn("mine", UserWarning, stacklevel=1)
