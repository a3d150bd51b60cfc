"""Structured pruning over timm's families: half of every group is removed, and the rest has to compute the same."""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from models.randomize import randomize
from models.timm_networks import example_input, import_timm
from slimgraph.deploy.check_export import check_export
from slimgraph.deploy.onnx import export_onnx
from slimgraph.program.capture import capture
from slimgraph.program.program import Program
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.groups import Groups, find_groups
from slimgraph.pruning.kept import Kept, plan_removal
from slimgraph.pruning.prove import TOLERANCE, largest_difference

# Convolutional networks take any size of picture: a small one tells as much.
# fmt: off
SMALL = (
    "test_mambaout", "regnetx_002", "regnety_002", "regnetz_005", "mobilenetv3_small_050", "lcnet_050", "mnasnet_050",
    "mobilenetv2_050", "tinynet_e", "efficientnet_b0", "efficientnet_lite0", "mixnet_s", "fbnetc_100", "spnasnet_100",
    "hardcorenas_a", "ghostnet_050", "ghostnetv2_100", "ghostnetv3_050", "repghostnet_050", "starnet_s050",
    "convnext_atto", "convnextv2_atto", "rexnet_100", "rexnetr_100", "fasternet_t0", "lcnetv2_small", "resnet10t",
    "resnet18", "resnext26ts", "seresnext26t_32x4d", "ecaresnet26t", "resnetblur18", "resnetaa34d", "resnetrs50",
    "resnetv2_18", "resnetv2_50x1_bit", "resnest14d", "res2net50_14w_8s", "skresnet18", "legacy_seresnet18",
    "densenet121", "dla34", "dla46x_c", "dpn48b", "cspresnext50", "cs3darknet_s", "darknet53", "cspnext_tiny",
    "hrnet_w18_small", "vovnet39a", "ese_vovnet19b_slim_dw", "selecsls42b", "hgnetv2_b0", "nf_regnet_b0",
    "eca_nfnet_l0", "gernet_s", "repvgg_a0", "mobileone_s0", "inception_next_atto", "xception41", "legacy_xception",
    "gcresnext26ts", "lambda_resnet26t", "rdnet_tiny", "tresnet_m", "vgg11_bn", "poolformer_s12", "convformer_s18",
    "efficientvit_b0", "repvit_m0_9", "shvit_s1", "mobilenetv4_conv_small", "edgenext_xx_small", "swiftformer_xs",
    "iformer_t", "lowformer_b0", "focalnet_tiny_srf", "inception_v3", "inception_v4", "convmixer_768_32",
)
FIXED = (
    "vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit3_small_patch16_224", "test_vit_relpos", "mixer_s32_224",
    "gmlp_ti16_224", "resmlp_12_224", "gmixer_12_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_ns_224", "cait_xxs24_224", "coat_lite_tiny", "coat_tiny", "convit_tiny", "crossvit_9_240",
    "davit_tiny", "efficientformer_l1", "efficientformerv2_s0", "efficientvit_m0", "eva02_tiny_patch14_224",
    "fastvit_t8", "gcvit_xxtiny", "hiera_tiny_224", "levit_128s", "levit_conv_128s", "maxvit_rmlp_pico_rw_256",
    "coatnet_pico_rw_224", "mobilevit_xxs", "mobilevitv2_050", "mvitv2_tiny", "nest_tiny", "nextvit_small",
    "pit_ti_224", "pvt_v2_b0", "sequencer2d_s", "tiny_vit_5m_224", "tnt_s_patch16_224", "twins_svt_small",
    "twins_pcpvt_small", "visformer_tiny", "vitamin_small_224", "volo_d1_224", "xcit_nano_12_p16_224",
    "samvit_base_patch16_224",
    "beit_base_patch16_224", "botnet26t_256", "halonet26t", "caformer_s18", "efficientvim_m1", "vit_small_r26_s32_224",
)
# fmt: on
SIZE = 96


@dataclass(slots=True)
class Run:
    """What became of a network."""

    name: str
    groups: int = 0
    left: float = 1.0
    error: float = float("nan")
    seconds: float = 0.0
    unknown: Sequence[str] = field(default_factory=tuple)
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether everything ran and the masked program was met."""
        return not self.failure and self.error <= TOLERANCE


def random_program(name: str, *, size: int | None) -> Program:
    """An architecture of timm with random weights and statistics that are alive."""
    torch.manual_seed(0)
    model = import_timm().create_model(name, pretrained=False)
    randomize(model, lambda m: m(example_input(m, batch=2, seed=1, size=size)))
    return capture(model, example_input(model, batch=1, size=size)).eval()


def half(groups: Groups) -> dict[str, tuple[int, ...]]:
    """Half of the indices of every group, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    return {
        group.name: tuple(sorted(torch.randperm(group.size, generator=generator)[: group.size // 2].tolist()))
        for group in groups.groups
    }


def prune_half(name: str, program: Program, *, norm_axes: bool, export: bool) -> Run:
    """Half of every group removed, proved, run with one and with three samples, and exported if wanted."""
    run = Run(name=name)
    start = time.perf_counter()
    groups = find_groups(program, norm_axes=norm_axes)
    run.groups, run.unknown = len(groups.groups), sorted(set(groups.unknown.values()))
    plan = plan_removal(groups, half(groups), norm_axes=norm_axes)
    pruned = apply_pruning(program, plan, proof=False, groups=groups)
    run.seconds = time.perf_counter() - start
    before = sum(parameter.numel() for parameter in program.parameters())
    run.left = sum(parameter.numel() for parameter in pruned.parameters()) / before
    run.error = largest_difference(program, pruned, Kept(groups, plan))
    shape = program.signature.inputs[0].sized({"batch": 1})
    with torch.inference_mode():
        for batch in (1, 3):
            output = pruned(torch.randn(batch, *shape[1:]))
            assert isinstance(output, torch.Tensor)
            assert output.shape[0] == batch
    if export:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pruned.onnx"
            export_onnx(pruned, path)
            check_export(pruned, path, torch.randn(3, *shape[1:]))
    return run


def main() -> None:
    """Run the race and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; all of the list by default")
    parser.add_argument("--export", action="store_true", help="also export, and compare with ONNX Runtime")
    arguments = parser.parse_args()
    names = arguments.names or (*SMALL, *FIXED)
    torch.set_num_threads(1)
    passed = 0
    print(f"{'network':32} {'norm axes':9} {'groups':>6} {'left':>5} {'error':>8} {'s':>5}  ")
    for name in names:
        try:
            program = random_program(name, size=SIZE if name in SMALL else None)
        except Exception as error:
            print(f"{name:32} is not a program: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        runs: list[Run] = []
        for norm_axes in (False, True):
            try:
                if runs and not any(group.normed for group in find_groups(program, norm_axes=True).groups):
                    continue  # no norm, and nothing new
                run = prune_half(name, program, norm_axes=norm_axes, export=arguments.export)
            except Exception as error:  # a race counts whatever goes wrong
                run = Run(name=name, failure=f"{type(error).__name__}: {str(error)[:300]}")
            runs.append(run)
            notes = run.failure or ("" if run.passed else "DIFFERS")
            notes += f" no rule: {', '.join(run.unknown)}" if run.unknown else ""
            print(
                f"{name:32} {'with' if norm_axes else 'without':9} {run.groups:6} {run.left:5.2f} {run.error:8.0e} "
                f"{run.seconds:5.1f}  {notes}",
                flush=True,
            )
        passed += all(run.passed for run in runs)
    print(f"{passed} of {len(names)} pass both with and without norm axes.")


if __name__ == "__main__":
    main()
