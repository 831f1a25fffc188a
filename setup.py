"""Packaging of ernie_kqat; `requirements.lock` holds the exact set that is tested."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "ernie_kqat/__init__.py").read_text(encoding="utf-8")).group(1)

setup(
    name="ernie_kqat",
    version=VERSION,
    description="ERNIE in INT8: kurtosis-regularized QAT whose deployed model computes what was trained",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["ernie_kqat", "ernie_kqat.*"]),
    package_data={
        "ernie_kqat.serving": ["page.html", "ernie_kqat.proto"],
        "ernie_kqat.native": ["*.cc", "*.h"],
        "ernie_kqat.peers": ["*.lock"],
    },
    python_requires=">=3.9,<3.12",
    install_requires=[
        "paddlepaddle==2.6.2",
        "paddlenlp==2.8.1",
        "paddleslim==2.6.0",
        "numpy<2",
        "PyYAML",
        "safetensors",
        "tokenizers",
        "tqdm",
        "matplotlib",
    ],
    # And, without their dependencies: paddle-serving-server and paddle-serving-app (requirements-serving-paddle.txt).
    extras_require={"serving": ["aiohttp", "grpcio", "prometheus_client", "protobuf==3.20.3", "func-timeout", "six"]},
)
