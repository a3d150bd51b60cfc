"""What must hold of a program before it is quantized, and the form that quantizers want it in."""

from collections.abc import Sequence
from typing import TypedDict, Unpack

from slimgraph.deploy.targets import Target, resolved_target, target_named
from slimgraph.errors import ProgramError
from slimgraph.program.edit import constant_of
from slimgraph.program.fake_quantize import is_fake_quantized
from slimgraph.program.fold import fold_batch_norm
from slimgraph.program.names import operator_name
from slimgraph.program.program import Program, require_program
from slimgraph.program.qdq import is_quantized
from slimgraph.program.simplify import remove_dropout
from slimgraph.program.spell_attention import spell_out_attention
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.plan import QuantizationPlan


def prepare(program: Program, *, target: str | Target = "onnxruntime") -> Program:
    """The program as quantizers want it: batch norms folded, dropout gone.

    For a target that computes attention in integers it is spelled out, so that quantizers can stand inside; for every
    other one it stays the one operator that runtimes are fastest with.

    Raises:
        UnknownNameError: there is no such target.
    """
    chosen = target_named(target) if isinstance(target, str) else target
    spelled = spell_out_attention(program) if chosen.computes_attention else program
    return remove_dropout(fold_batch_norm(spelled))


def require_float(program: Program) -> None:
    """Return if nothing in the program is quantized yet.

    Raises:
        ProgramError: it is; quantizers behind quantizers would only add up their errors.
    """
    if is_fake_quantized(program.graph):
        raise ProgramError(
            "The program has fake quantizers, for training. Give what `freeze` makes of it to `apply_quantization`, or "
            "quantize the float program that it was made from."
        )
    if is_quantized(program.graph):
        raise ProgramError("The program is quantized already. Give the float one that it was made from.")


def require_finite(program: Program) -> None:
    """Return if every weight is a number: a layer with one NaN or infinity answers nothing else.

    They are allowed where they may be meant, as in a mask: in a buffer that is not the statistics of a batch norm, and
    infinities among nothing but zeros.

    Raises:
        ProgramError: one is not; the message names it.
    """
    parameters = dict(program.named_parameters(remove_duplicate=False))
    for node in program.graph.find_nodes(op="get_attr"):
        tensor = constant_of(program.graph_module, node)
        if tensor is None or not tensor.is_floating_point() or bool(tensor.isfinite().all()):
            continue
        is_statistics = any(operator_name(user.target) == "batch_norm" for user in node.users)
        only_zeros = not bool(tensor.isnan().any() or tensor[tensor.isfinite()].any())
        if is_statistics or (node.target in parameters and not only_zeros):
            wrong = tensor.numel() - int(tensor.isfinite().sum())
            raise ProgramError(
                f"{wrong} of {tensor.numel()} numbers of {str(node.target)!r} are NaN or infinite, so that the program "
                f"cannot answer. Give the weights of a training that did not diverge."
            )


def require_quantizable(program: Program) -> None:
    """Return if the program is one, nothing in it is quantized yet, and every weight is a number.

    Raises:
        ProgramError: it is not so.
    """
    require_program(program)
    require_float(program)
    require_finite(program)


def require_work(plan: QuantizationPlan) -> None:
    """Return if the plan quantizes anything.

    Raises:
        ProgramError: it does not; the message says what stays in float, and why.
    """
    if not plan.activations:
        kept = "; ".join(f"{name}: {why}" for name, why in plan.kept_float.items())
        raise ProgramError(
            f"The target {plan.target} has nothing to quantize in this program{f' ({kept})' if kept else ''}."
        )


class PlanOptions(TypedDict, total=False):
    """What to quantize, and how finely; see `plan_quantization`."""

    skip: Sequence[str]
    operators: Sequence[str] | None
    weight_bits: int | None
    activation_bits: int | None
    weight_per_channel: bool
    dynamic: bool


def prepare_and_plan(
    program: Program, target: str | Target, **options: Unpack[PlanOptions]
) -> tuple[Program, QuantizationPlan]:
    """The program as `prepare` gives it, and where the target wants quantizers in that.

    Args:
        target: "onnxruntime" becomes the variant that is right on this processor; a `Target` stays what it is.
    Raises:
        UnknownNameError, ConfigError: as of `plan_quantization`.
        ProgramError: the program is none, is quantized already, has a weight that is NaN or infinite, or has nothing
            that the target computes in integers.
    """
    require_quantizable(program)
    chosen = resolved_target(target) if isinstance(target, str) else target
    prepared = prepare(program, target=chosen)
    plan = plan_quantization(prepared, target=chosen, **options)
    require_work(plan)
    return prepared, plan
