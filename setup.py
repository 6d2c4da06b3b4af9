"""Maps the folder kernels/ to the import name inpo_kernels: `kernels` is Hugging Face's package, which
diffusers and transformers probe for. Everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["inpo_fast", "inpo_fast.*"]), "inpo_kernels"],
    package_dir={"inpo_fast": "inpo_fast", "inpo_kernels": "kernels"},
    package_data={
        "inpo_fast": ["configs/*"],
        "inpo_fast.pocket": ["assets/**/*"],
        "inpo_fast.report": ["*.j2", "*.css"],
    },
)
