"""The tests. Where torchvision is installed, it is made to work with the CPU build of torch."""

from importlib.util import find_spec

if find_spec("torchvision"):
    import torch

    try:
        import torchvision
    except RuntimeError:  # PyPI's is built for CUDA, and its operators need CUDA's libraries
        # Image processors use none of them. To be imported, it needs the schemas of these two.
        _schema = "{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        _operators = torch.library.Library("torchvision", "DEF")
        _operators.define(_schema.format("nms"))
        _operators.define(_schema.format("qnms"))
        import torchvision  # noqa: F401
