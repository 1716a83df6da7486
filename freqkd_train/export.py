"""What a run leaves for others: the plain student, the adapters, ONNX, and the model card.

Nothing of the training is in them: a student loads by timm alone.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from freqkd_analysis import demo, schema
from freqkd_analysis.errors import CheckFailed, FreqkdError
from freqkd_analysis.runfolder import measured, number
from freqkd_train import student as students

STUDENT, ADAPTER, ONNX, CARD = "student.safetensors", "adapter", "student.onnx", "model_card.md"
ONNX_TOLERANCE = 1e-4
"""Largest difference to torch, relative to the largest feature."""


def save(model: nn.Module, state: Mapping[str, Tensor], out: Path) -> None:
    """out/student.safetensors in timm's keys, and out/adapter when the student was trained by LoRA."""
    students.write(state, out / STUDENT)
    if students.has_lora(model):
        students.save_adapter(model, out / ADAPTER)


def loading_lines(name: str, size: Sequence[int], fixed: bool) -> str:
    """The lines that load the student as `model`, for the model card.

    Example:
        >>> print(loading_lines("resnet50.a1_in1k", (224, 224), False))
        import timm
        <BLANKLINE>
        model = timm.create_model("resnet50", num_classes=0, checkpoint_path="student.safetensors")
    """
    if name == demo.NAME:  # not timm's
        return ("from freqkd_analysis import models\n\n"
                f'model = models.create("{name}", "{STUDENT}", ({size[0]}, {size[1]})).model')  # fmt: skip
    sized = f", img_size=({size[0]}, {size[1]})" if fixed else ""
    call = f'timm.create_model("{name.split(".")[0]}", num_classes=0{sized}, checkpoint_path="{STUDENT}")'
    return f"import timm\n\nmodel = {call}"


def fixed_size(model: nn.Module) -> bool:
    """Whether timm's constructor must be told the input size: the network holds a position embedding of its grid."""
    return getattr(getattr(model, "patch_embed", None), "img_size", None) is not None


def check_onnx() -> None:
    """Raises FreqkdError, with what to install, where a package is missing that `to_onnx` needs."""
    for name in ("onnx", "onnxruntime", "onnxscript"):  # torch's exporter needs the last
        if importlib.util.find_spec(name) is None:
            raise FreqkdError(f"--onnx needs {name}: pip install onnx onnxruntime onnxscript.")


def to_onnx(model: nn.Module, images: Tensor, path: Path) -> float:
    """The network as ONNX, checked against torch on these images.

    Args: model: plain timm network, evaluation mode. images: (B, 3, H, W), real ones, normalised.
    Returns: largest difference of the last feature map, relative to its largest value.
    Raises: CheckFailed above ONNX_TOLERANCE, or when a Fourier transform is in the graph: the file is then not written.
    """
    check_onnx()
    import onnx
    import onnxruntime

    whole = _Features(model.eval())
    with torch.no_grad():
        expected = whole(images).numpy()
    with schema.atomic(path) as temporary:
        batch = torch.export.Dim("batch", min=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own, on its inner workings
            program = torch.onnx.export(
                whole, (images,), dynamo=True, verbose=False, input_names=["images"], output_names=["features"],
                dynamic_shapes={"x": {0: batch}},
            )  # fmt: skip
        assert program is not None  # as it is with dynamo=True
        program.save(str(temporary))
        kinds = {node.op_type for node in onnx.load(str(temporary)).graph.node}
        transforms = sorted(kind for kind in kinds if "DFT" in kind or "STFT" in kind or "FFT" in kind.upper())
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        got = session.run(None, {"images": images.numpy()})[0]
        worst = float(np.abs(got - expected).max() / np.abs(expected).max())
        if transforms or not worst <= ONNX_TOLERANCE:
            held = f" and holds {', '.join(transforms)}" if transforms else ""
            raise CheckFailed(f"the ONNX file differs from torch by {worst:.2g} (allowed {ONNX_TOLERANCE:g}){held}; "
                              "nothing was written.")  # fmt: skip
    return worst


class _Features(nn.Module):
    """The unpooled features of a timm network as the one output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_features(x)  # type: ignore[operator]


def write_card(out: Path, manifest: Mapping[str, Any]) -> None:
    """model_card.md from the run's manifest: what it is, from what, how to load it, what it did on held-out pairs."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(loader=PackageLoader("freqkd_train"), undefined=StrictUndefined, trim_blocks=True,
                        lstrip_blocks=True, keep_trailing_newline=True)  # fmt: skip
    page = pages.get_template("model_card.md.j2")
    words = page.render(m=manifest, c=manifest["config"], loading=manifest["loading"], number=number, measured=measured)
    schema.write_text(out / CARD, words)
