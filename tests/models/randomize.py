"""Random parameters and batch-norm statistics under which every part of a network shows in its output."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def _redraw(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    def normal(std: float) -> Tensor:
        return torch.randn(parameter.shape, generator=generator) * std

    matrix = parameter.dim() > 1
    if matrix and "weight" in name:
        value = normal(
            (1.6 / parameter[0].numel()) ** 0.5
        )  # between 1, for linear layers, and 2, for those before ReLU
    elif "bias" in name or matrix:
        value = normal(0.2)
    else:  # a gain: of a norm, or a layer scale that starts near zero and would hide its branch
        value = 0.5 + torch.rand(parameter.shape, generator=generator)
    parameter.copy_(value)


@torch.no_grad()
def randomize(model: nn.Module, run: Callable[[nn.Module], object], *, seed: int = 0) -> nn.Module:
    """Redraw `model` in place and return it in eval mode.

    A network as initialized proves little: gains of residual branches and classifiers start at zero, and batch norm is
    the identity. Here every parameter is drawn anew; then, in `run(model)`, a forward pass, each batch norm takes the
    statistics of what it is given, a little shifted, so that activations neither vanish nor are normalized exactly.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            _redraw(name.rpartition(".")[2], parameter, generator)

    def take_statistics(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        var, mean = torch.var_mean(arguments[0].transpose(0, 1).flatten(1), dim=1)
        shift = torch.randn(mean.shape, generator=generator) * 0.1
        norm.running_mean.copy_(mean + shift * var.sqrt())
        norm.running_var.copy_(var * (0.7 + 0.6 * torch.rand(var.shape, generator=generator)))

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    hooks = [norm.register_forward_pre_hook(take_statistics) for norm in norms]
    model.eval()
    if norms:
        run(model)
    for hook in hooks:
        hook.remove()
    return model


def pictures_of_noise(batch: int, channels: int, height: int, width: int, *, seed: int = 0) -> Tensor:
    """Random pictures (batch, channels, height, width), coarse patches under fine grain, about standard normal.

    White noise would look alike to a network with global pooling; here brightness and pattern differ between pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(batch, channels, 4, 4, generator=generator)
    brightness = torch.randn(batch, channels, 1, 1, generator=generator)
    grain = torch.randn(batch, channels, height, width, generator=generator)
    coarse = nn.functional.interpolate(patches, size=(height, width), mode="bilinear")
    return 0.6 * brightness + 0.8 * coarse + 0.4 * grain


def spread_over_samples(output: Tensor) -> float:
    """Standard deviation of an output (N, …) over samples, averaged over its elements: 0 if it ignores the input."""
    return output.std(dim=0).mean().item()
