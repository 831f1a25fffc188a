"""ERNIE in INT8: kurtosis-regularized quantization-aware training whose deployed model computes what was trained."""

from . import runtime

runtime.prepare()  # before anything imports paddle

__version__ = "0.1.0"
__all__ = ["KurtosisQAT", "Predictor", "UserError", "__version__"]

from .errors import UserError  # noqa: E402


def __getattr__(name: str):
    # Lazy, so that serving loads no training code and `import ernie_kqat` needs neither PaddleSlim nor PaddleNLP.
    if name == "KurtosisQAT":
        from .qat import KurtosisQAT

        return KurtosisQAT
    if name == "Predictor":
        from .predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
