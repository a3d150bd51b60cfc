"""Training steps as torchao prepares them (pt2e), in its own environment: `torchao_qat_step.py PROGRAM BATCH`.

For each line `float` or `qat` on its input it does one step, and prints the processor's time that it took.
"""

import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version

import torch
from torchao.quantization.pt2e import move_exported_model_to_train
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

warnings.simplefilter("ignore")


def _step(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], float]:
    labels = torch.randint(0, 1000, (len(x),), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)

    def step() -> float:
        begun = time.process_time()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x), labels).backward()
        optimizer.step()
        return time.process_time() - begun

    return step


def main() -> None:
    """Prepare both, then answer line by line."""
    source, batch = sys.argv[1:]
    torch.set_num_threads(1)
    x = torch.load(batch, weights_only=True)
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    plain = torch.export.load(source).module()
    prepared = prepare_qat_pt2e(torch.export.load(source).module(), quantizer)
    move_exported_model_to_train(prepared)
    steps = {"float": _step(plain, x), "qat": _step(prepared, x)}
    print(version("torchao"), flush=True)
    for line in sys.stdin:
        print(steps[line.strip()](), flush=True)


if __name__ == "__main__":
    main()
