"""Learned rounding from the options that the documents name."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

from slimgraph.errors import ConfigError, closest
from slimgraph.program.program import Program
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.reconstruction import Regions, reconstruct
from slimgraph.quantization.regions import Region

ReconLevel = Literal["layer-wise", "region-wise"]

_QDROP = 0.5


def reconstruct_as_documented(
    program: Program,
    plan: QuantizationPlan,
    batches: Iterable[Any],
    *,
    recon_level: ReconLevel = "layer-wise",
    regions: Sequence[tuple[str, str]] | None = None,
    region_weights_names: Sequence[Sequence[str]] | None = None,
    epochs: int = 20,
    lr: float = 0.1,
    simulate_activation_quant: bool = False,
    batch_size: int = 32,
    samples: int = 1024,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Program, QuantizationPlan]:
    """What `reconstruct` gives for options as `quant_recon_static` and `QuantPost` take them.

    The loss is that of `reconstruct`: the documents' weighs the rounding by 0.1 whatever the scale of the values, with
    an exponent that stays 3.

    Args:
        recon_level: each weight by itself, or regions.
        regions: of "region-wise", the values at the beginning and the end of each; None finds them.
        region_weights_names: the weights to learn in each of `regions`; None learns all.
        epochs: passes over the samples, for each region.
        simulate_activation_quant: round activations while learning, each element in half of the steps.
        batch_size, samples, seed, progress: as for `reconstruct`.
    Raises:
        ConfigError: options that contradict each other; and what `reconstruct` raises.
    """
    if recon_level not in get_args(ReconLevel):
        raise ConfigError(f"recon_level is {recon_level!r}. {closest(recon_level, get_args(ReconLevel))}")
    if recon_level == "layer-wise" and regions is not None:
        raise ConfigError(
            "regions are given, but recon_level is 'layer-wise'. Choose 'region-wise', or leave them out."
        )
    if region_weights_names is not None and len(regions or ()) != len(region_weights_names):
        raise ConfigError(
            f"region_weights_names has {len(region_weights_names)} lists of names for {len(regions or ())} regions; "
            "give one for each."
        )
    chosen: Regions = "layer" if recon_level == "layer-wise" else "block"
    if regions is not None:
        weights = [None] * len(regions) if region_weights_names is None else [*map(tuple, region_weights_names)]
        pairs = zip(regions, weights, strict=True)
        chosen = [Region(inputs=(first,), output=last, weights=names) for (first, last), names in pairs]
    return reconstruct(
        program,
        plan,
        batches,
        regions=chosen,
        epochs=epochs,
        samples=samples,
        batch_size=batch_size,
        lr=lr,
        drop=_QDROP if simulate_activation_quant else 0.0,
        activations=simulate_activation_quant,
        seed=seed,
        progress=progress,
    )
