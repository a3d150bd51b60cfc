"""Write the ONNX file of a result, and what it is measured against."""

import os
from functools import partial
from pathlib import Path

from slimgraph.auto.measurements import Judged, judge
from slimgraph.auto.outcome import Progress
from slimgraph.deploy.check_export import check_export
from slimgraph.deploy.onnx import add_tail, export_onnx
from slimgraph.deploy.onnx_tail import check_stitched
from slimgraph.program.program import Program
from slimgraph.report.facts import MetricResult


class ResultFiles:
    """The ONNX file of the result, and the two that are measured: the network, after and before.

    Post-processing is the same after and before, and no float to compare.
    """

    def __init__(
        self,
        program: Program,
        result: Path,
        scratch: Path,
        float_reference: str | os.PathLike[str] | None,
        *,
        narrow: bool,
    ) -> None:
        """Write nothing yet.

        Args:
            program: the original.
            scratch: a folder for what is measured only.
            float_reference: what stands for the original as a file; None writes it.
            narrow: weights of no more than 4 bits take half a byte each.
        """
        self._result, self._narrow = result, narrow
        self.head = result if program.tail is None else scratch / "model.onnx"
        self.reference = scratch / "float.onnx" if float_reference is None else Path(float_reference)
        self._to_export = program if float_reference is None else None

    def export(self, program: Program, say: Progress) -> None:
        """Write what is measured: the network of the program, and of the original."""
        say("Writing ONNX", 0, None)
        export_onnx(program, self.head, with_tail=False, narrow_codes=self._narrow)
        if self._to_export is not None:
            say("Writing the original as ONNX", 0, None)
            export_onnx(self._to_export, self.reference, with_tail=False)
            self._to_export = None

    def write(self, program: Program, how: Judged, say: Progress) -> MetricResult:
        """Write the quantized program as `write_checked` does, and judge it beside the original."""
        self.write_checked(program, how, say)
        return judge(self.reference, self.head, program.signature, how, say)

    def write_checked(self, program: Program, how: Judged, say: Progress) -> None:
        """Write the quantized program as ONNX, and check it.

        Raises:
            ExportError: the file does not compute what the program computes.
        """
        self.export(program, say)
        some = next(iter(how.calibration)).inputs
        check_export(
            program, self.head, some, called=self._result.name, progress=partial(say, "Checking the ONNX file")
        )
        if program.tail is not None:
            say("Putting the post-processing behind", 0, None)
            add_tail(program.tail, self.head, self._result)
            signature = program.signature
            one = {name: x[:1] if name in signature.batched else x for name, x in signature.bind(some).items()}
            check_stitched(self._result, self.head, program.tail, one)
