"""Writes into docs/onnx.md how many of ONNX's published examples are imported, and the list of operators that are.

The counts are those of the tests: each example that counts as passed is a test that passes, and each that counts as
failed or not applicable one that sees it refused (`tests/test_onnx_node_cases.py`).
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from onnx import defs

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from onnx_examples import (  # noqa: E402
    CASES,
    FAILED,
    NOT_APPLICABLE,
    NOT_WHOLE,
    PASSED,
    failed,
    not_applicable,
    operators,
    stored_inputs,
)
from slimgraph.importers.onnx import (  # noqa: E402
    activation,
    arithmetic,
    attention,
    control,
    convolution,
    indexing,
    losses,
    ngrams,
    normalization,
    quantized,
    recurrent,
    reduction,
    resize,
    sampling,
    sequence,
    shape,
    signals,
)
from slimgraph.importers.onnx.table import OLDEST, OPERATORS  # noqa: E402

PAGE = ROOT / "docs" / "onnx.md"
BEGIN, END = "<!-- written by benchmarks/onnx_coverage.py -->", "<!-- end -->"

FAMILIES = {
    "arithmetic, comparison, logic, rounding, casts": arithmetic.OPERATORS,
    "activations, dropout": activation.OPERATORS,
    "convolutions, pools, matrix products": convolution.OPERATORS,
    "shapes, and what rearranges": shape.OPERATORS,
    "normalizations": normalization.OPERATORS,
    "reductions, sums along an axis, sorting": reduction.OPERATORS,
    "indexing": indexing.OPERATORS,
    "resizing": resize.OPERATORS,
    "sampling, regions, crops": sampling.OPERATORS,
    "signals": signals.OPERATORS,
    "losses": losses.OPERATORS,
    "n-grams of numbers": ngrams.OPERATORS,
    "control flow": control.OPERATORS,
    "recurrent layers": recurrent.OPERATORS,
    "attention, with the domain `ai.onnx.preview`": {
        **attention.OPERATORS,
        **{f"ai.onnx.preview:{name}": operator for name, operator in attention.PREVIEW.items()},
    },
    "sequences inside a model": sequence.OPERATORS,
    "quantized": quantized.OPERATORS,
}
WRITTEN_OUT = "several operators: what ONNX says an operator is made of, and others"

# Operators of ONNX's own domain that are not imported.
NOT_IMPORTED = {
    **dict.fromkeys(
        ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
        NOT_APPLICABLE["random"],
    ),
    **dict.fromkeys(("RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit"), "strings are no tensors"),
    "ImageDecoder": FAILED["ImageDecoder"],
    "NonMaxSuppression": FAILED["NonMaxSuppression"],
}

# Their sizes follow from what they read, which an example gives and a program has to know.
BY_CONTENT = ("Compress", "NonZero", "Unique", "If", "Loop")


def family(case) -> str:
    if len(case.model.graph.node) > 1:
        return WRITTEN_OUT
    (name,) = operators(case)
    return next((family for family, table in FAMILIES.items() if name in table), FAMILY_OF_CONSTANTS)


FAMILY_OF_CONSTANTS = "shapes, and what rearranges"  # `Constant` is a stored tensor and has no operator


def totals() -> tuple[int, int, int]:
    """Passed, failed, not applicable."""
    nothing = sum(not_applicable(case) is not None for case in CASES.values())
    return len(PASSED), len(CASES) - len(PASSED) - nothing, nothing


def rows(header: str, table: Mapping[str, object]) -> Iterator[str]:
    yield from (header, "|---|---:|", *(f"| {name} | {count} |" for name, count in table.items()), "")


def versions(name: str, domain: str) -> tuple[int, int]:
    """The first and the last version of a domain that has an operator; 0 for one that is still there."""
    history = [each for each in defs.get_all_schemas_with_history() if (each.name, each.domain) == (name, domain)]
    newest = max(history, key=lambda schema: schema.since_version)
    return min(each.since_version for each in history), newest.since_version - 1 if newest.deprecated else 0


def operator_table() -> Iterator[str]:
    by_version: dict[int, list[str]] = {}
    for name in sorted({*OPERATORS[""], "Constant"}):
        if not defs.has(name):
            continue  # what ONNX Runtime alone knows
        first, last = versions(name, "")
        by_version.setdefault(max(first, OLDEST), []).append(f"{name} (to {last})" if last else name)
    newest = defs.onnx_opset_version()
    yield from (f"| Versions | {sum(map(len, by_version.values()))} operators |", "|---|---|")
    for first, names in sorted(by_version.items()):
        yield f"| {first}–{newest} | {', '.join(names)} |"
    yield ""


def page() -> str:
    """What belongs between the markers."""
    passed, refused, nothing = totals()
    families = Counter(map(family, PASSED.values()))
    groups = Counter(filter(None, map(not_applicable, CASES.values())))
    failures = Counter(failed(case) for case in CASES.values() if not not_applicable(case) and failed(case))
    stored = [case for case in PASSED.values() if stored_inputs(case)]
    by_content = sum(not operators(case).isdisjoint(BY_CONTENT) for case in stored)
    lines = [
        f"Of {len(CASES)} examples in onnx {onnx.__version__} (operators up to version {defs.onnx_opset_version()}):",
        "",
        "| | |",
        "|---|---:|",
        f"| passed | {passed} |",
        f"| failed | {refused} |",
        f"| not applicable | {nothing} |",
        f"| **passed, of all that are applicable** | **{passed / (passed + refused):.1%}** |",
        "",
        f"In {len(stored)} of the passed, inputs that decide about shapes (axes, sizes, repeats, paddings, scales) "
        "were stored in the model, as exporters write them: a program has to know them. "
        f"In {by_content} of these it is content that decides ({', '.join(f'`{name}`' for name in BY_CONTENT)}); "
        "from a model's inputs these are refused.",
        "",
        *rows("| Passed | |", {name: families[name] for name in (*FAMILIES, WRITTEN_OUT)}),
        *rows(
            "| Failed | |",
            {f"`{group}`: {reason}": failures[group] for group, reason in FAILED.items()} | Counter(NOT_WHOLE.values()),
        ),
        *rows(
            "| Not applicable | |",
            {reason: groups[group] for group, reason in NOT_APPLICABLE.items()},
        ),
        "## Operators of ONNX",
        "",
        f"An operator is imported in every version that has it, from version {OLDEST} of the set on.",
        "",
        *operator_table(),
        "Not imported:",
        "",
        "| Operator | Why |",
        "|---|---|",
        *(f"| {name} | {reason} |" for name, reason in sorted(NOT_IMPORTED.items())),
        "",
        "## Operators of com.microsoft",
        "",
        f"Version 1, {len(OPERATORS['com.microsoft'])} operators: {', '.join(sorted(OPERATORS['com.microsoft']))}.",
        "",
        "In ONNX's own domain, ONNX Runtime also writes "
        f"{', '.join(sorted(name for name in OPERATORS[''] if not defs.has(name)))}.",
    ]
    return "\n".join(lines)


def between_markers(text: str) -> str:
    return text.split(BEGIN)[1].split(END)[0].strip("\n")


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{page()}\n\n{END}{rest.partition(END)[2]}", "utf-8")
    print("{} passed, {} failed, {} not applicable".format(*totals()))
